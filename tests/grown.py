"""Writes small trees of schedules, as the data set has them, whose best schedules are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import write_lines

# the tokens of a move: trained, generated, the editor's
TOKENS = {"": (0, 10, 0), "N": (100, 10, 0), "S": (0, 30, 200)}
SECONDS = {"": 1.0, "N": 10.0, "S": 20.0}
Worth = Callable[[str], float]
FLAT: Worth = lambda schedule: 0.5  # noqa: E731


def schedules(depth: int) -> list[str]:
    """All schedules of at most `depth` moves, as the file has them."""
    return ["".join(moves) for n in range(depth + 1) for moves in product("NS", repeat=n)]


def toward(goal: str, most: float = 1.0) -> Worth:
    """Success that grows with the moves that agree with `goal` from the first one on, to `most` at its end."""

    def worth(schedule: str) -> float:
        agree = 0
        while agree < min(len(goal), len(schedule)) and schedule[agree] == goal[agree]:
            agree += 1
        return most * agree / len(goal)

    return worth


def right(share: float, n: int, rng: np.random.Generator | None) -> list[int]:
    """`n` items of which a share is right, by chance or exactly."""
    if rng is None:
        return [int(i < round(share * n)) for i in range(n)]
    return (rng.random(n) < share).astype(int).tolist()


def write_tree(
    folder: Path,
    worth: Worth = FLAT,
    rng: np.random.Generator | None = None,
    *,
    family: str = "mixed 6+6+0 json",
    backbone: str = "smollm2-135m",
    seed: int = 100,
    depth: int = 3,
    style: float = 0.5,
    follows: float = 0.5,
    items: int = 20,
    dev: int = 10,
    needs: Callable[[str], tuple[float, float]] = lambda schedule: (0.5, 0.5),
    signal: Callable[[str], dict[str, float]] = lambda schedule: {},
    facts: Sequence[str] | None = None,
    retention: float = 1.0,
    task: str = "mixed",
) -> Path:
    """Write one instance; its dev and test items are right with `worth`, exactly so without a generator."""
    name = f"{backbone}-{family.replace(' ', '_')}-s{seed}"
    (folder / name).mkdir(parents=True)
    config = {"task": task, "backbone": backbone, "seed": seed, "rule": "json", "moves": depth}
    instance = {
        "schema": 1,
        "instance": name,
        "family": family,
        "config": config,
        "split": "tuning" if seed >= 100 else "test",
        "depth": depth,
        "shares": {"content": 1 - style, "style": style, "both": 0.0},
        "follows": follows,
        "abilities": {"locality": 100, "promptability": 100},
        "facts": list(facts or map(str, range(items))),
        "weights": "0" * 64,
        "environment": {"revision": "0" * 40, "threads": 1},
    }
    (folder / name / "instance.json").write_text(json.dumps(instance))
    rows = []
    for schedule in schedules(depth):
        row = node(schedule, worth(schedule), items, dev, rng)
        content_share, style_share = needs(schedule)
        asked = {"content": content_share, "style": style_share}
        row |= {"needs": dict.fromkeys(("asked", "hidden"), asked)}
        row |= {"locality": retention, "promptability": None}
        row["signal"] |= signal(schedule)
        rows.append(row)
    write_lines(folder / name / "nodes.jsonl", rows)
    return folder / name


def node(
    schedule: str, share: float, items: int, dev: int, rng: np.random.Generator | None
) -> dict[str, Any]:
    """One line of nodes.jsonl, without needs and retention."""
    test, on_dev = right(share, items, rng), right(share, dev, rng)
    success = float(np.mean(on_dev))
    last = schedule[-1:]
    trained, generated, editor = TOKENS[last]
    shares = {"success": success, "value": success, "n": dev}
    return {
        "schedule": schedule,
        "dev": shares,
        "train": shares,
        "test": {"success": float(np.mean(test)), "value": 0.5, "n": items},
        "test_items": "".join(map(str, test)),
        "signal": {"c1": None, "c2": None, "gain": None},
        "dev_nll": 2.0 - share,
        "evidence": {"loss": 1.0} if last == "N" else {},
        "accepted": True if last == "S" else None,
        "bill": {
            "train_tokens": trained,
            "generated_tokens": generated,
            "editor_calls": 0,
            "editor_tokens": editor,
        },
        "seconds": SECONDS[last],
        "prompt": {"system": "Answer briefly.", "question": "{question}"},
    }
