"""What does not fit is halved: results are those of a device with room, and sizes that fit are kept."""

from __future__ import annotations

import pytest
import tiny as models
import torch

from nslora.model.fast import decode, memory, packing
from nslora.types import UserError


def crowded(model, most: int, seen: list[int]):
    """Let the model run out of memory beyond `most` tokens at once (rows x tokens of the input)."""

    def room(_module, args, kwargs):
        ids = kwargs["input_ids"]
        seen.append(ids.numel())
        if ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return model.register_forward_pre_hook(room, with_kwargs=True)


def test_sizes_that_fit_are_found_once_and_kept() -> None:
    model, tried = torch.nn.Linear(1, 1), []

    def compute(rows):
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError
        return [row * 2 for row in rows]

    for _ in range(2):
        assert memory.in_batches(model, "rows", list(range(10)), 10, compute) == list(
            range(0, 20, 2)
        )
    # 10 and 5 did not fit; then 2 at a time, in the second call from the start
    assert tried == [10, 5] + 10 * [2]
    assert memory.size(torch.nn.Linear(1, 1), "rows", 10) == 10


def test_a_rest_of_long_rows_does_not_make_later_batches_small() -> None:
    model, tried = torch.nn.Linear(1, 1), []

    def compute(rows):
        tried.append(len(rows))
        if sum(rows) > 64:
            raise torch.OutOfMemoryError
        return rows

    rows = [1] * 64 + [40, 40]
    assert memory.in_batches(model, "rows", rows, 64, compute) == rows
    assert memory.in_batches(model, "rows", rows[:64], 64, compute) == rows[:64]
    assert tried == [64, 2, 1, 1, 64]


def test_a_prompt_that_does_not_fit_is_said() -> None:
    """Of one prompt all but its last token is prefilled before any batch is made."""
    model = models.llama().eval()
    hook = crowded(model, 8, [])
    with pytest.raises(UserError, match="does not hold a single row"):
        decode.decode(model, [list(range(1, 30))], {96}, 6)
    hook.remove()


def test_a_single_row_that_does_not_fit_is_said() -> None:
    def compute(rows):
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="does not hold a single row"):
        memory.in_batches(torch.nn.Linear(1, 1), "rows", [1, 2, 3], 3, compute)


def test_replies_are_those_of_a_device_with_room() -> None:
    model = models.llama().eval()
    prompts = [[1, 2, 3 + i, 4 + i % 3] for i in range(9)]
    wanted = decode.decode(model, prompts, {96}, 6)
    seen: list[int] = []
    hook = crowded(model, 8, seen)
    found = decode.decode(model, prompts, {96}, 6)
    hook.remove()
    assert [ids for ids, _ in found] == [ids for ids, _ in wanted]
    assert [p for _, p in found] == pytest.approx([p for _, p in wanted], rel=1e-5)
    assert max(seen) > 8, "nothing was too large"


def test_likelihoods_are_those_of_a_device_with_room() -> None:
    model = models.llama().eval()
    rows = [([1, 5 + i, 7, 30 + i], [8, 9 + i]) for i in range(12)]
    wanted = packing.mean_nll(model, rows)
    seen: list[int] = []
    hook = crowded(model, 32, seen)
    found = packing.mean_nll(model, rows)
    hook.remove()
    assert found == pytest.approx(wanted, rel=1e-5)
    assert max(seen) > 32, "nothing was too large"
