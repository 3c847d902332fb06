"""Count what the external LLM costs, and stop before it costs more than it may."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import inf, isfinite
from pathlib import Path

from filelock import FileLock
from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, TypeAdapter, ValidationError

from nslora.disk import saving, sealed, unsealed
from nslora.editor.replay import Reply
from nslora.types import UserError

# what a budget limits
LIMITED = ("calls", "tokens", "money")
UNITS = {"money": "dollars"}
# US dollars per million tokens in, and out
Price = tuple[NonNegativeFloat, NonNegativeFloat]


class Spent(Exception):
    """A budget that ends a run is spent; the message names the part of it, as in "300 tokens"."""


@dataclass(frozen=True)
class Budget:
    """What may be spent on calls; what is replayed is free.

    Attributes:
        calls: attempts that are sent to the endpoint.
        tokens: in and out.
        money: US dollars, by a price.
        attempt_s: longest time of one attempt, in seconds.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    calls: NonNegativeFloat = inf
    tokens: NonNegativeFloat = inf
    money: NonNegativeFloat = inf
    attempt_s: PositiveFloat = 180.0

    @classmethod
    def from_environment(cls) -> Budget:
        """Return the budget in NSLORA_EDITOR_BUDGET, as in "calls=500,money=2.5"; none when unset.

        Raises UserError.
        """
        text = os.environ.get("NSLORA_EDITOR_BUDGET", "")
        pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
        settings = {name: amount for name, _, amount in pairs}
        try:
            return TypeAdapter(cls).validate_strings(settings)
        except ValidationError as error:
            example = "calls=500,tokens=200000,money=2.5,attempt_s=60"
            raise UserError(
                f"NSLORA_EDITOR_BUDGET must be like {example!r} (any of the four), not {text!r}."
            ) from error

    def require_price(self, price: Price | None, url: str) -> None:
        """Raise UserError where money is limited, and nobody knows what a call at `url` costs."""
        if isfinite(self.money) and price is None and url != "local":
            raise UserError(
                f"a limit of {self.money:g} dollars needs the price of the editor at {url}: give "
                "--price IN,OUT (dollars per million tokens), or NSLORA_EDITOR_PRICE."
            )


def price(text: str, name: str = "NSLORA_EDITOR_PRICE") -> Price | None:
    """Parse "2.5,10" as US dollars per million tokens in and out; None where nothing is given.

    Raises UserError, which calls the price by `name`.
    """
    if not text:
        return None
    try:
        return TypeAdapter(Price).validate_python(text.split(","))
    except ValidationError as error:
        raise UserError(f"{name} must be two numbers like '2.5,10', not {text!r}.") from error


def known_price(given: Price | None = None) -> Price | None:
    """Return a price, or that of NSLORA_EDITOR_PRICE; None where there is none; raises UserError."""
    return given or price(os.environ.get("NSLORA_EDITOR_PRICE", ""))


@dataclass
class Ledger:
    """What requests have cost.

    A replayed request counts at what it cost when it was made, so that a resumed or replayed run
    reports the same cost as the run that made it.

    Attributes:
        calls: requests sent to the endpoint.
        replayed: requests answered from a recording.
        retries: further attempts at either, after a reply that could not be used.
        lost: requests that got no usable reply.
        tokens_in, tokens_out: as the endpoint counts them, those of unusable replies included.
        seconds: time in which at least one call was waiting.
        money: US dollars, 0 without a price.
        error: why the last lost request was lost.
    """

    calls: int = 0
    replayed: int = 0
    retries: int = 0
    lost: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    money: float = 0.0
    error: str = ""

    def __add__(self, later: Ledger) -> Ledger:
        """Return what both have spent."""
        spent = {n: round(getattr(self, n) + getattr(later, n), 9) for n in COUNTS}
        return Ledger(**spent, error=later.error or self.error)

    def __sub__(self, earlier: Ledger) -> Ledger:
        """Return what was spent since `earlier`, a copy by `dataclasses.replace(ledger)`."""
        # rounded: the last bits of a difference depend on what was spent before
        spent = {n: round(getattr(self, n) - getattr(earlier, n), 9) for n in COUNTS}
        return Ledger(**spent, error=self.error if self.lost > earlier.lost else "")

    @property
    def requests(self) -> int:
        """All that was asked for, retries included; the same when it is replayed."""
        return self.calls + self.replayed + self.retries

    @property
    def tokens(self) -> int:
        """Tokens in and out."""
        return self.tokens_in + self.tokens_out

    def charge(self, reply: Reply) -> None:
        """Add what a reply cost."""
        self.retries += reply.retries
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        self.seconds += reply.seconds
        self.money += reply.money
        if reply.error:
            self.lost += 1
            self.error = reply.error


