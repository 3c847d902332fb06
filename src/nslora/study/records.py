"""Finished run records as data frames, and the tidy frames of estimates that tables, figures and claims are made of."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nslora.config import METHODS, TASKS, RunConfig
from nslora.study import stats
from nslora.types import Prompt, UserError, diff

IDENTITY = [
    "task",
    "rule",
    "backbone",
    "method",
    "seed",
]  # the rest of a configuration are its settings
UNIT = [
    "task",
    "rule",
    "backbone",
    "settings",
    "method",
    "seed",
    "id",
]  # one graded item of one run
HEAD = ["run_id", *IDENTITY, "settings"]
PARTS = ["success", "content", "content_strict", "style"]
STREAM = "stream"  # the task with several phases
MEASURES = {  # (split, metric) of what a run gains and of what it keeps of the frozen backbone's abilities
    "test success": ("test", "success"),
    "known facts kept": ("locality", "content"),
    "told rules obeyed": ("promptability", "style"),
}


@dataclass(frozen=True)
class Records:
    """All finished runs of a results folder; every frame has `run_id`, the IDENTITY columns and `settings` (JSON).

    Attributes:
        runs: one row per run, nested values under dotted names such as `final.test.success`.
        steps: one row per move, step 0 the start, such as `dev.value`, `signal.c1`, `cost.seconds`.
        scores: one row per final item of every split.
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    scores: pd.DataFrame

    @cached_property
    def main(self) -> Records:
        """The main comparison: every task but the stream, without the arms of the remaking study."""
        arms = np.array(
            [json.loads(s)["targets"] != RunConfig.targets for s in self.runs.settings], dtype=bool
        )
        return self._compared(self.runs[~arms & (self.runs.task != STREAM)])

    @cached_property
    def stream(self) -> Records:
        """The comparison on the stream of tasks."""
        return self._compared(self.runs[self.runs.task == STREAM])

    def _compared(self, runs: pd.DataFrame) -> Records:
        """Per task and backbone, the runs under the settings that most methods were run with.

        Ablations and sweeps change a setting for one or two methods and are left out by this.
        """
        keep: set[str] = set()
        for _, group in runs.groupby(["task", "backbone"]):
            tried = group.groupby("settings").agg(
                methods=("method", "nunique"), runs=("run_id", "size")
            )
            reference = (
                tried.reset_index().sort_values(["methods", "runs", "settings"]).settings.iloc[-1]
            )
            keep |= set(group.run_id[group.settings == reference])
        return Records(
            *(frame[frame.run_id.isin(keep)] for frame in (self.runs, self.steps, self.scores))
        )


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to dotted names; lists stay as they are."""
    flat = {}
    for key, inner in value.items():
        flat |= (
            flatten(inner, f"{prefix}{key}.")
            if isinstance(inner, dict)
            else {f"{prefix}{key}": inner}
        )
    return flat


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Row of the run, rows of its steps and of its scores; raises UserError when the record is damaged."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        config = asdict(RunConfig.of(run.pop("config")))
        settings = {name: value for name, value in config.items() if name not in IDENTITY}
        head = {
            "run_id": run["run_id"],
            **{n: config[n] for n in IDENTITY},
            "settings": json.dumps(settings),
        }
        lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [head | flatten(json.loads(line)) for line in lines]
        start, best = Prompt(**json.loads(lines[0])["prompt"]), Prompt(**run["best"]["prompt"])
        run["best"]["prompt_diff"] = [
            list(part) for part in diff(start.both, best.both)
        ]  # old records: system only
        with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
            scores = [
                head | row | {part: float(row[part]) for part in PARTS}
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f"the run record {folder.name} cannot be read ({type(error).__name__}: {error})."
        ) from error
    return head | flatten(run), steps, scores


def load(results: Path) -> Records:
    """All finished records of `<results>/records/`; empty frames when there are none."""
    folders = sorted(
        p.parent for p in results.glob("records/*/run.json") if p.parent.suffix != ".part"
    )
    rows, steps, scores = zip(*map(read_run, folders), strict=True) if folders else ((), (), ())
    moves = pd.DataFrame(list(chain(*steps)), columns=None if folders else [*HEAD, "step", "move"])
    return Records(
        pd.DataFrame(list(rows), columns=None if folders else HEAD),
        moves.astype(
            {name: float for name in moves if name.startswith("signal.")}
        ),  # null there: not known
        pd.DataFrame(
            list(chain(*scores)),
            columns=None if folders else [*HEAD, "split", "id", "need", *PARTS],
        ),
    )


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of TASKS, then backbones, then METHODS."""
    known = {name: i for names in (TASKS, METHODS) for i, name in enumerate(names)}
    columns = [c for c in ("task", "backbone", "method") if c in frame]
    key = lambda column: column.map(lambda name: (known.get(name, len(known)), name))  # noqa: E731
    return frame.sort_values(columns, key=key, kind="stable").reset_index(drop=True)


