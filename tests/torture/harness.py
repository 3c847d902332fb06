"""Count what is tried and what is lost, per kind, and fork the processes that are killed.

`make torture` runs these tests at their full numbers of cases (factor 1) and writes
results/reliability.json; `make test` runs them at a few per cent. The number of a test's cases is set
by the factor alone:

    NSLORA_TORTURE       the factor
    NSLORA_RELIABILITY   the file to write
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from nslora.runs import store

T = TypeVar("T")
SHORT = 0.03
ROOT = Path(__file__).absolute().parents[2]


def factor() -> float:
    """Return the factor of this session."""
    return float(os.environ.get("NSLORA_TORTURE") or SHORT)


@dataclass
class Kind:
    """What was tried of one kind.

    Use it as a context manager around each case: what the case raises is kept, and the next case
    goes on.
    """

    name: str
    tried: int = 0
    losses: list[str] = field(default_factory=list)
    case: object = ""

    def number(self, full: int) -> int:
        """Return how many cases to try, of `full` at factor 1; at least one."""
        return max(1, round(full * factor()))

    def __call__(self, case: object = "") -> Self:
        """Name the next case."""
        self.case = case
        return self

    def __enter__(self) -> Self:
        self.tried += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        said = " ".join(str(error).split())[:600]
        self.losses.append(f"{self.case}: {type(error).__name__}: {said}")
        return True

    def each(self, cases: Iterable[T], check: Callable[[T], object]) -> None:
        """Check each case."""
        for case in cases:
            with self(case):
                check(case)

    def explore(self, full: int, cases: SearchStrategy[T], check: Callable[[T], object]) -> None:
        """Check drawn cases, `full` of them at factor 1; the first one that fails ends it."""

        @settings(
            max_examples=self.number(full),
            deadline=None,
            derandomize=True,
            # what is shrunk would be counted, too
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        )
        @given(cases)
        def one(case: T) -> None:
            self.tried += 1
            self.case = repr(case)[:300]
            check(case)

        tried = self.tried
        with self("none"):
            one()
        # the attempt as a whole is no case
        self.tried = max(self.tried - 1, tried + 1)


@dataclass
class Tally:
    """All kinds of a session, by name."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def kind(self, name: str) -> Kind:
        """Return a kind, which several tests may share."""
        return self.kinds.setdefault(name, Kind(name))

    def write(self, path: Path) -> None:
        """Write what was tried and lost, and what tried it; other kinds of the same revision stay."""
        dirty = store.git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/tests")
        minutes = (time.monotonic() - self.started) / 60
        maker = {"revision": store.git("rev-parse", "HEAD"), "dirty": bool(dirty)}
        rows = {
            name: {
                "factor": factor(),
                "tried": kind.tried,
                "lost": len(kind.losses),
                "losses": kind.losses,
            }
            for name, kind in self.kinds.items()
        }
        before = store.read_json(path) if path.exists() else {}
        if maker.items() <= before.items() and not dirty:
            rows = before["kinds"] | rows
            minutes += before["minutes"]
        kinds = dict(sorted(rows.items()))
        least = min(row["factor"] for row in rows.values())
        content = {**maker, "factor": least, "minutes": round(minutes, 1), "kinds": kinds}
        store.write_json(path, content)


def table(path: Path) -> str:
    """Return the Markdown table of a reliability.json: kinds that start alike ("damage: ...") in one row."""
    content = store.read_json(path)
    groups: dict[str, list[str]] = {}
    for name in content["kinds"]:
        groups.setdefault(name.partition(":")[0], []).append(name)
    lines = ["| what is done to it | tried | lost |", "| :-- | --: | --: |"]
    for group, names in groups.items():
        tried, lost = (sum(content["kinds"][n][key] for n in names) for key in ("tried", "lost"))
        lines.append(f"| {names[0] if len(names) == 1 else group} | {tried} | {lost} |")
    revision = content["revision"][:7] + " with changes" * content["dirty"]
    minutes = f"{content['minutes']:.0f} minutes on two cores, beside other work"
    smallest = min(row["factor"] for row in content["kinds"].values())
    cases = "all cases" if smallest >= 1 else f"a kind has {smallest:g} of its cases or more"
    return "\n".join([*lines, "", f"`make torture` at revision {revision}, {minutes}: {cases}."])


class Nursery:
    """A process that has imported everything, and forks one that does a task: killed in seconds, not minutes.

    Tasks are functions of `tasks.py`, by name; a task is told everything as JSON.
    """

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *filter(None, sys.path)])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("tasks.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def begin(self, *tasks: dict[str, Any]) -> list[int]:
        """Fork a process per task; return their ids."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        stdin.write(json.dumps(tasks) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    def end(self) -> list[int]:
        """Wait for the processes of the last call; return their exit statuses, -9 for a killed one."""
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def run(self, *tasks: dict[str, Any]) -> list[int]:
        """Do tasks side by side, to their ends."""
        self.begin(*tasks)
        return self.end()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin and self.process.stdout
        # it holds nothing, and takes seconds to say goodbye
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