# all but the error
COUNTS = [field.name for field in fields(Ledger)[:-1]]


class Spending:
    """What calls have taken from a budget: in this process, or in all that share a file.

    Calls under way that nothing is set aside for are not seen yet, so tokens and money may be
    exceeded by those.
    """

    def __init__(self, budget: Budget, path: Path | None = None) -> None:
        self.limits = {name: getattr(budget, name) for name in LIMITED}
        limited = any(map(isfinite, self.limits.values()))
        # nothing to share without a limit
        self.path = path if limited else None
        self._own: dict[str, float] = dict.fromkeys(LIMITED, 0.0)
        # for calls of this process that are under way
        self._aside: dict[str, float] = dict.fromkeys(LIMITED, 0.0)

    def admit(self, tokens: float = 0.0, money: float = 0.0) -> str:
        """Take one call from the budget, or return which part of it is spent, as in "2 calls".

        `tokens` and `money` are set aside for it, until `charge` gives them back.
        """
        wanted = {"calls": 0.0, "tokens": tokens, "money": money}
        with self._totals() as totals:
            for name, limit in self.limits.items():
                taken = totals[name] + self._aside[name]
                if taken >= limit or taken + wanted[name] > limit:
                    return self.words(name)
            totals["calls"] += 1
        self._set_aside(tokens, money)
        return ""

    def words(self, name: str) -> str:
        """Return a limit in words."""
        return f"{self.limits[name]:.12g} {UNITS.get(name, name)}"

    def left(self, name: str) -> float:
        """Return what is left of a part of the budget."""
        with self._totals() as totals:
            return self.limits[name] - totals[name]

    def _set_aside(self, tokens: float, money: float) -> None:
        self._aside["tokens"] += tokens
        self._aside["money"] += money

    def charge(self, reply: Reply, tokens: float = 0.0, money: float = 0.0) -> None:
        """Take what an admitted call cost beyond its first attempt; `tokens` and `money` as admitted."""
        self._set_aside(-tokens, -money)
        with self._totals() as totals:
            totals["calls"] += reply.retries
            totals["tokens"] += reply.tokens_in + reply.tokens_out
            totals["money"] += reply.money

    @contextmanager
    def _totals(self) -> Iterator[dict[str, float]]:
        """Yield the totals, to be read and changed by one process at a time."""
        if self.path is None:
            yield self._own
            return
        with saving(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{self.path}.lock").touch()
        with FileLock(f"{self.path}.lock"):
            totals = self._read(self.path)
            yield totals
            part = self.path.with_suffix(".part")
            with saving(self.path):
                part.write_text(json.dumps(sealed(totals)), encoding="utf-8")
                part.replace(self.path)

    def _read(self, path: Path) -> dict[str, float]:
        """Return the totals of a file; raises UserError for a damaged one."""
        if not path.exists():
            return dict(self._own)
        try:
            totals = unsealed(json.loads(path.read_bytes()))
            return {name: float(totals[name]) for name in self._own}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} does not say what the editor has spent; delete it to count anew."
            ) from error
