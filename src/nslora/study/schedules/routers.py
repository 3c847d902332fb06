"""Routers to compare on the trees: fixed, decided, tuned, learned, looking ahead, and knowing the outcome.

Each is a function from trees to `ends`. What is tuned or learned is so on other instances (`folds`). A router that sees
nothing but the number of the move is a fixed schedule, so "best fixed" is that baseline too.
"""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from sklearn.tree import DecisionTreeClassifier

from nslora.algorithm.router import DECISIONS, Choice
from nslora.config import METHODS, RunConfig
from nslora.study.schedules.trees import (
    COSTS,
    NODE,
    Demand,
    Moves,
    Trees,
    chosen_on_dev,
    decided,
    hindsight,
    scored,
    walk,
)
from nslora.types import Move

# Thresholds among which the monitor's are chosen.
C1_EPS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6)
GAIN_EPS = (0.0, 0.02, 0.1, 0.5)
# What the learned router sees at a node, columns of `inner_nodes`.
FEATURES = (
    "moves",
    "kind",
    "c1",
    "c2",
    "gain",
    "rise",
    "fall",
    "content",
    "style",
    "dev",
    "follows",
)
# A tree of few leaves can be read, and learned from few instances.
TREE: dict[str, Any] = {"max_depth": 3, "min_samples_leaf": 0.05, "random_state": 0}

Fold = tuple[pd.Index, pd.Index]


# ---------------------------------------------------------------------------------------------- folds


def folds(instances: pd.DataFrame, by_family: bool = True) -> Iterator[Fold]:
    """Yield (instances to choose on, instances held out), every instance held out once.

    Test instances are held out together, where there are tuning ones to choose on; else a family of instances at a
    time, or one instance at a time where there is only one family, or if asked for.
    """
    tuning = instances[instances.split == "tuning"]
    for split, group in instances.groupby("split"):
        if split == "test" and len(tuning):
            yield tuning.index, group.index
            continue
        unit = group.family if by_family and group.family.nunique() > 1 else group.index
        for held_out in group.groupby(unit).groups.values():
            others = group.index.difference(held_out)
            if len(others):
                yield others, held_out


def chosen(values: pd.DataFrame, pairs: Iterator[Fold] | list[Fold]) -> pd.Series:
    """Return for each held-out instance the column with the highest mean over the fold's other instances.

    `values` is [instance, option]; the first of equal columns wins, and one that an instance lacks cannot win.
    """
    options = {}
    for others, held_out in pairs:
        means = values.loc[others].dropna(axis="columns").mean()
        if means.empty:
            continue
        # means of the same numbers in another order are equal
        best = means.index[np.isclose(means, means.max(), rtol=0, atol=1e-9)][0]
        options |= dict.fromkeys(held_out, best)
    return pd.Series(options, dtype=object)


def tuned(options: Mapping[str, pd.DataFrame], trees: Trees) -> pd.DataFrame:
    """Return the ends of the option that brings most on other instances; the reason names it."""
    named = pd.concat([ends.assign(option=name) for name, ends in options.items()])
    values = named.join(trees.nodes.test, on=NODE)
    values = values.pivot(index="instance", columns="option", values="test")[list(options)]
    best = chosen(values, folds(trees.instances)).rename("option").rename_axis("instance")
    ends = named.merge(best.reset_index(), on=["instance", "option"])
    return ends.assign(why=ends.option).drop(columns="option")


# ---------------------------------------------------------------------------------------------- without a look


def always(trees: Trees, letter: str) -> pd.DataFrame:
    """Return ends of one kind of move, whatever happens."""
    return walk(trees, lambda instance, schedule: (letter, ""))


def best_fixed(trees: Trees, value: str = "test") -> pd.DataFrame:
    """Return for each instance the schedule that is best on other instances, those of its own family too."""
    best = chosen(by_schedule(trees, value), folds(trees.instances, by_family=False))
    return ends_of(best)


def by_schedule(trees: Trees, value: str) -> pd.DataFrame:
    """Return a value of all nodes as [instance, schedule], shorter schedules first: they are cheaper."""
    values = trees.nodes[value].unstack("schedule")
    return values[sorted(values, key=lambda schedule: (len(schedule), schedule))]


def ends_of(schedules: pd.Series) -> pd.DataFrame:
    """Return ends of a schedule for each instance."""
    rows = schedules.rename_axis("instance").rename("schedule").reset_index()
    return rows.assign(weight=1.0, why="")


def best_on_backbone(trees: Trees) -> pd.DataFrame:
    """Return for each instance the schedule that is best on other instances of its backbone."""
    backbone = trees.instances.backbone
    return pd.concat([best_fixed(trees.where(backbone == name)) for name in backbone.unique()])


def begun(trees: Trees, first: str = "") -> pd.DataFrame:
    """Return every schedule of full depth (that begins with `first`), each with the same weight."""
    rows = [
        (instance, first + "".join(rest), 0.5 ** (depth - len(first)), "")
        for instance, depth in trees.instances.depth.items()
        for rest in product("NS", repeat=depth - len(first))
    ]
    return pd.DataFrame(rows, columns=[*NODE, "weight", "why"])


