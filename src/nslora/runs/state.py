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
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nslora.algorithm.session import Losses, Session, State
from nslora.disk import sealed, unsealed
from nslora.runs.store import code, read_json, write_text
from nslora.tasks.build import build
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
    """What a file holds.

    Attributes:
        state: without the losses of its memory.
        losses: those losses.
        replies: by adapter and text; the adapter of the frozen weights is "".
        maker: what must be the same for whoever goes on: code and weights.
        spent: what the run had spent, as its caller counts.
    """

    state: State
    losses: tuple[PairLoss, ...]
    replies: dict[str, dict[str, Generation]]
    maker: tuple[str, str]
    spent: dict[str, Any]


def save(path: Path, run: Session, state: State, spent: dict[str, Any] | None = None) -> None:
    """Write a state whose weights are in place, with the replies that can be asked for again."""
    losses = [PairLoss(*pair, nll, tokens) for pair, (nll, tokens) in state.memory.losses.items()]
    # the losses are rows of their own
    memory = replace(state.memory, losses={})
    # other adapters come back into place with another history
    replies = {adapter: run.replies.get(adapter, {}) for adapter in ("", run.adapter)}
    bare = replace(state, memory=memory)
    saved = Saved(bare, tuple(losses), replies, (code(), run.backbone.identity), spent or {})
    # sets become sorted lists: equal states make equal files
    text = json.dumps(sealed(asdict(saved)), default=sorted, ensure_ascii=False)
    write_text(path, text + "\n")


def restore(path: Path, run: Session) -> tuple[State, dict[str, Any]]:
    """Put the session back to where `save` was called; return the state and what was spent.

    The weights are read from `run.scratch`. Raises UserError if the file or the weights are missing
    or damaged, or of other code.
    """
    try:
        # JSON with NaN, which losses may be
        saved = TypeAdapter(Saved).validate_python(unsealed(read_json(path)))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"the saved state {path} is missing or damaged: {reason}") from error
    if saved.maker != (code(), run.backbone.identity):
        raise UserError(f"the saved state {path} is of other code or other weights.")
    # first what may be damaged: a run that then begins anew is still in its first phase
    run.use(saved.state.candidate)
    if saved.state.phase:
        run.enter(build(run.cfg, saved.state.phase))
    run.recall(saved.replies)
    memory = replace(saved.state.memory, losses=_losses(saved.losses))
    return replace(saved.state, memory=memory), saved.spent


def _losses(rows: tuple[PairLoss, ...]) -> Losses:
    losses: Mapping[tuple[Prompt, str, str], tuple[float, int]] = {
        (row.prompt, row.question, row.target): (row.nll, row.tokens) for row in rows
    }
    return losses