def estimate(values: pd.Series) -> stats.Interval:
    """Interval of the mean of values indexed by `seed` and anything else.

    Every estimate has a generator of its own with the same seed, so none depends on what was computed before it.
    """
    if values.empty:
        return stats.t_interval([])
    others = [name for name in values.index.names if name != "seed"]
    table = values.unstack(others) if others else values.to_frame()
    return stats.seed_interval(table.to_numpy(float), np.random.default_rng(0))


def estimates(values: pd.Series, by: Sequence[str]) -> pd.DataFrame:
    """One row per group of `by` (names of index levels): mean, low, high, half, n and kind."""
    rows = []
    for key, group in values.groupby(list(by)):
        interval = estimate(group)
        numbers = {
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "half": interval.half,
        }
        rows.append(
            {
                **dict(zip(by, key, strict=True)),
                **numbers,
                "n": interval.n,
                "interval": interval.kind,
            }
        )
    return in_order(
        pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "half", "n", "interval"])
    )


def success(records: Records, by: Sequence[str] = ("task", "backbone", "method")) -> pd.DataFrame:
    """Test success (content and style both right) of the main comparison, with intervals and the number of `rules`."""
    scores = records.main.scores
    test = scores[scores.split == "test"].set_index(UNIT)
    rules = test.reset_index().groupby(list(by)).rule.nunique().rename("rules")
    return estimates(test.success, by).merge(rules, on=list(by))


def paired(
    scores: pd.DataFrame,
    a: str,
    b: str,
    factor: str = "method",
    metric: str = "success",
    split: str = "test",
) -> pd.Series:
    """Differences a - b of a split's items, each pair alike in everything but `factor`; indexed by UNIT without it."""
    chosen = scores[(scores.split == split) & scores[factor].isin((a, b))]
    wide = chosen.pivot(
        index=[name for name in UNIT if name != factor], columns=factor, values=metric
    )
    return (wide.reindex(columns=[a, b])[a] - wide.reindex(columns=[a, b])[b]).dropna()


def gains(
    records: Records, methods: Sequence[str] = ("lora", "textgrad", "neurosymbolic")
) -> pd.DataFrame:
    """Gain in test success over the frozen backbone, paired by seed and item, per task, backbone and method."""
    scores, by = records.main.scores, ["task", "backbone", "method"]
    parts = [
        pd.concat({method: paired(scores, method, "frozen")}, names=["method"])
        for method in methods
    ]
    return estimates(pd.concat(parts), by)


def interaction(records: Records, task: str = "mixed") -> pd.DataFrame:
    """What each method gains and what it loses, per backbone: test success and shares that are kept.

    `row` names which. Locality and promptability hold only items that the frozen backbone gets right, so 1 means that
    nothing was forgotten.
    """
    scores = records.main.scores
    scores = scores[scores.task == task].set_index(UNIT)
    parts = {
        name: scores[scores.split == split][metric] for name, (split, metric) in MEASURES.items()
    }
    return by_measure(estimates(pd.concat(parts, names=["row"]), ["row", "backbone", "method"]))


