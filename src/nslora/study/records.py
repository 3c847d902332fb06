"""Finished run records as data frames, and the tidy frames of estimates that tables, figures and claims are made of."""

from __future__ import annotations

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from pandas import DataFrame

from nslora.config import METHODS, TASKS
from nslora.runs.store import COLUMNS, SCHEMA, missing_or_damaged, read_json, read_jsonl
from nslora.study import schedules, stats
from nslora.study.schedules import Trees
from nslora.study.stats import SHARE, Bounds
from nslora.types import Json, UserError

# The study whose instances are trees instead of runs.
SCHEDULES = "schedules"
# What helps where a record cannot be used.
REMEDY = "make its run again with `make reproduce`, or delete the folder to go on without it"
# The columns that every frame has. `instance` numbers what is the same task under the same settings: two methods of one
# study are compared where they share it.
IDENTITY = ["task", "rule", "backbone", "method", "seed"]
HEAD = ["run_id", "study", *IDENTITY, "instance"]
# What a method brings with it, and what a study varies by name: these settings make no other instance.
OF_METHOD = ("study", "method", "seed", "targets", "needs", "inputs")
# One graded item, whatever method answered it.
ITEM = ["task", "rule", "backbone", "seed", "instance", "id", "fact"]
PARTS = ["success", "value", "content", "content_strict", "style"]
# (split, metric) of what a run gains, and of what it keeps of the frozen backbone's abilities.
MEASURES = {
    "test success": ("test", "success"),
    "facts kept": ("locality", "content"),
    "instructions followed": ("promptability", "style"),
}
# Weights and prompt of the 2 x 2, by the split that scores them.
FACTORIAL = ("frozen+initial", "tuned+initial", "frozen+final", "tuned+final")
# Methods whose schedule is decided move by move.
DECIDING = ("random", "monitor", "needs-only", "numerical-first", "neurosymbolic", "oracle")
RUNS = [*HEAD, "schedule", "items", "targets", "bake", "editor.calls", "editor.replayed"]
MOVED = ["move", "reason", "dev.value", "dev.n", "bill.train_tokens", "bill.editor_tokens"]
STEPS = ["step", *MOVED, "clock.seconds", "signal.c1", "signal.c2", "signal.gain"]


@dataclass(frozen=True)
class Records:
    """All finished runs of a results folder; every frame has the columns HEAD.

    Attributes:
        runs: one row per run: its settings by name, everything else under dotted names (`final.test.success`).
        steps: one row per move, step 0 the start: `dev.value`, `signal.c1`, `bill.train_tokens`, `clock.seconds`, and
            what no method sees (`hidden.needs`).
        scores: one row per final item of every split.
        settings: names of the columns of `runs` that are settings.
        trees: all schedules of instances, which every results folder shares.
        missing: study and name of each run and tree that is registered for this folder and not made yet.
    """

    runs: DataFrame
    steps: DataFrame
    scores: DataFrame
    settings: tuple[str, ...] = ()
    trees: Trees = field(default_factory=Trees)
    missing: tuple[tuple[str, str], ...] = ()

    def of(self, study: str) -> Records:
        """Return the records of one study, such as "main"."""
        return self.where(self.runs.study == study)

    def where(self, chosen: pd.Series) -> Records:
        """Return the records of the runs that a boolean column of `runs` chooses."""
        runs = self.runs[chosen.astype(bool)]
        steps = self.steps[self.steps.run_id.isin(runs.run_id)]
        scores = self.scores[self.scores.run_id.isin(runs.run_id)]
        return replace(self, runs=runs, steps=steps, scores=scores)

    def with_settings(self, frame: DataFrame, *names: str) -> DataFrame:
        """Return steps or scores with settings of their runs as further columns."""
        columns = self.runs.reindex(columns=["run_id", *names])
        return frame.merge(columns, on="run_id", how="left")


def read_moves(folder: Path) -> list[Json]:
    """Read the moves of a run, each with its time (`clock`) and what no method sees (`hidden`)."""
    # by step, to which the other two files add
    steps = {row["step"]: row for row in read_jsonl(folder / "steps.jsonl")}
    for name in ("clock", "hidden"):
        for row in read_jsonl(folder / f"{name}.jsonl"):
            steps[row.pop("step")][name] = row
    return list(steps.values())


