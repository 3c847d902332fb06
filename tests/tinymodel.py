"""A tiny random language model, made on the spot: whole runs in seconds, the same numbers everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from nslora.config import RunConfig

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# a whole run with these settings takes about a second
SETTINGS: dict[str, Any] = {
    "items": 2,
    "test_items": 2,
    "moves": 3,
    "max_new_tokens": 6,
    "rank": 4,
    "lr": 1e-2,
    "candidates": 2,
    "replay_pool": 6,
    "threads": 1,
}


def config(**settings: Any) -> RunConfig:
    """Return settings for a short run; the model's folder goes in as `backbone` where it matters."""
    return RunConfig(**{**SETTINGS, **settings})


def save_tiny_model(folder: Path, merges: Sequence[tuple[str, str]] = (), width: int = 32) -> Path:
    """Write a two-layer Llama over bytes with seeded random weights, and its tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    joined = ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet, *joined])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token="<|im_end|>",
        additional_special_tokens=specials[:1],
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def bare(backbone) -> None:
    """Take an adapter off a backbone."""
    from peft import PeftModel

    if isinstance(backbone.model, PeftModel):
        backbone.model = backbone.model.unload()