def plateau(first: str) -> Callable[[Moves, Any, RunConfig], str]:
    """Return a router that changes the kind of move when dev did not rise."""

    def router(moves: Moves, needs: Any, cfg: RunConfig) -> str:
        if not moves:
            return first
        before = moves[-2] if len(moves) > 1 else moves.start
        rose = dev_rank(moves[-1]) > dev_rank(before)
        numerical = moves[-1].move == Move.NUMERICAL
        return "N" if numerical == rose else "S"

    return router


def dev_rank(record: Any) -> tuple[float, float]:
    """Return what makes a candidate better on dev."""
    return record.dev["success"], record.dev["value"]


def tuned_plateau(trees: Trees) -> pd.DataFrame:
    """Return ends of `plateau`, its first move chosen on other instances."""
    return tuned({first: decided(plateau(first), trees) for first in "NS"}, trees)


# ---------------------------------------------------------------------------------------------- of the algorithm


def method(trees: Trees, name: str, **settings: Any) -> pd.DataFrame:
    """Return ends of a method of `config.METHODS`, with changed `settings`: its decision under the needs that it sees.

    Its moves are those of the tree, with the targets and inputs of the instance's settings.
    """
    row = METHODS[name]
    return decided(DECISIONS[row.decision], trees, row.needs, **settings)


def without_signal(trees: Trees) -> pd.DataFrame:
    """Return ends of `neurosymbolic` where weights are never saturated, and no edit's gain is too small."""
    depth = int(trees.instances.depth.max())
    # so many small signals in a row there never are
    return method(trees, "neurosymbolic", patience=depth + 1, gain_eps=0.0)


def without_needs(trees: Trees) -> pd.DataFrame:
    """Return ends of `neurosymbolic` where every example that fails counts as one of content and one of style."""

    def router(moves: Moves, needs: Any, cfg: RunConfig) -> Choice:
        # a move's demand is what failed before it
        before = [moves.start, *moves]
        seen = [
            replace(move, demand={"content": failing(record), "style": failing(record)})
            for record, move in zip(before, moves, strict=False)
        ]
        now = failing(before[-1])
        return DECISIONS[row.decision](seen, Demand(now, now, needs.follows), cfg)

    row = METHODS["neurosymbolic"]
    return decided(router, trees, row.needs)


def failing(record: Any) -> float:
    """Return the share of training examples that fail after a move."""
    return 1 - record.train["success"]


def tuned_monitor(trees: Trees) -> pd.DataFrame:
    """Return ends of the monitoring signal, its thresholds chosen on other instances."""
    decide = partial(decided, DECISIONS[METHODS["monitor"].decision], trees, "none")
    options = {
        f"c1_eps = {c1_eps}, gain_eps = {gain_eps}": decide(c1_eps=c1_eps, gain_eps=gain_eps)
        for c1_eps in C1_EPS
        for gain_eps in GAIN_EPS
    }
    return tuned(options, trees)


# ---------------------------------------------------------------------------------------------- learned


@lru_cache(maxsize=8)
def inner_nodes(trees: Trees, needs: str = "asked") -> pd.DataFrame:
    """Return every node with children, what can be seen at it, and what is best below each child.

    Columns: those of FEATURES: `kind` of the last move (N: 1, S: -1, start: 0), its signal, the `rise` of dev success
    and the `fall` of the gold answers' NLL on dev (nats per token) that it brought, shares of needs, dev success now,
    and how far the frozen backbone follows prompts; `below_N` and `below_S`, the best test success of a path through
    the child; `prefers`, their difference S - N.
    """
    nodes = trees.nodes.reset_index()
    best: dict[tuple[str, str], float] = {}
    # children come after their parents: what is best below a node is known when it is met
    for instance, schedule, test in nodes[[*NODE, "test"]].iloc[::-1].itertuples(index=False):
        below = [best.get((instance, schedule + letter), test) for letter in "NS"]
        best[instance, schedule] = max(test, *below)
    dev = trees.nodes[["dev.success", "dev_nll"]].astype(float)
    change = dev - dev.reindex(parents_of(dev.index)).to_numpy()
    frame = pd.DataFrame(
        {
            "instance": nodes.instance,
            "schedule": nodes.schedule,
            "moves": nodes.moves,
            "kind": nodes.schedule.str[-1:].map({"N": 1, "S": -1, "": 0}),
            "c1": nodes["signal.c1"],
            "c2": nodes["signal.c2"],
            "gain": nodes["signal.gain"],
            "rise": change["dev.success"].to_numpy(),
            "fall": -change["dev_nll"].to_numpy(),
            "content": nodes[f"needs.{needs}.content"],
            "style": nodes[f"needs.{needs}.style"],
            "dev": nodes["dev.success"],
        }
    )
    for letter in "NS":
        children = zip(nodes.instance, nodes.schedule + letter, strict=True)
        frame[f"below_{letter}"] = [best.get(child, np.nan) for child in children]
    frame["prefers"] = frame.below_S - frame.below_N
    inner = frame.dropna(subset="prefers")
    columns = ["family", "split", "backbone", "follows"]
    return inner.join(trees.instances[columns], on="instance").reset_index(drop=True)