def read_scores(path: Path) -> DataFrame:
    """Read graded items; texts stay as they are, so a reply "NA" is a reply."""
    kinds = dict.fromkeys(COLUMNS, str) | dict.fromkeys(PARTS, float)
    return pd.read_csv(path, dtype=kinds, keep_default_na=False)[list(kinds)]


def read_run(folder: Path) -> tuple[Json, list[Json], DataFrame]:
    """Read one record: the run and its moves as they are in JSON, and its graded items.

    Raises UserError when a file is missing or damaged, or when the record was made under another schema.
    """
    if name := missing_or_damaged(folder):
        raise UserError(f"the run record {folder} has no {name}, or a damaged one: {REMEDY}.")
    try:
        run = read_json(folder / "run.json")
        schema = run.get("schema", 1)
        if schema != SCHEMA:
            raise UserError(f"the run record {folder} has schema {schema}, not {SCHEMA}: {REMEDY}.")
        # a damaged record lacks one of them
        _ = run["run_id"], run["study"], run["final"], run["best"]["prompt_diff"]
        _ = [run["config"][name] for name in IDENTITY]
        return run, read_moves(folder), read_scores(folder / "scores.csv")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the run record {folder} cannot be read ({type(error).__name__}: {error}): {REMEDY}."
        ) from error


def load(results: Path) -> Records:
    """Read all finished records of `<results>/records/`; empty frames when there are none.

    A folder that holds any file is a record, lest one that lost its run.json vanish; `.part` marks an unfinished copy.
    The trees are in the folder `schedules` beside `results`, and so is the pre-registration, if there is one.
    """
    folders = sorted(path for path in results.glob("records/*/") if path.suffix != ".part")
    records = read([folder for folder in folders if any(folder.iterdir())])
    trees = schedules.load(results.parent / "schedules")
    made = {*zip(records.runs.study, records.runs.run_id, strict=True)}
    made |= {(SCHEDULES, name) for name in trees.instances.index}
    missing = tuple(place for place in registered(results) if place not in made)
    return replace(records, trees=trees, missing=missing)