def by_measure(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of MEASURES, which their column `row` names."""
    return frame.sort_values(
        "row", key=lambda row: row.map(list(MEASURES).index), kind="stable", ignore_index=True
    )


def progress(records: Records, task: str = "mixed") -> pd.DataFrame:
    """Per run and move: best dev reward so far, and tokens and seconds spent up to it.

    Tokens are those trained on and the editor's; `cost.editor_tokens` is a running total since before the run.
    A run that stopped early keeps its last values up to its budget of moves.
    """
    steps = records.main.steps
    names = ["backbone", "method", "seed", "rule", "move", "value", "tokens", "seconds"]
    rows = [pd.DataFrame(columns=names)]
    for _, run in steps[(steps.task == task) & (steps.method != "frozen")].groupby("run_id"):
        run, moves = run.set_index("step").sort_index(), json.loads(run.settings.iloc[0])["moves"]
        trained = (
            run.filter(items=["cost.train_tokens"]).sum(axis=1).cumsum()
        )  # absent if no run trained
        spent = {
            "value": run["dev.value"].cummax(),
            "tokens": trained + run["cost.editor_tokens"] - run["cost.editor_tokens"].iloc[0],
            "seconds": run["cost.seconds"].cumsum(),
        }
        rows.append(
            run[names[:4]]
            .assign(**spent)
            .reindex(range(moves + 1), method="ffill")
            .reset_index(names="move")
        )
    return in_order(pd.concat([row for row in rows if len(row)] or rows)[names])


def curves(records: Records, task: str = "mixed") -> pd.DataFrame:
    """Means over seeds of `progress` with intervals of the value, per backbone, method and move."""
    runs, by = progress(records, task), ["backbone", "method", "move"]
    values = estimates(runs.set_index([*by, "seed", "rule"]).value.astype(float), by)
    costs = runs.groupby(by)[["tokens", "seconds"]].mean().reset_index()
    return in_order(values.merge(costs, on=by))


def traces(records: Records, task: str = "mixed") -> pd.DataFrame:
    """Every move of one neurosymbolic run per backbone (its lowest seed), with its thresholds."""
    steps = records.main.steps
    steps = steps[(steps.task == task) & (steps.method == "neurosymbolic")].sort_values(
        ["seed", "run_id", "step"]
    )
    steps = steps[steps.run_id.isin(steps.groupby("backbone").run_id.first())]
    names = {
        "dev.value": "value",
        "dev.content": "content",
        "dev.style": "style",
        "cost.loss": "loss",
    }
    names |= {"signal.c1": "c1", "signal.c2": "c2", "signal.gain": "gain"}
    limits = pd.DataFrame(
        [json.loads(s) for s in steps.settings], index=steps.index, columns=["c1_eps", "c2_eps"]
    )
    frame = steps.rename(columns=names).reindex(
        columns=["run_id", "backbone", "step", "move", *names.values()]
    )
    return frame.join(limits).sort_values(["backbone", "step"]).reset_index(drop=True)


def diffs(records: Records, task: str = "mixed") -> pd.DataFrame:
    """Diff tokens (op, token) of both prompt texts, of the first neurosymbolic run per backbone that changed one."""
    runs = records.main.runs
    runs = runs[(runs.task == task) & (runs.method == "neurosymbolic")].sort_values(
        ["backbone", "seed", "run_id"]
    )
    columns = ["run_id", "backbone", "rule", "seed"]
    rows, seen = [], set()
    for run in runs.to_dict("records"):
        if run["backbone"] not in seen and any(op != "=" for op, _ in run["best.prompt_diff"]):
            seen.add(run["backbone"])
            rows += [(*(run[name] for name in columns), *part) for part in run["best.prompt_diff"]]
    return pd.DataFrame(rows, columns=[*columns, "op", "token"])
