"""Save where a run stands after a move, and put a session back there, to the bit.

What decides a run's next move and its results: the state (candidate, scored rows, history, memory),
the replies made so far (a text is decoded once, so they decide what comes in one batch), and adapter
and optimizer, which the numerical move itself has saved. Randomness is drawn per purpose and move,
so that no generator's state is to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nslora.algorithm.session import Losses, Session, State
from nslora.runs.store import write_text
from nslora.types import Generation, Prompt, UserError


@dataclass(frozen=True)
class PairLoss:
    """A training pair of the last epoch, and its loss: JSON has no keys of three parts."""

    prompt: Prompt
    question: str
    target: str
    nll: float
    tokens: int


@dataclass(frozen=True)
class Saved:
    """What a file holds: a state, its memory's losses as rows, and replies by adapter and text.

    The adapter of the frozen weights is "".
    """

    state: State
    losses: tuple[PairLoss, ...]
    replies: dict[str, dict[str, Generation]]


def save(path: Path, run: Session, state: State) -> None:
    """Write a state whose weights are in place, with the replies that can be asked for again."""
    losses = [PairLoss(*pair, nll, tokens) for pair, (nll, tokens) in state.memory.losses.items()]
    # the losses are rows of their own
    memory = replace(state.memory, losses={})
    # other adapters come back into place with another history
    replies = {adapter: run.replies.get(adapter, {}) for adapter in ("", run.adapter)}
    saved = Saved(replace(state, memory=memory), tuple(losses), replies)
    # sets become sorted lists: equal states make equal files
    write_text(path, json.dumps(asdict(saved), default=sorted, ensure_ascii=False) + "\n")


def restore(path: Path, run: Session) -> State:
    """Put the session back to where `save` was called, its replies included; return the state.

    The weights are read from `run.scratch`. Raises UserError if the file is missing or damaged.
    """
    try:
        # JSON with NaN, which losses may be
        saved = TypeAdapter(Saved).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"the saved state {path} is missing or damaged: {error}") from error
    run.use(saved.state.candidate)
    run.recall(saved.replies)
    memory = replace(saved.state.memory, losses=_losses(saved.losses))
    # what was spent before belongs to the moves before
    run.bill()
    return replace(saved.state, memory=memory)


def _losses(rows: tuple[PairLoss, ...]) -> Losses:
    losses: Mapping[tuple[Prompt, str, str], tuple[float, int]] = {
        (row.prompt, row.question, row.target): (row.nll, row.tokens) for row in rows
    }
    return losses