def registered(results: Path) -> list[tuple[str, str]]:
    """Return study and name of each run and tree that the pre-registration asks for, without those that were abandoned.

    Runs are those of a results folder, while every folder beside the trees shares them. Raises UserError where a file
    is damaged; whether it is as it was written is for `nslora verify` to say.
    """
    path = results.parent / "preregistration.toml"
    if not path.exists():
        return []
    abandoned = {row.get("abandoned") for row in amendments(results.parent)}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        bound = (path.parents[1] / content["results"]).resolve() == results.resolve()
        runs = [line.split() for line in content["studies"]] if bound else []
        places = [(study, name) for study, name in runs]
        places += [(SCHEDULES, name) for name in content["trees"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from git.") from None
    return [(study, name) for study, name in places if name not in abandoned]


def amendments(folder: Path) -> list[dict[str, str]]:
    """Return what was changed after a study was registered: rows of `date`, `why`, and `judge` or `abandoned`.

    `judge` is the hash of mended code that judges, `abandoned` a run or a tree that cannot be made. Raises UserError
    where the file is malformed.
    """
    path = folder / "amendments.toml"
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = tomllib.loads(text).get("amendments", [])
        for row in rows:
            _ = row["date"], row["why"]
            if not {"judge", "abandoned"} & row.keys():
                raise ValueError("a row without judge or abandoned")
        return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None


def read(folders: Sequence[Path]) -> Records:
    """Read the records in these folders."""
    records = [read_run(folder) for folder in folders]
    runs = pd.json_normalize([run for run, *_ in records])
    runs = runs.drop(columns="config.study", errors="ignore")
    # settings go by their bare names, all else under dotted ones
    settings = [name.removeprefix("config.") for name in runs if name.startswith("config.")]
    runs = runs.rename(columns=lambda name: name.removeprefix("config."))
    if records:
        instance = [name for name in settings if name not in OF_METHOD]
        runs["instance"] = runs[instance].astype(str).groupby(instance, sort=False).ngroup()
    runs = complete(runs, RUNS)
    moves = pd.json_normalize(
        [{"run_id": run["run_id"], **move} for run, moves, _ in records for move in moves]
    )
    # one frame of all items; texts are read as texts, so the types agree
    scores = [rows.assign(run_id=run["run_id"]) for run, _, rows in records]
    steps = complete(moves, ["run_id", *STEPS])
    # all under dotted names are numbers; null in JSON: no signal yet
    steps = steps.astype({name: float for name in STEPS if "." in name})
    items = complete(pd.concat(scores) if scores else DataFrame(), ["run_id", *COLUMNS])
    head = runs[HEAD]
    return Records(
        runs,
        head.merge(steps, on="run_id"),
        head.merge(items, on="run_id"),
        tuple(settings),
    )


def complete(frame: DataFrame, columns: Iterable[str]) -> DataFrame:
    """Return the frame with these columns first, those it lacks empty; a frame without rows has no types either."""
    frame = frame.reindex(columns=list(dict.fromkeys([*columns, *frame.columns])))
    return frame if len(frame) else frame.astype(object)


# ---------------------------------------------------------------------------------------------- estimates


def rank_of(name: str) -> tuple[int, str]:
    """Return the sort key of a task, a method or a backbone, by the order of TASKS and METHODS, then by name."""
    known = [*TASKS, *METHODS]
    stem = name.partition(":")[0]
    # what is neither a known task nor a method comes last, by its name
    return (known.index(stem) if stem in known else len(known), name)


def in_order(frame: DataFrame) -> DataFrame:
    """Sort rows by task, backbone and method, other rows staying in their order."""
    columns = [name for name in ("task", "backbone", "method") if name in frame]
    ordered = frame.sort_values(columns, key=lambda names: names.map(rank_of), kind="stable")
    return ordered.reset_index(drop=True)


def estimate(values: DataFrame, bounds: Bounds = SHARE) -> stats.Interval:
    """Return the interval of the mean of seed means of the column `value`.

    The floor of its variance comes from items where the frame has a column `fact`, and from a column `variance` (the
    sampling variance of each value) where values are of whole runs.
    """
    values = values.dropna(subset="value")
    if values.empty:
        return stats.seed_interval([], bounds=bounds)
    shown = values.value.astype(float)
    means = shown.groupby(values.seed).mean()
    floor = 0.0
    if "fact" in values:
        floor = stats.item_variance(shown, values.seed, values.fact, bounds)
    elif "variance" in values:
        # of a seed's mean over its runs, then of the mean over all seeds
        runs = values.groupby("seed").variance
        floor = (runs.mean() / runs.size()).sum() / len(means) ** 2
    return stats.seed_interval(means, floor, bounds)


def estimates(frame: DataFrame, by: Sequence[str], bounds: Bounds = SHARE) -> DataFrame:
    """Return one row per group of the columns `by`: mean, low, high and n (seeds)."""
    groups = frame.groupby(list(by))
    rows = [(*key, *estimate(group, bounds).row) for key, group in groups]
    return in_order(DataFrame(rows, columns=[*by, *stats.ROW]))


def until_budget(steps: DataFrame, by: Sequence[str], columns: Sequence[str]) -> DataFrame:
    """Return columns of each group's steps by `move`, from 0 to its run's budget (`moves`).

    A run that stopped early keeps its last values.
    """
    rows = [DataFrame(columns=[*columns, "move"])]
    for _, group in steps.groupby(list(by)):
        budget = range(group.moves.iloc[0] + 1)
        # [move] of the steps made, then of all
        spent = group[list(columns)].reset_index(drop=True).reindex(budget, method="ffill")
        rows.append(spent.reset_index(names="move"))
    return pd.concat(rows[1:] or rows, ignore_index=True)


def graded(
    records: Records, split: str = "test", metric: str = "success", task: str = ""
) -> DataFrame:
    """Return the graded items of a split (of one task, if named), the metric as the column `value`."""
    scores = records.scores
    rows = scores[(scores.split == split) & ((scores.task == task) | (task == ""))]
    return rows.assign(value=rows[metric])


def paired(scores: DataFrame, a: str, b: str, factor: str = "method") -> DataFrame:
    """Return differences a - b of test success per item as `value`, each pair alike in everything but `factor`."""
    chosen = scores[(scores.split == "test") & scores[factor].isin((a, b))]
    index = ITEM if factor == "method" else [*ITEM, "method"]
    wide = chosen.pivot(index=index, columns=factor, values="success")
    # an item that either lacks is left out
    wide = wide.reindex(columns=[a, b]).astype(float)
    return (wide[a] - wide[b]).dropna().rename("value").reset_index()


# ---------------------------------------------------------------------------------------------- the main comparison


def success(records: Records) -> DataFrame:
    """Return test success (content and style both right) with intervals, and the number of `rules` behind each."""
    by = ["task", "backbone", "method"]
    test = graded(records.of("main"))
    # a mean over fewer rules than another method's is marked in the table
    rules = test.groupby(by).rule.nunique().rename("rules")
    return estimates(test, by).merge(rules, on=by)


def by_rule(records: Records) -> DataFrame:
    """Return test success on style per rule, backbone and method."""
    items = graded(records.of("main"), task="style")
    return estimates(items, ["rule", "backbone", "method"])


def interaction(records: Records, task: str = "mixed") -> DataFrame:
    """Return what each method gains and what it loses, per backbone: a `row` for each of MEASURES.

    Locality and promptability hold only items that the frozen backbone gets right, so 1 means that nothing was
    forgotten.
    """
    main = records.of("main")
    parts = [
        estimates(graded(main, *measure, task), ["backbone", "method"]).assign(row=row)
        for row, measure in MEASURES.items()
    ]
    return pd.concat(parts, ignore_index=True)


def factorial(records: Records) -> DataFrame:
    """Return test success of {frozen, tuned} weights x {initial, final} prompt on mixed, by `cell`."""
    scores = records.of("main").scores
    scores = scores[(scores.task == "mixed") & scores.split.isin(FACTORIAL)]
    cells = scores.assign(value=scores.success, cell=scores.split)
    table = estimates(cells, ["cell", "backbone", "method"])
    return table.sort_values("cell", key=lambda cell: cell.map(FACTORIAL.index), kind="stable")


def by_need(records: Records) -> DataFrame:
    """Return test success on mixed per backbone, method and hidden `need`."""
    items = graded(records.of("main"), task="mixed")
    return estimates(items, ["need", "backbone", "method"])


def ceilings(records: Records) -> DataFrame:
    """Return the best that a pure method can reach by construction, as rows like those of `success`.

    Bare gold answers bring no style and a prompt brings no new fact, so each reaches the items without the other need.
    """
    test = graded(records.of("main"))
    shares = test.groupby(["task", "backbone"]).need.value_counts(normalize=True).unstack()
    # tasks with one need have no ceiling worth a row
    shares = shares[shares.count(axis=1) > 1].reindex(columns=["content", "style"]).fillna(0.0)
    shares.columns = ["ceiling of gold answers", "ceiling of prompts"]
    table = shares.melt(var_name="method", value_name="mean", ignore_index=False)
    return table.reset_index()[["task", "backbone", "method", "mean"]]


def counted(names: Iterable[str]) -> str:
    """Return what occurs and how often, the most frequent first, as "NNSN (2), SN (1)"."""
    return ", ".join(f"{name or 'none'} ({n})" for name, n in Counter(names).most_common())


def decided(records: Records) -> DataFrame:
    """Return what decided: per task, backbone and deciding method the schedules made and the reasons of all moves."""
    main = records.of("main")
    main = main.where(main.runs.method.isin(DECIDING))
    by = ["task", "backbone", "method"]
    if main.runs.empty:
        return DataFrame(columns=[*by, "runs", "schedules", "reasons"])
    # per run its schedule, per move its reason
    made = main.runs.groupby(by).schedule.agg(["size", counted])
    made = made.set_axis(["runs", "schedules"], axis=1)
    moves = main.steps[main.steps.move != "start"]
    reasons = moves.groupby(by).reason.agg(counted).rename("reasons")
    return in_order(made.join(reasons).fillna("").reset_index())
