"""A backbone: a language model with its tokenizer and chat format, loaded from the local cache."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from nslora.model import checkpoints
from nslora.model.fast import attention, decode, memory, packing
from nslora.types import CONTROL, Generation, Prompt, UserError

# of the base weights; what computes with 4-bit ones (NF4) is bfloat16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "nf4": torch.bfloat16}
# bytes of a weight beside those of the bfloat16 that is stored; of NF4 the least, since embeddings stay as they are
SHARE = {"bfloat16": 1.0, "float32": 2.0, "nf4": 0.27}
# stands within what data hold of the letters of a control token, lest it become one: U+FDD0, which is no character
BREAK = "\ufdd0"
# what stands for a character that is none
REPLACEMENT = "\ufffd"


@dataclass
class Backbone:
    """A loaded model. `model` may be wrapped by PEFT later: everything then runs with its active adapter.

    Attributes:
        name, identity: as given to `load`, and what pins the weights (`checkpoints.identity`).
        dtype: a key of DTYPES, of the base weights. device: "cpu" or "cuda".
        end: the end-of-turn token id that closes an answer. stop: every id that ends generation.
    """

    name: str
    identity: str
    dtype: str
    device: str
    tokenizer: Any
    model: Any
    end: int
    stop: set[int]

    def text(self, prompt: Prompt, question: str) -> str:
        """Return the whole model input for `question` under `prompt`, up to where the answer starts.

        Control tokens are the chat format's own: where prompt or question hold the letters of one, a BREAK is put in.
        """
        messages = prompt.messages(question)
        return _chat(
            self.tokenizer, [m | {"content": self._as_data(m["content"])} for m in messages]
        )

    def count(self, text: str) -> int:
        """Return the number of tokens of `text`."""
        return len(self._ids(text))

    def encode(self, text: str, answer: str) -> packing.Row:
        """Return the token ids of the input `text`, and of `answer` with the end-of-turn token."""
        # the plain format ends in "Answer:"
        separator = "" if self.tokenizer.chat_template else " "
        answer_ids = self._ids(separator + self._as_data(answer))
        return self._ids(text), [*answer_ids, self.end]

    def generate(
        self,
        texts: list[str],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> list[Generation]:
        """Continue each of `texts` (made by `text`), in input order; greedy unless `temperature` > 0.

        `seed` is one for all texts, or one for each.
        A `Generation` counts its end-of-turn token. Raises UserError when a text does not fit the context.
        """
        prompts = [self._ids(text) for text in texts]
        self._require_context(max(map(len, prompts), default=0) + max_new_tokens)
        sampling = (max_new_tokens, temperature, seed)
        outputs = decode.decode(self.model, prompts, self.stop, *sampling)
        return [Generation(self._reply(ids), len(ids), logprob) for ids, logprob in outputs]

    def nll(self, texts: list[str], answers: list[str]) -> list[float]:
        """Return the mean negative log-likelihood of each answer after its text.

        In nats per token, end-of-turn token included. Raises UserError when a text does not fit the context.
        """
        rows = [self.encode(text, answer) for text, answer in zip(texts, answers, strict=True)]
        longest = max((len(prompt) + len(answer) for prompt, answer in rows), default=0)
        self._require_context(longest)
        return packing.mean_nll(self.model, rows)

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        """What begins a control token of the tokenizer: its first letter, whatever follows."""
        tokens = control_tokens(self.tokenizer)
        # nothing, where there is none
        names = "|".join(map(re.escape, tokens)) or "(?!)"
        return re.compile(f"(?=(?:{names}))(.)", re.DOTALL)

    def _as_data(self, text: str) -> str:
        """Return a text in which no control token is left whole."""
        return self._controls.sub(rf"\1{BREAK}", text.replace(BREAK, REPLACEMENT))

    def _ids(self, text: str) -> list[int]:
        # both parts of what is broken are read as letters
        parts = [
            self.tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in text.split(BREAK)
        ]
        return [token for part in parts for token in part]

    def _reply(self, ids: list[int]) -> str:
        """Return the text of new tokens, without the token that ended them."""
        ids = ids[:-1] if ids[-1] in self.stop else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not self.tokenizer.chat_template:
            # a base model goes on with a question of its own
            text, _, _ = text.partition("\nQuestion:")
        return text.strip()

    def _require_context(self, tokens: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and tokens > limit:
            raise UserError(
                f"{tokens} tokens of prompt and answer exceed the {limit} tokens that {self.name} takes."
            )


def load(name: str, threads: int = 2, dtype: str = "auto", device: str = "auto") -> Backbone:
    """Load a backbone by key, `hub:<id>@<revision>` or folder, fetching it first if it is not cached.

    `dtype` is "auto" (bfloat16 where the hardware computes in it, else float32), "bfloat16", "float32", or "nf4": 4-bit
    weights as in QLoRA (Dettmers et al., 2023), made by bitsandbytes. `device` is "auto", "cpu" or "cuda". Sets torch's
    thread count. Raises UserError for bad input or too little memory.
    """
    checkpoints.check(name)
    if device == "auto":
        device = fastest_device()
    if dtype == "auto":
        dtype = "bfloat16" if fast_bfloat16(device) else "float32"
    if dtype not in DTYPES or device not in ("cpu", "cuda"):
        choices = f"{', '.join(DTYPES)}; cpu, cuda"
        raise UserError(f"unknown dtype {dtype!r} or device {device!r}; choose from {choices}.")
    # bits depend on the number of threads, so it belongs to a run's settings
    torch.set_num_threads(threads)
    folder = checkpoints.folder(name)
    _require_memory(folder, dtype, device)
    try:
        tokenizer, model = _from_folder(folder, dtype, device)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load {name}: {str(error).splitlines()[0]}") from error
    # frozen: what is trained is added by `lora`; quantised weights are on the device already
    with memory.single_row():
        model = model if dtype == "nf4" else model.to(device)
    model.eval().requires_grad_(False)
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    end = _end_of_turn(tokenizer)
    return Backbone(
        name=name,
        identity=checkpoints.identity(name),
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        model=model,
        end=end,
        stop=stop_ids(tokenizer, model.generation_config),
    )


def fastest_device() -> str:
    """Return "cuda" where there is such a device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_bfloat16(device: str) -> bool:
    """Return whether the hardware multiplies bfloat16 natively; emulation is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    # the flags that the kernel lists for each processor
    flags = cpuinfo.read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _from_folder(folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """Load tokenizer and model without running code or unpickling anything."""
    options = _quantised(device) if dtype == "nf4" else {}
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        attn_implementation=attention.ATTENTION,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
    if dtype == "nf4":
        _keep_gradients(model)
    return tokenizer, model


def _quantised(device: str) -> dict[str, Any]:
    """Return the options by which transformers quantises weights while it loads them; raises UserError."""
    if not find_spec("bitsandbytes"):
        raise UserError("dtype nf4 takes bitsandbytes: pip install 'nslora[quantised]'.")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        # the scales of the weights are quantised, too
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES["nf4"],
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from packing weights on a CPU when they are first read: packed ones have no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _contiguous(_head: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copy the head's input: for a view torch copies the whole head for every row, 50 to 200 times slower on a CPU."""
    return (args[0].contiguous(),)


