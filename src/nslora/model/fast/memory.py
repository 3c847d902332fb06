"""Batches that a device's memory holds, found by trying: what does not fit is halved and tried again.

A size that was found is kept for the model, so that each later batch fits at once. On a CPU nothing runs
out this way: there sizes are small from the start (`packing.most_tokens`, `decode.BATCH`). What a batch is made of goes
to the device by `placed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nslora.types import UserError

Row = TypeVar("Row")
Result = TypeVar("Result")

TOO_LITTLE = "the device's memory does not hold a single row: a smaller backbone or --set dtype=nf4 takes less."
# of each model, what is known to be too much
_found: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def size(model: Any, of: str, most: int) -> int:
    """Return how much of a kind (`of`, a name) the model may be given at once; `most` at first."""
    return _found.get(model, {}).get(of, most)


def keep(model: Any, of: str, fits: int) -> None:
    """Keep a size for later calls."""
    _found.setdefault(model, {})[of] = fits


def halved(tried: int, least: int = 1) -> int:
    """Return half of what memory does not hold, and free it; raises UserError where `least` did not fit.

    Call it outside of the `except` block: until that is left, its traceback keeps tensors alive.
    """
    if tried <= least:
        raise UserError(TOO_LITTLE)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return max(least, tried // 2)


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device. On a GPU nobody waits: neither for the copy nor for what runs there."""
    if device.type == "cpu":
        return tensor
    # from memory that the host might move, a copy is awaited
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def single_row() -> Iterator[None]:
    """Say in one sentence, as UserError, that what cannot be halved does not fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(TOO_LITTLE) from None


def in_batches(
    model: Any,
    of: str,
    rows: Sequence[Row],
    most: int,
    compute: Callable[[Sequence[Row]], Sequence[Result]],
) -> list[Result]:
    """Return `compute` of all rows, in order: `most` rows at a time, or as many as memory holds."""
    done: list[Result] = []
    here = size(model, of, most)
    while len(done) < len(rows):
        batch = rows[len(done) : len(done) + here]
        try:
            done += compute(batch)
            continue
        except torch.OutOfMemoryError:
            pass
        # a rest of few long rows says nothing about a whole batch: its size is of this call only
        whole = len(batch) == size(model, of, most)
        here = halved(len(batch))
        if whole:
            keep(model, of, here)
    return done