def learned(trees: Trees) -> pd.DataFrame:
    """Return ends of a small decision tree on FEATURES, learned on other instances.

    It learns at which nodes the best path goes on with S, each node weighted by what the wrong move costs.
    """
    nodes = inner_nodes(trees)
    x = nodes[list(FEATURES)].astype(float)
    letters = {}
    for others, held_out in folds(trees.instances):
        matters = nodes.instance.isin(others) & (nodes.prefers.abs() > 1e-9)
        here = nodes.instance.isin(held_out)
        says_s = np.zeros(here.sum(), bool)
        if matters.any():
            model = DecisionTreeClassifier(**TREE)
            model.fit(x[matters], nodes.prefers[matters] > 0, nodes.prefers[matters].abs())
            says_s = model.predict(x[here])
        nodes_here = nodes.loc[here, NODE].itertuples(index=False, name=None)
        letters |= dict(zip(nodes_here, np.where(says_s, "S", "N"), strict=True))
    known = trees.where(trees.instances.index.isin([instance for instance, _ in letters]))
    return walk(known, lambda instance, schedule: (letters[instance, schedule], ""))


# ---------------------------------------------------------------------------------------------- paying for more


def lookahead(trees: Trees, times: int = 1) -> pd.DataFrame:
    """Return ends of a router that tries both moves and goes on with the better one on dev, the cheaper of equals.

    It pays for both. Its budget is `times` the depth of the tree, in moves.
    """
    keys = ["dev.success", "dev.value", *COSTS]
    nodes = dict(zip(trees.nodes.index, trees.nodes[keys].to_dict("records"), strict=True))
    rows = []
    for instance, depth in trees.instances.depth.items():
        schedule, extra = "", dict.fromkeys(COSTS, 0)
        for _ in range(min(depth, times * depth // 2)):
            here = nodes[instance, schedule]
            tried = {letter: nodes[instance, schedule + letter] for letter in "NS"}
            worse, better = sorted(
                (node["dev.success"], node["dev.value"], -node["tokens"], letter)
                for letter, node in tried.items()
            )
            given_up = tried[worse[-1]]
            extra = {name: extra[name] + given_up[name] - here[name] for name in COSTS}
            schedule += better[-1]
        end = nodes[instance, schedule]
        spent = [end[name] + extra[name] for name in COSTS]
        rows.append((instance, schedule, 1.0, "better on dev", *spent))
    return pd.DataFrame(rows, columns=[*NODE, "weight", "why", *COSTS])


def all_tried(trees: Trees) -> pd.DataFrame:
    """Return the best ends on dev, and the cost of the whole tree."""
    paths = trees.nodes[list(COSTS)]
    # of each move: its path without that of its parent; the start is its own parent
    moves = paths - paths.reindex(parents_of(trees.nodes.index)).to_numpy()
    whole = moves.groupby("instance").sum() + paths.xs("", level="schedule")
    return chosen_on_dev(trees).join(whole, on="instance")


def parents_of(nodes: pd.MultiIndex) -> pd.MultiIndex:
    """Return the parent of each node; the start is its own."""
    schedules = nodes.get_level_values("schedule").str[:-1]
    return pd.MultiIndex.from_arrays([nodes.get_level_values("instance"), schedules])


ROUTERS: dict[str, Callable[[Trees], pd.DataFrame]] = {
    "weights only": partial(always, letter="N"),
    "prompts only": partial(always, letter="S"),
    "best fixed": best_on_backbone,
    "coin": begun,
    "alternate": partial(method, name="alternate"),
    "dev plateau": tuned_plateau,
    "monitor": partial(method, name="monitor"),
    "monitor, tuned": tuned_monitor,
    "needs-only": partial(method, name="needs-only"),
    "numerical first": partial(method, name="numerical-first"),
    "neurosymbolic": partial(method, name="neurosymbolic"),
    "neurosymbolic, no signal": without_signal,
    "neurosymbolic, no needs": without_needs,
    # every backbone counts as one that follows
    "neurosymbolic, no following": partial(method, name="neurosymbolic", follows_floor=0.0),
    "learned": learned,
    "oracle needs": partial(method, name="oracle"),
    "lookahead": lookahead,
    "lookahead, 2 x moves": partial(lookahead, times=2),
    "all, best on dev": all_tried,
    "hindsight": hindsight,
}


@lru_cache(maxsize=128)
def ends_by(trees: Trees, name: str) -> pd.DataFrame:
    """Return the ends of a router of ROUTERS."""
    return ROUTERS[name](trees)


@lru_cache(maxsize=4)
def routed(trees: Trees, cost: str = "tokens") -> pd.DataFrame:
    """Return what every router of ROUTERS makes of every instance: `scored`, by `router`."""
    parts = [scored(trees, ends_by(trees, name), cost).assign(router=name) for name in ROUTERS]
    return pd.concat(parts, ignore_index=True)
