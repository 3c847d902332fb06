"""All schedules of an instance as one tree of moves, read from the data set and walked by any router.

An instance is a task, a backbone and a seed; a node is a schedule, a string of N (numerical) and S (symbolic) moves,
"" the start. A run that ends at a node returns the best node on dev along its path, as `loop.best` has it. `ends` are
frames of where runs end: columns instance, schedule, and `weight`, which sums to 1 per instance.
"""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nslora.algorithm.router import Choice
from nslora.config import RunConfig
from nslora.disk import SEAL, unsealed
from nslora.runs.store import read_json, read_jsonl
from nslora.study import stats
from nslora.study.stats import DIFFERENCE, Bounds
from nslora.types import LETTERS, Move, Prompt, Signal, StepRecord, UserError

SCHEMA = 1
NODE = ["instance", "schedule"]
INSTANCE = ["family", "split", "backbone", "task", "seed", "depth", "follows"]
NEEDS = ("content", "style", "both")
# What is spent, of which a move's bill counts tokens.
COSTS = ("moves", "tokens", "seconds")
TOKENS = ("train_tokens", "generated_tokens", "editor_tokens")
# What the other modules read of a node, so that an empty data set has it too.
NODES = [*NODE, "returned", "right", "test", "dev", "dev_value", "retention", "retained", *COSTS]
NAMES = {move: letter for letter, move in LETTERS.items()} | {Move.STOP: "stop"}


@dataclass(frozen=True, eq=False)
class Trees:
    """Finished trees as two frames.

    Attributes:
        instances: by `instance`: `family`, `split` ("tuning" or "test"), `backbone`, `task`, `seed`, `depth` (moves);
            shares of items by need (`content`, `style`, `both`); the share of instructions that the frozen backbone
            `follows`; how many questions that it gets right are asked again (`known`); its settings (`config`) and the
            number of the cluster of each test item (`facts`).
        nodes: by (`instance`, `schedule`), parents first. The record under dotted names (`dev.success`, `signal.c1`,
            `needs.asked.style`), and of a run that ends here: the node `returned`, its scores on `test` and `dev`, its
            test items as 0 and 1 (`right`), test success times what was `retained`, and `moves`, `tokens` and `seconds`
            of the whole path.
        unfinished: instances with missing nodes, which are left out.
    """

    instances: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(
            columns=[*INSTANCE, *NEEDS, "config", "facts", "known"]
        )
    )
    nodes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=NODES).set_index(NODE))
    unfinished: tuple[str, ...] = ()

    def where(self, chosen: pd.Series) -> Trees:
        """Return the trees of the instances that a boolean column of `instances` chooses."""
        instances = self.instances[chosen.astype(bool)]
        kept = self.nodes.index.isin(instances.index, level="instance")
        return Trees(instances, self.nodes[kept], self.unfinished)

    def cut(self, depth: int) -> Trees:
        """Return the trees with at most `depth` moves."""
        instances = self.instances.assign(depth=self.instances.depth.clip(upper=depth))
        return Trees(instances, self.nodes[self.nodes.moves <= depth], self.unfinished)


# ---------------------------------------------------------------------------------------------- the data set


