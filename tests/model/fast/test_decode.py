"""The shared-prefix decoder against the library's own `generate`, in float32."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import narrow, reference, rows

from nslora.model.fast import decode


def test_many_batches_equal_generate(tiny, monkeypatch):
    monkeypatch.setattr(decode, "BATCH", 4)
    prompts = rows(11)
    got = decode.decode(tiny, prompts, {96, 3, 4, 5}, 10)
    for prompt, (ids, _) in zip(prompts, got, strict=True):
        want = reference(tiny, prompt, 10)
        first = next((i for i, token in enumerate(want) if token in {96, 3, 4, 5}), 9)
        assert ids == want[: first + 1]


def test_rows_without_common_start(tiny):
    prompts = [[1], [2, 7, 9], [5, 5, 5, 5, 5, 8]]
    got = decode.decode(tiny, prompts, {96}, 6)
    assert [ids for ids, _ in got] == [reference(tiny, prompt, 6) for prompt in prompts]


def test_decoding_keeps_to_a_sliding_window():
    """Padding between a shared prefix and shorter rows once took the place of tokens in the window."""
    model, start = narrow().eval(), list(range(20, 34))
    for prompts in ([[*start, 1, 2, 3], [*start, 4, 5, 6, 7, 8], [*start, 9]], [[7, 8], [7]]):
        expected = [reference(model, prompt, 8) for prompt in prompts]
        assert [ids for ids, _ in decode.decode(model, prompts, {96}, 8)] == expected
        assert [ids for ids, _ in decode.decode(model, prompts[-1:], {96}, 8)] == expected[-1:]


def test_generate_uses_the_active_adapter(tiny, adapted):
    prompts = rows(5)
    got = [ids for ids, _ in decode.decode(adapted, prompts, {96}, 6)]
    assert got == [reference(adapted, prompt, 6) for prompt in prompts]
    with adapted.disable_adapter():
        assert got != [ids for ids, _ in decode.decode(adapted, prompts, {96}, 6)]


@given(st.lists(st.booleans(), min_size=1, max_size=70).filter(any))
def test_rows_that_leave_a_batch_move_little_and_leave_few_sizes(going: list[bool]):
    keep = decode._kept_slots(going)
    assert {k for k, goes in enumerate(going) if goes} <= set(keep)
    assert len(set(keep)) == len(keep) <= sum(going) * 1.25
    assert len(keep) in (len(going), *range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
    assert all(k == place or (k >= len(keep) and not going[place]) for place, k in enumerate(keep))


def test_sampling_depends_on_seed_and_not_on_the_batch(tiny, monkeypatch):
    prompts = rows(9)
    whole = decode.decode(tiny, prompts, {96}, 8, temperature=1.0, seed=7)
    assert [ids for ids, _ in whole] != [
        ids for ids, _ in decode.decode(tiny, prompts, {96}, 8, 1.0, seed=8)
    ]
    monkeypatch.setattr(decode, "BATCH", 2)
    again = decode.decode(tiny, prompts, {96}, 8, temperature=1.0, seed=7)
    assert [ids for ids, _ in again] == [ids for ids, _ in whole]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).expand(4000, -1)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    counts = decode._choose(logits, uniform, 0.5).bincount(minlength=4) / 4000
    want = (logits[0] / 0.5).softmax(-1)
    assert torch.allclose(counts, want, atol=0.03)
    assert decode._choose(logits[:1], torch.tensor([1.0]), 1.0).item() in (2, 3), (
        "the end of the range is a token"
    )
