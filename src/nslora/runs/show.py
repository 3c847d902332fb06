"""Show a run while it is made: lines, or in a notebook a table that grows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nslora.runs.run import Timed, Watch

HEAD = ("move", "kind", "reason", "dev reward", "seconds")


def watcher() -> Watch:
    """Return what shows moves: a live table in a notebook, else lines on standard error."""
    return Live() if in_notebook() else print_step


def print_step(step: Timed) -> None:
    """Print one line per move to standard error."""
    reason = f" ({step.reason})" if step.reason else ""
    line = f"move {step.step}: {step.move}{reason}, dev {step.dev['value']:.2f}"
    print(f"{line}, {step.seconds:.0f} s, {left(step)}", file=sys.stderr, flush=True)


def left(step: Timed) -> str:
    """Return how long a run still takes, in words."""
    return f"about {duration(step.left_s)} left"


def duration(seconds: float) -> str:
    """Return a time in seconds, or in minutes from two on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def in_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook."""
    # where nobody has imported it, there is none
    ipython = sys.modules.get("IPython")
    shell: Any = ipython and ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class Live:
    """A table of the moves so far in a notebook's output, with the time that is left."""

    def __init__(self) -> None:
        self.rows: list[Sequence[object]] = []
        self.handle: Any = None

    def __call__(self, step: Timed) -> None:
        """Add a move."""
        from IPython.display import HTML, display

        self.rows.append(row(step.step, step.move, step.reason, step.dev["value"], step.seconds))
        page = HTML(f"{table(HEAD, self.rows)}<p>{left(step)}</p>")
        if self.handle is None:
            self.handle = display(page, display_id=True)
        else:
            self.handle.update(page)


def row(step: int, move: str, reason: str, value: float, seconds: float) -> Sequence[object]:
    """Return the cells of a move."""
    return step, move, reason, f"{value:.2f}", f"{seconds:.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in HTML; texts of data stay texts."""
    lines = [cells("th", head), *(cells("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def cells(tag: str, values: Sequence[object]) -> str:
    """Return one row of a table."""
    return f"<tr>{''.join(f'<{tag}>{escape(str(value))}</{tag}>' for value in values)}</tr>"