def load(folder: Path | str | None = None, split: str | None = None) -> Trees:
    """Read the trees of a folder (results/schedules by default), of one split if named; none is no error.

    Raises UserError where a file is damaged or of another schema.
    """
    folder = Path("results/schedules" if folder is None else folder)
    instances, nodes, unfinished = [], [], []
    for path in sorted(folder.glob("*/instance.json")):
        instance, rows = read(path.parent)
        if split not in (None, instance["split"]):
            continue
        if len(rows) < 2 ** (instance["depth"] + 1) - 1:
            unfinished.append(instance["instance"])
            continue
        nodes += [{"instance": instance["instance"], **row} for row in along_paths(rows)]
        instances.append(tidy_instance(instance))
    if not instances:
        return Trees(unfinished=tuple(unfinished))
    frame = pd.DataFrame(nodes)
    # all under dotted names are numbers; null in JSON: not known
    frame = frame.astype({name: float for name in frame if "." in name})
    rows = pd.DataFrame(instances).set_index("instance")
    return Trees(rows, frame.set_index(NODE), tuple(unfinished))


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read one tree, its nodes in the order of length and letters; raises UserError when it is damaged."""
    try:
        instance = read_json(folder / "instance.json")
        if instance["schema"] != SCHEMA:
            raise UserError(f"the tree {folder} has schema {instance['schema']}, not {SCHEMA}.")
        if instance["instance"] != folder.name:
            raise UserError(f"the tree {folder} is of {instance['instance']}: one folder per tree.")
        path = folder / "nodes.jsonl"
        nodes = read_jsonl(path) if path.exists() else []
        # trees of before have no checksums at all
        if any(SEAL in part for part in (instance, *nodes)):
            instance, *nodes = map(unsealed, (instance, *nodes))
        rows = {row["schedule"]: row for row in nodes}
        rows = [rows.pop(schedule) for schedule in schedules(instance["depth"]) if schedule in rows]
        if {len(row["test_items"]) for row in rows} - {len(instance["facts"])}:
            raise UserError(f"the nodes of {folder} have different numbers of test items.")
        return instance, rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the tree {folder} cannot be read ({type(error).__name__}: {error}): "
            "grow it again with `nslora schedules`, which makes damaged nodes anew, or delete it."
        ) from error


def schedules(depth: int) -> list[str]:
    """Return all schedules of at most `depth` moves, the shortest first, then by letters."""
    return ["".join(moves) for length in range(depth + 1) for moves in product("NS", repeat=length)]


def tidy_instance(instance: dict[str, Any]) -> dict[str, Any]:
    """Return an instance as a row of `Trees.instances`."""
    config = instance["config"]
    return {
        **{name: instance[name] for name in ("instance", "split", "depth", "follows", "config")},
        **{name: config[name] for name in ("backbone", "task", "seed")},
        **{need: instance["shares"].get(need, 0.0) for need in NEEDS},
        "family": instance.get("family") or family(config),
        "facts": pd.factorize(np.array(instance["facts"]))[0],
        # trees of before do not say it
        "known": instance.get("abilities", {}).get("locality", 0),
    }


def family(config: dict[str, Any]) -> str:
    """Return what instances of other seeds, backbones and sizes share: the task, its mix of needs, and its rule."""
    task = config["task"]
    parts = {"mixed": ("mix", "rule"), "style": ("rule",), "stream": ("rule",), "math": ("tier",)}
    return " ".join([task, *(str(config[name]) for name in parts.get(task, ()))])


def along_paths(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return nodes as flat rows, with what a run that ends there returns and what its whole path costs."""
    # by schedule; parents come before their children
    nodes: dict[str, dict[str, Any]] = {}
    for row in rows:
        node = flat(row)
        parent = nodes.get(row["schedule"][:-1])
        best = nodes[parent["returned"]] if parent else node
        # of equals the earliest
        if rank(node) > rank(best):
            best = node
        kept = [best[name] for name in ("locality", "promptability") if best[name] is not None]
        retention = float(np.mean(kept)) if kept else np.nan
        nodes[row["schedule"]] = node | {
            "returned": best["schedule"],
            "right": best["test_items"],
            "test": best["test.success"],
            "dev": best["dev.success"],
            "dev_value": best["dev.value"],
            "retained": best["test.success"] * retention,
            "retention": retention,
            "moves": len(row["schedule"]),
            "tokens": spent(row) + (parent["tokens"] if parent else 0),
            "seconds": row["seconds"] + (parent["seconds"] if parent else 0.0),
        }
    return list(nodes.values())


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a node with its numbers under dotted names; prompt and evidence stay as they are."""
    kept = {name: row.get(name) for name in ("prompt", "evidence", "bill")}
    others = {name: value for name, value in row.items() if name not in (*kept, "facts", "seconds")}
    return flattened(others) | kept


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    leaves = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        leaves |= flattened(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return leaves


def rank(node: dict[str, Any]) -> tuple[float, float]:
    """Return what makes a node the best on dev."""
    return node["dev.success"], node["dev.value"]


def spent(row: dict[str, Any]) -> float:
    """Return the tokens of the move that led to a node: trained, generated, and the editor's."""
    bill = row.get("bill") or {}
    return sum(bill.get(name, 0) for name in TOKENS)


