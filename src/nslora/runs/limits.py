"""Limit what a run on own data may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf

from nslora.config import RunConfig
from nslora.editor.ledger import Budget, Price, known_price
from nslora.types import Move, UserError

# as they are named to users
NAMES = ("minutes", "tokens", "money")
# cells of {frozen, tuned} weights x {initial, final} prompt that test is scored in
CELLS = 4


@dataclass(frozen=True)
class Limits:
    """What a run may take, in all calls that go on with it together.

    A limit says where a run stops, not what its moves are. So it is no setting, and no part of a
    run's identity: called again with more room, the run goes on from its last move, and its record
    is the one that this room would have brought from the start.

    Attributes:
        minutes: by the clock, evaluation included: no move is begun whose like would not fit.
        tokens: of the external LLM, in and out.
        money: US dollars for them.
        price: US dollars per million tokens in and out; NSLORA_EDITOR_PRICE where it is None.
        since: when this call began, by `time.perf_counter()`.
    """

    minutes: float = inf
    tokens: float = inf
    money: float = inf
    price: Price | None = None
    since: float = field(default_factory=time.perf_counter, compare=False)

    def __post_init__(self) -> None:
        """Raise UserError unless every limit is a number above 0."""
        for name in NAMES:
            value = getattr(self, name)
            # `not >`, so that NaN is none
            if not value > 0:
                raise UserError(f"a limit of {name} must be above 0, not {value:g}.")

    @property
    def budget(self) -> Budget:
        """The editor's budget: that of the environment, and no more than these limits."""
        given = Budget.from_environment()
        tokens, money = min(given.tokens, self.tokens), min(given.money, self.money)
        return replace(given, tokens=tokens, money=money)

    @property
    def known_price(self) -> Price | None:
        """The price, by these limits or by the environment; None where there is none."""
        return known_price(self.price)

    def require_price(self, cfg: RunConfig) -> None:
        """Raise UserError where money is limited and what the run's editor costs is not known.

        Also where a judge grades: the evaluation needs its grades, whatever is left.
        """
        budget = self.budget
        budget.require_price(self.known_price, cfg.editor_url)
        if cfg.judge and min(budget.calls, budget.tokens, budget.money) < inf:
            raise UserError(
                "a judge has to grade the evaluation too: limit its run by minutes only."
            )


@dataclass(frozen=True)
class Taken:
    """What a move took: seconds, and tokens of the external LLM; `move` is "start" for the start."""

    move: str
    seconds: float
    tokens: float


@dataclass
class Room:
    """Tells what still fits a run's limits, by what its moves took so far.

    Attributes:
        editor: returns the tokens that the external LLM may still take, and whose limit they are.
        replies: how many the run's end asks for.
        scored: how many the start asked for.
        earlier_s: seconds of the run in other processes.
        stopped: the limit that left no room for the next move, as in "10 minutes"; "" while there
            is room.
    """

    limits: Limits
    editor: Callable[[], tuple[float, str]]
    replies: int
    scored: int
    earlier_s: float = 0.0
    taken: list[Taken] = field(default_factory=list)
    stopped: str = ""

    @property
    def end_s(self) -> float:
        """Seconds that the evaluation at the run's end will take, by the start."""
        return self.taken[0].seconds / self.scored * self.replies

    @property
    def left_s(self) -> float:
        """Seconds until the limit of minutes."""
        gone = time.perf_counter() - self.limits.since + self.earlier_s
        return 60 * self.limits.minutes - gone

    def like(self, move: Move) -> Taken:
        """Return the most that a move of a kind took so far.

        Before the first one its seconds are those of other moves, or of scoring the start, and no
        tokens are expected: the editor refuses what is too much.
        """
        kind = [taken for taken in self.taken if taken.move == move]
        known = kind or self.taken[1:] or self.taken
        tokens = max((taken.tokens for taken in kind), default=0.0)
        return Taken(move, max(taken.seconds for taken in known), tokens)

    def affords(self, move: Move) -> bool:
        """Tell whether the like of a move still fits, and the evaluation after it."""
        like = self.like(move)
        tokens, limit = self.editor()
        if like.seconds + self.end_s > self.left_s:
            self.stopped = f"{self.limits.minutes:.12g} minutes"
        elif like.tokens > tokens:
            self.stopped = limit
        return not self.stopped

    def until_end_s(self, moves: int) -> float:
        """Return seconds until the run's end with so many more moves, within the limit."""
        made = self.taken[1:] or self.taken
        mean = sum(taken.seconds for taken in made) / len(made)
        return max(0.0, min(moves * mean + self.end_s, self.left_s))
