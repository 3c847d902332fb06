"""Attention of packed rows by themselves against attention behind a mask, and against rows one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import narrow, rows
from transformers import LlamaForCausalLM

from nslora.model.fast import attention, packing


def test_packed_rows_attend_without_a_mask(tiny):
    """Loaded with our attention, a model looks at each row alone: its mask, here one that hides all, is not needed."""
    torch.manual_seed(2)
    model: Any = LlamaForCausalLM(tiny.config).eval()
    model.set_attn_implementation(attention.ATTENTION)
    batch = packing.pack([(row[:-3], row[-3:]) for row in rows(6)], model.lm_head.weight)
    masked, _ = packing.answer_logits(
        tiny_copy := copy.deepcopy(model), **{k: v for k, v in batch.items() if k != "rows"}
    )
    hidden = torch.full_like(batch["attention_mask"], torch.finfo(torch.float32).min)
    alone, _ = packing.answer_logits(model, **batch | {"attention_mask": hidden})
    torch.testing.assert_close(alone, masked, rtol=1e-4, atol=1e-5)
    gradients = []
    for one, logits in ((model, alone), (tiny_copy, masked)):
        logits.square().sum().backward()
        gradients.append([p.grad for p in one.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# with dropout, as on a GPU, torch's own attention computes
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_packed_rows_longer_than_a_sliding_window_keep_to_it(dropout: float):
    """Gemma's local layers see the last tokens only; packed rows, attended by themselves, once saw all of theirs."""
    model = narrow(dropout).train()
    start = list(range(20, 34))
    pairs = [([*start, 1, 2, 3], [50, 51]), ([*start, 4, 5, 6, 7, 8], [60, 61, 62]), ([9, 8], [7])]
    alone = [model(input_ids=torch.tensor([prompt + answer])).logits[0] for prompt, answer in pairs]
    wanted = [
        logits[-1 - len(answer) : -1] for logits, (_, answer) in zip(alone, pairs, strict=True)
    ]
    model.set_attn_implementation(attention.ATTENTION)
    logits, _ = packing.answer_logits(model, **packing.pack(pairs, model.lm_head.weight))
    torch.testing.assert_close(logits, torch.cat(wanted), rtol=1e-4, atol=1e-5)