# ---------------------------------------------------------------------------------------------- walking


class Moves(tuple[StepRecord, ...]):
    """The moves so far, as a decision of the algorithm sees them; `start` is the record they began from."""

    start: StepRecord


class Demand(NamedTuple):
    """Shares of training examples that fail and need content, or style; and of told rules that are obeyed."""

    content: float
    style: float
    follows: float | None = None


# A move, or N, S or stop: what algorithm/router.py decides, from the moves so far, the needs and the settings.
Router = Callable[[Moves, Any, RunConfig], Choice | str]
# The next letter (or "stop") at a node, and why.
Decide = Callable[[str, str], tuple[str, str]]


def route(
    router: Router, trees: Trees, needs: str = "asked", cost: str = "tokens", **settings: Any
) -> pd.DataFrame:
    """Let a router decide at every node it comes to; return what it made of each instance, one row each.

    Args:
        router: any decision of `algorithm.router`, or a function like one that returns N, S or stop.
        needs: the estimator whose needs the router sees; "none" for none.
        cost: what "equal cost" means: moves, tokens or seconds.
        settings: changes to the settings of the instances, such as `c1_eps=0.2`.

    Returns the columns of `scored`.
    """
    return scored(trees, decided(router, trees, needs, **settings), cost)


def decided(router: Router, trees: Trees, needs: str = "asked", **settings: Any) -> pd.DataFrame:
    """Return where a router ends (`walk`); see `route`."""
    if trees.instances.empty:
        raise UserError("there are no finished trees of schedules to route on.")
    histories, demands = histories_of(trees, needs)
    rows = trees.instances[["config", "depth"]].itertuples()
    configs = {
        row.Index: RunConfig.of({**row.config, "moves": row.depth, **settings}) for row in rows
    }

    def decide(instance: str, schedule: str) -> tuple[str, str]:
        node = (instance, schedule)
        choice = router(histories[node], demands[node], configs[instance])
        move, why = choice if isinstance(choice, Choice) else (choice, "")
        return NAMES.get(move, move), why

    return walk(trees, decide)


def walk(trees: Trees, decide: Decide) -> pd.DataFrame:
    """Follow decisions from the start to where they stop, or to the full depth; return `ends` with the reasons."""
    rows = []
    for instance, depth in trees.instances.depth.items():
        schedule, reasons = "", []
        while len(schedule) < depth:
            letter, why = decide(instance, schedule)
            reasons.append(why)
            if letter == "stop":
                break
            if letter not in ("N", "S"):
                raise UserError(f"a router has to choose N, S or stop, not {letter!r}.")
            schedule += letter
        rows.append((instance, schedule, 1.0, "; ".join(filter(None, reasons))))
    return pd.DataFrame(rows, columns=[*NODE, "weight", "why"])


