"""Random models of two layers, quick enough for gradients, and what they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)


def llama(vocab_size: int = 97, **settings: Any) -> Any:
    """Llama, with two query heads for each key head; `eos_token_id` is 96."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=96,
        pad_token_id=96,
        bos_token_id=95,
        **settings,
    )
    return LlamaForCausalLM(config)


def qwen2(vocab_size: int = 97) -> Any:
    """Qwen2, with biases in q, k and v."""
    torch.manual_seed(4)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    return model


def narrow(dropout: float = 0.0, vocab_size: int = 97) -> Any:
    """Gemma 3, whose first layer sees five tokens."""
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        attention_dropout=dropout,
        pad_token_id=0,
        eos_token_id=96,
    )
    return Gemma3ForCausalLM(config)


def rows(count: int, seed: int = 0) -> list[list[int]]:
    """Token rows of mixed lengths with a common start, the shortest being that start and one token."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 95, (n,), generator=random).tolist()  # noqa: E731
    start = draw(9)
    return [start + draw(1 + (5 * i) % 17) for i in range(count)]


def reference(model, ids: list[int], new: int) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=new,
        do_sample=False,
    )
    return out[0, len(ids) :].tolist()


def batch_of(pairs):
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), 96)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        mask[row, : len(prompt) + len(answer)] = 1
        answers[row, len(prompt) : len(prompt) + len(answer)] = 1
    return ids, mask, answers
