"""Packed rows, logits at answers and likelihoods against plain forward passes and losses, in float32."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import batch_of, rows
from transformers import LlamaForCausalLM

from nslora.model.fast import packing


def test_numbers_of_rows_that_products_see_are_few(tiny):
    """Each number has its products compiled: tokens and answer tokens are filled up, for the head too."""
    seen = []
    hook = tiny.get_output_embeddings().register_forward_hook(
        lambda _m, args, _out: seen.append(args[0].shape)
    )
    for n in (1, 2, 3, 5):
        batch = packing.pack([(row[:-3], row[-3:]) for row in rows(n)], tiny.lm_head.weight)
        logits, targets = packing.answer_logits(
            tiny, **{k: v for k, v in batch.items() if k != "rows"}
        )
        assert batch["input_ids"].shape[1] % packing.EVEN == 0
        assert logits.shape[0] == targets.shape[0] == 3 * n
    hook.remove()
    assert all(shape[0] % packing.EVEN_ANSWERS == 0 for shape in seen)


def test_nll_equals_a_plain_forward(tiny, adapted):
    pairs = [(prompt[:-1], prompt[-1:] + [40 + i, 96]) for i, prompt in enumerate(rows(19))]
    got = packing.mean_nll(adapted, pairs)
    for (prompt, answer), nll in zip(pairs, got, strict=True):
        with torch.no_grad():
            logits = adapted(input_ids=torch.tensor([prompt + answer])).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert nll == pytest.approx(
            -logp.gather(1, torch.tensor(answer)[:, None]).mean().item(), rel=1e-4
        )


def test_answer_logits_and_gradients_equal_the_plain_loss(adapted):
    ids, mask, answers = batch_of([([1, 2, 3], [4, 96]), ([5], [6, 7, 8, 96]), ([9, 10], [96])])
    logits, targets = packing.answer_logits(adapted, ids, mask, answers)
    assert targets.tolist() == [4, 96, 6, 7, 8, 96, 96]
    full = adapted(input_ids=ids, attention_mask=mask).logits[:, :-1][answers[:, 1:].bool()]
    assert torch.allclose(logits, full, atol=1e-5)

    parameters = [p for p in adapted.parameters() if p.requires_grad]
    ours = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), parameters)
    loss = adapted(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(answers == 0, -100)
    ).loss
    plain = torch.autograd.grad(loss, parameters)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, plain, strict=True))
    assert any(a.abs().max() > 1e-3 for a in ours)
    assert adapted(input_ids=ids).logits.shape == (3, 5, 97), "the hook is gone"


def test_training_with_a_bfloat16_base_and_float32_adapter(tiny):
    base: Any = LlamaForCausalLM(tiny.config)
    base.lm_head.weight.data *= 20  # a random head is too small for a low loss
    base.to(torch.bfloat16)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=True
    ).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    batch = batch_of([([1, 2, 3], [4, 96]), ([5], [6, 7, 8, 96])])
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = packing.answer_logits(model, *batch)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert packing.mean_nll(model, [([1, 2, 3], [4, 96])])[0] < losses[0]
    assert model.training, "scoring puts training mode back"


ROWS = st.lists(
    st.tuples(*[st.lists(st.integers(1, 9), min_size=1, max_size=6)] * 2),
    min_size=1,
)


@given(ROWS, st.integers(0, 500))
def test_parts_hold_a_batch_in_order_and_few_tokens_at_a_time(rows: list, shared: int) -> None:
    long = [([0] * shared + prompt * 60, answer * 20) for prompt, answer in rows]
    cut = packing.split(long)
    assert [row for part in cut for row in part] == long
    for part in cut:
        computed = packing.pack(part, torch.zeros(1))["input_ids"].numel()
        pairs = sum((len(p) + len(a)) ** 2 for p, a in part)
        assert len(part) == 1 or (computed <= packing.PACK and pairs <= packing.PACK**2)


def test_rows_under_a_shared_prompt_are_computed_in_one_part() -> None:
    long = [
        ([0] * 150 + [1, i], [2] * 10) for i in range(8)
    ]  # more than 1200 tokens, 246 of them different
    assert len(packing.split(long)) == 1
    assert len(packing.split([([i] * 150, [2] * 10) for i in range(8)])) == 3