@lru_cache(maxsize=8)
def histories_of(
    trees: Trees, needs: str
) -> tuple[dict[tuple[str, str], Moves], dict[tuple[str, str], Demand]]:
    """Return by node the moves up to it, and the needs that a decision there sees; raises UserError."""
    nodes = trees.nodes
    names = [f"needs.{needs}.{need}" for need in ("content", "style")]
    if needs == "none":
        nodes = nodes.assign(**dict.fromkeys(names, 0.0))
    elif missing := set(names) - set(nodes):
        raise UserError(f"no {min(missing)} in the trees: its estimator of needs was not recorded.")
    shares = nodes[names].itertuples(index=False, name=None)
    follows = trees.instances.follows.to_dict()
    demands = {
        node: Demand(*pair, None if needs == "none" else follows[node[0]])
        for node, pair in zip(nodes.index, shares, strict=True)
    }
    histories: dict[tuple[str, str], Moves] = {}
    for (instance, schedule), row in zip(nodes.index, nodes.to_dict("records"), strict=True):
        parent = (instance, schedule[:-1])
        # what was estimated before the move, where somebody can tell
        before = demands[parent] if schedule and needs != "none" else None
        seen = {"content": before.content, "style": before.style} if before else {}
        record = step(schedule, row, seen)
        before = histories[parent] if schedule else Moves()
        histories[instance, schedule] = moves = Moves([*before, record] if schedule else ())
        moves.start = before.start if schedule else record
    return histories, demands


def step(schedule: str, node: dict[str, Any], demand: dict[str, float]) -> StepRecord:
    """Return a node as the record that the loop made of its move."""
    signal = {name: known(node[f"signal.{name}"]) for name in ("c1", "c2", "gain")}
    splits = {
        split: {name: node[f"{split}.{name}"] for name in ("success", "value", "n")}
        for split in ("dev", "train")
    }
    kinds = {"": "start"} | {letter: move.value for letter, move in LETTERS.items()}
    return StepRecord(
        step=len(schedule),
        move=kinds[schedule[-1:]],
        reason="",
        prompt=Prompt(**node["prompt"]),
        adapter=schedule if "N" in schedule else None,
        signal=Signal(**signal),
        demand=demand,
        evidence=node["evidence"] or {},
        bill=node["bill"] or {},
        **splits,
    )


def known(value: float) -> float | None:
    """Return None for what pandas made NaN of."""
    return None if np.isnan(value) else value


# ---------------------------------------------------------------------------------------------- scoring


