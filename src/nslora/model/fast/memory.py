"""Batches that a device's memory holds, found by trying: what does not fit is halved and tried again.

A size that was found is kept for the model, so that each later batch fits at once. On a CPU nothing runs
out this way: there sizes are small from the start (`packing.PACK`, `decode.BATCH`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from nslora.types import UserError

Row = TypeVar("Row")
Result = TypeVar("Result")

# of each model, what is known to be too much
_found: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()


def size(model: Any, of: str, most: int) -> int:
    """Return how much of a kind (`of`, a name) the model may be given at once; `most` at first."""
    return _found.get(model, {}).get(of, most)


def halve(model: Any, of: str, tried: int, least: int = 1) -> None:
    """Note that memory does not hold `tried`, and free it; raises UserError where `least` did not fit.

    Call it outside of the `except` block: until that is left, its traceback keeps tensors alive.
    """
    if tried <= least:
        raise UserError(
            "the device's memory does not hold a single row; take a smaller backbone, shorter rows, or --set dtype=nf4."
        )
    _found.setdefault(model, {})[of] = max(least, tried // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_batches(
    model: Any,
    of: str,
    rows: Sequence[Row],
    most: int,
    compute: Callable[[Sequence[Row]], Sequence[Result]],
) -> list[Result]:
    """Return `compute` of all rows, in order: `most` rows at a time, or as many as memory holds."""
    done: list[Result] = []
    while len(done) < len(rows):
        batch = rows[len(done) : len(done) + size(model, of, most)]
        try:
            done += compute(batch)
            continue
        except torch.OutOfMemoryError:
            pass
        halve(model, of, len(batch))
    return done