def _require_memory(folder: Path, dtype: str, device: str) -> None:
    """Raise UserError when the weights alone would not fit."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    need = stored * SHARE[dtype]
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"the weights need {need / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free."
        )


def _chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Write messages in the model's chat format, open for the answer; a plain one for base models without it."""
    if not tokenizer.chat_template:
        *system, user = [message["content"] for message in messages]
        paragraphs = [*system, f"Question: {user}\nAnswer:"]
        return (tokenizer.bos_token or "") + "\n\n".join(paragraphs)
    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except jinja2.TemplateError:
        if len(messages) == 1:
            raise
        # some formats know no system role: it then opens the user's turn
        whole = "\n\n".join(message["content"] for message in messages)
        return tokenizer.apply_chat_template([{"role": "user", "content": whole}], **options)


def control_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens that are no letters of a text: special ones, and those that look it (`<|tool|>`)."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special or CONTROL.fullmatch(token.content)}
    # nothing breaks one letter
    return sorted(name for name in names | set(tokenizer.all_special_tokens) if len(name) > 1)


def _end_of_turn(tokenizer: Any) -> int:
    """Return the token that closes an answer: what the chat template puts after one, else end-of-text."""
    if tokenizer.chat_template:
        turns = [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "ANSWER"},
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        tail = text.rpartition("ANSWER")[2].strip()
        # its first token, if the format closes a turn at all
        if ids := tokenizer(tail, add_special_tokens=False)["input_ids"]:
            return ids[0]
    return tokenizer.eos_token_id


def stop_ids(tokenizer: Any, generation_config: Any) -> set[int]:
    """Return the ids that end generation; without a chat format a blank line does too."""
    ends = generation_config.eos_token_id
    # one id, several, or none
    ends = ends if isinstance(ends, list) else [ends]
    stop = {tokenizer.eos_token_id, *ends, _end_of_turn(tokenizer)} - {None}
    if not tokenizer.chat_template:
        blank_line = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        stop |= set(blank_line) if len(blank_line) == 1 else set()
    return stop