def highest(nodes: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the nodes of each instance with the highest values of columns, the first deciding first.

    Of equals those with the fewest moves; where several are left, each with the same weight, so that the order of
    letters favours none.
    """
    ends = nodes[["moves", *columns]].reset_index()
    ends["moves"] = -ends.moves
    for name in (*columns, "moves"):
        most = ends.groupby("instance")[name].transform("max")
        ends = ends[np.isclose(ends[name], most, rtol=0, atol=1e-9)]
    size = ends.groupby("instance").schedule.transform("size")
    return ends[NODE].assign(weight=1 / size, why="")


@lru_cache(maxsize=8)
def hindsight(trees: Trees, value: str = "test") -> pd.DataFrame:
    """Return the best ends on test, which nobody can choose: what regret is measured from."""
    return highest(trees.nodes, value)


@lru_cache(maxsize=8)
def chosen_on_dev(trees: Trees, first: str = "") -> pd.DataFrame:
    """Return the best ends on dev of all schedules (that begin with `first`): chosen without test.

    It pays for the whole tree.
    """
    nodes = trees.nodes
    begun = nodes.index.get_level_values("schedule").str.startswith(first)
    return highest(nodes[begun], "dev", "dev_value")


def scored(trees: Trees, ends: pd.DataFrame, cost: str = "tokens") -> pd.DataFrame:
    """Return ends with what their runs return, cost, and lose.

    Columns: those of `ends`, with what is spent (COSTS) as it is where the frame has it already; family, split,
    backbone and seed of the instance; `returned`, `test`, `retained` and `dev` of `Trees.nodes`; and three regrets, in
    test success: `regret` to the best path in hindsight, `regret_cost` to the best that costs no more (`affordable`),
    and `regret_dev` to the best chosen on dev.
    """
    columns = ["returned", "test", "retained", "dev", *COSTS]
    rows = ends.join(trees.nodes[[name for name in columns if name not in ends]], on=NODE)
    rows = rows.join(trees.instances[["family", "split", "backbone", "seed"]], on="instance")
    best = trees.nodes.test.groupby("instance").max()
    on_dev = chosen_on_dev(trees).join(trees.nodes.test, on=NODE)
    on_dev = (on_dev.test * on_dev.weight).groupby(on_dev.instance).sum()
    # arrays from here on: per instance its nodes
    nodes = {
        name: (group.index, group[cost].to_numpy(float), group.test.to_numpy(float))
        for name, group in trees.nodes.groupby("instance")
    }
    affordable = []
    for instance, spent in zip(rows.instance, rows[cost], strict=True):
        index, costs, tests = nodes[instance]
        affordable.append(index[np.where(costs <= spent + 1e-9, tests, -1.0).argmax()])
    return rows.assign(
        affordable=[schedule for _, schedule in affordable],
        regret=best.reindex(rows.instance).to_numpy(float) - rows.test,
        regret_cost=trees.nodes.test.reindex(affordable).to_numpy(float) - rows.test,
        regret_dev=on_dev.reindex(rows.instance).to_numpy(float) - rows.test,
    )


def difference(
    trees: Trees,
    ends: pd.DataFrame,
    others: pd.DataFrame | None = None,
    retained: bool = False,
    bounds: Bounds = DIFFERENCE,
) -> pd.DataFrame:
    """Return test success of ends, or ends minus others, per instance that both have, for `records.estimate`.

    Columns: instance, family, split, backbone, `seed` (a number per instance, the unit of the interval), `value`, and
    the `variance` that the choice of test items brings. With `retained`, success is multiplied by what is retained.
    """
    items = item_means(trees, ends, retained)
    if others is not None:
        theirs = item_means(trees, others, retained)
        items = {name: items[name] - theirs[name] for name in items if name in theirs}
    about = trees.instances[["family", "split", "backbone", "facts"]]
    rows = []
    for number, (name, *place, facts) in enumerate(about.itertuples(name=None)):
        right_I = items.get(name)
        # success that was not measured, as where no retention was, is no value
        if right_I is not None and not np.isnan(right_I).any():
            variance = stats.item_variance(right_I, np.zeros(len(right_I)), facts, bounds)
            rows.append((name, *place, number, float(right_I.mean()), variance))
    columns = ["instance", "family", "split", "backbone", "seed", "value", "variance"]
    return pd.DataFrame(rows, columns=columns)


def item_means(trees: Trees, ends: pd.DataFrame, retained: bool) -> dict[str, np.ndarray]:
    """Return by instance [I] how often each test item is right, over the weights of the ends."""
    right = right_of(trees, retained)
    means: dict[str, np.ndarray] = {}
    for instance, schedule, weight in zip(ends.instance, ends.schedule, ends.weight, strict=True):
        means[instance] = means.get(instance, 0.0) + weight * right[instance, schedule]
    return means


@lru_cache(maxsize=8)
def right_of(trees: Trees, retained: bool) -> dict[tuple[str, str], np.ndarray]:
    """Return by node [I] which test items a run that ends there gets right, times what is retained if asked."""
    right = {}
    for node, items, retention in trees.nodes[["right", "retention"]].itertuples(name=None):
        right_I = np.frombuffer(items.encode(), np.uint8) - ord("0")
        right[node] = right_I * retention if retained else right_I
    return right


def disagreements(trees: Trees) -> list[str]:
    """Return where a node's test success and its test items disagree, one sentence each."""
    said = []
    for (instance, schedule), node in zip(
        trees.nodes.index, trees.nodes.to_dict("records"), strict=True
    ):
        share = node["test_items"].count("1") / len(node["test_items"])
        # `not <=`, so that a missing number is a disagreement
        if not abs(share - node["test.success"]) <= 1e-6:
            said.append(f"{instance}: test success and test items disagree at {schedule!r}.")
    return said
