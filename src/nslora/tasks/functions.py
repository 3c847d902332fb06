"""Take somebody's own function for the reward of own data.

It is called as `function(question, answer, reply)`, and returns a number in [0, 1], or (number,
critique), or a mapping with "value", perhaps "critique", and any other numbers as named parts.
"""

from __future__ import annotations

import hashlib
import inspect
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nslora.types import Example, Json, Reward, UserError

# characters that a sentence shows of a text
SHOWN = 60
# the name of a judge (`runs.judge`)
JUDGE = "judge"
WANTED = "it must return a number from 0 to 1, (number, critique), or {'value': number, ...}"


@dataclass
class Function:
    """A reward function; it is called once for each row and reply.

    Attributes:
        function: None where a subclass grades.
        free: whether a call costs nothing.
        calls: how often it was called.
    """

    free: ClassVar[bool] = True

    name: str
    function: Callable[..., Any] | None = None
    calls: int = 0
    rewards: dict[tuple[Example, str], Reward] = field(default_factory=dict)

    def __call__(self, example: Example, reply: str) -> Reward:
        """Return the reward of a reply; raises UserError where the function gives none."""
        key = (example, reply)
        if key not in self.rewards:
            self.rewards[key] = self._ask(example, reply)
        return self.rewards[key]

    def expect(self, pairs: Sequence[tuple[Example, str]]) -> None:
        """Learn of replies that are graded next: what grades several at once does so now."""

    @property
    def costs(self) -> dict[str, float]:
        """What it has cost so far, by name."""
        return {"reward_calls": self.calls}

    def save(self) -> Json:
        """Return what a run that goes on in another process has to know."""
        return {"reward_calls": self.calls}

    def restore(self, saved: Json) -> None:
        """Count what earlier processes of the run have saved."""
        self.calls += saved.get("reward_calls", 0)

    def _ask(self, example: Example, reply: str) -> Reward:
        assert self.function
        self.calls += 1
        where = f" for the reply {reply[:SHOWN]!r}"
        with naming(f"reward {self.name}", where):
            result = self.function(example.question, example.answer, reply)
        try:
            return _reward(result, example.answer)
        except ValueError as error:
            problem = f"reward {self.name} returned {str(error)[:SHOWN]}{where}"
            raise UserError(f"{problem}; {WANTED}.") from None


# by what follows "function:" in a grader
FUNCTIONS: dict[str, Function] = {}


def register(reward: str | Callable[..., Any]) -> str:
    """Return the grader of a function, or of "file.py:function"; equal sources make equal graders.

    Raises UserError for what is no function, or has no source.
    """
    name, function, source = _load(reward) if isinstance(reward, str) else _inspect(reward)
    argument = f"{name}:{hashlib.sha256(source).hexdigest()[:16]}"
    # another run calls it anew
    FUNCTIONS[argument] = Function(name, function)
    return f"function:{argument}"


def find(argument: str) -> Function:
    """Return the function of a grader's argument; raises UserError where it is not loaded."""
    if argument not in FUNCTIONS:
        name, _, _ = argument.rpartition(":")
        if name == JUDGE:
            raise UserError("replies are graded by a judge: give its criterion with --judge.")
        raise UserError(f"replies are graded by {name}: give it with --reward file.py:function.")
    return FUNCTIONS[argument]


def of(grader: str) -> Function | None:
    """Return the function of a run's grader; None where a name grades."""
    name, _, argument = grader.partition(":")
    return find(argument) if name == "function" else None


def naming(what: str, where: str = "") -> ExitStack:
    """Return a context in which an error of somebody else's code becomes one sentence."""
    stack = ExitStack()
    stack.push(partial(_rename, what, where))
    return stack


def _rename(what: str, where: str, _kind: Any, error: BaseException | None, _trace: Any) -> None:
    # a file that calls sys.exit() must not end the command as if all were well
    if isinstance(error, (Exception, SystemExit)):
        said = " ".join(str(error).split())
        raise UserError(f"{what} raised {type(error).__name__} ({said}){where}.") from error


def _load(address: str) -> tuple[str, Callable[..., Any], bytes]:
    """Return name, function and source of "file.py:function"."""
    file, _, name = address.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"reward {address!r} must be file.py:function, with a file that is there.")
    # the file may import its neighbours, which hide no library
    sys.path.append(str(path.absolute().parent))
    with naming(f"reward {file}"):
        function = runpy.run_path(file, run_name=path.stem).get(name)
    if not callable(function):
        raise UserError(f"reward {address!r}: the file has no function {name!r}.")
    return f"{path.name}:{name}", function, path.read_bytes()


def _inspect(function: object) -> tuple[str, Callable[..., Any], bytes]:
    """Return name, function and source of a function or a callable object."""
    home = function if inspect.isroutine(function) else type(function)
    try:
        source = inspect.getsource(home)
    except (OSError, TypeError):
        source = ""
    # the source of a partial function says nothing of what it calls
    if not callable(function) or not source or isinstance(function, partial):
        raise UserError(f"reward {function!r} is no function with a source; write it in a file.")
    return home.__qualname__, function, source.encode()


def _reward(result: Any, answer: str) -> Reward:
    """Return what a function has returned as a reward; raises ValueError where it is none."""
    parts: dict[str, Any] = {}
    value: Any
    if isinstance(result, Mapping):
        parts = dict(result)
        result = parts.pop("value", None), parts.pop("critique", None)
    value, critique = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not _is_share(value) or not isinstance(critique, str | None):
        raise ValueError(repr(value) if critique is None else repr(result))
    if wrong := [name for name, part in parts.items() if not _is_share(part)]:
        raise ValueError(f"the part {wrong[0]!r} as {parts[wrong[0]]!r}")
    value = float(value)
    if critique is None and value < 1:
        critique = f"The reply earns {value:.2f} of 1; the right answer is '{answer}'."
    numbers = {str(name): float(part) for name, part in parts.items()}
    return Reward(value, critique or "", numbers)


def _is_share(value: Any) -> bool:
    """Tell whether a value is a number in [0, 1]; NaN is not."""
    number: Any = value
    return isinstance(value, (Real, np.bool_)) and bool(0 <= number <= 1)
