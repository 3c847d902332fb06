"""Is remade data worth reusing? Success on math by number of problems and by what weights are trained on. No torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import seaborn as sns
from matplotlib.figure import Figure
from pandas import DataFrame

from nslora.runs.store import read_jsonl, write_text
from nslora.study.figures import (
    BLUE,
    GREEN,
    INTERVAL,
    ORANGE,
    PAGE,
    in_percent,
    legend_outside,
    panels,
    spread,
    styled,
)
from nslora.study.records import REMEDY, Records, estimates, graded
from nslora.types import Json, UserError

# `targets` of the study's runs in the order of the legend: what is trained on, colour, line.
ARMS = {
    "gold": ("bare results", BLUE, "-"),
    "duplicated": ("bare results, each twice", BLUE, ":"),
    "verified": ("own verified working", GREEN, "-"),
    "both": ("both", GREEN, ":"),
    "unverified": ("own working, right or wrong", ORANGE, "-"),
}
STUDY = "data-efficiency"
# rows of a file: no file of the data set should be large
SHARD = 500

CARD = """\
---
license: apache-2.0
language: en
configs:
- config_name: default
  data_files: train-*.jsonl
---

# Remade training pairs

{total} questions with answers that a model gave under a refined prompt (`remade`) or that the external LLM rewrote
(`rewritten`), each verified by a reward that checks content and style. They were made by the runs of the grid while
adapting small models to invented facts and style rules; nothing in them is about real people.

{counted}

Fields: `question`, `answer`; `system` and `template`, the prompt under which the pair is trained; `parent`, the item
that the answer was made for; `source`; `backbone`; `reward`; `run`, the record that holds everything else;
`prompt_diff`, what the run had changed of the start's prompt, as (op, token).

To load: `datasets.load_dataset("json", data_files="train-*.jsonl")`. Do not test on the runs' own items: facts of a
seed occur here in the wordings of its training split.
"""


def arms(records: Records) -> Records:
    """Return the runs of the study on math in its arms."""
    study = records.of(STUDY)
    return study.where((study.runs.task == "math") & study.runs.targets.isin(list(ARMS)))


def efficiency(records: Records) -> DataFrame:
    """Return test success on math per backbone, arm (`targets`) and number of training problems (`items`)."""
    test = records.with_settings(graded(arms(records)), "targets", "items")
    return estimates(test, ["backbone", "targets", "items"])


def counts(records: Records) -> DataFrame:
    """Return the mean number of training pairs per source and numerical move, by backbone, arm and items."""
    by = ["backbone", "targets", "items"]
    if records.of(STUDY).runs.empty:
        return DataFrame(columns=by)
    steps = arms(records).steps
    steps = records.with_settings(steps[steps.move == "numerical"], "targets", "items")
    pairs = steps.filter(like="evidence.pairs.").dropna(axis="columns", how="all").fillna(0)
    pairs = pairs.rename(columns=lambda name: name.removeprefix("evidence.pairs."))
    return steps[by].join(pairs).groupby(by).mean().reset_index()


def baking(records: Records) -> DataFrame:
    """Return test success on style per backbone, rule and `arm`: what is left of a refined prompt in weights.

    Arms: nothing (frozen), the prompt alone (textgrad, with all of its moves), both of the main study; and weights
    after one symbolic and one numerical move, tuned and used under the refined prompt or, on the same replies, under
    the start prompt (setting `bake`).
    """
    main, baked = records.of("main").runs, records.of("baking").runs
    # of the main study, what was run where something was baked
    shared = main.merge(baked[["task", "rule", "backbone"]].drop_duplicates())
    used = {"frozen": "nothing", "textgrad": "prompt"}
    made = {False: "prompt and weights", True: "weights"}
    # the arm of each run
    arm_of = {
        **shared.set_index("run_id").method.map(used),
        **baked.set_index("run_id").bake.map(made),
    }
    test = graded(records, task="style")
    test = test.assign(arm=test.run_id.map(arm_of)).dropna(subset="arm")
    table = estimates(test, ["backbone", "rule", "arm"])
    # stable: first by arm, then by what holds the arms
    order = [*used.values(), *made.values()]
    table = table.sort_values("arm", key=lambda arm: arm.map(order.index))
    return table.sort_values(["backbone", "rule"], kind="stable", ignore_index=True)


@styled
def data_efficiency(frame: DataFrame) -> Figure:
    """Draw test success against the number of training problems (`efficiency`), a line per arm."""
    words = {arm: name for arm, (name, *_) in ARMS.items() if arm in set(frame.targets)}
    shown = frame.assign(arm=frame.targets.map(words)).sort_values("items", ignore_index=True)
    size = (min(PAGE, 2.2 + 2.4 * frame.backbone.nunique()), 2.9)
    fig = Figure(figsize=size)
    look = {
        "hue_order": list(words.values()),
        "palette": {name: colour for name, colour, _ in ARMS.values()},
        "linestyles": [ARMS[arm][2] for arm in words],
        # beside each other, so that intervals can be told apart
        "dodge": 0.3 if len(words) > 1 else False,
        "markersize": 3,
        "linewidth": 1.2,
    }
    for ax, here in panels(fig, shown, column="backbone", sharey=True):
        sns.pointplot(
            spread(here),
            x="items",
            y="share",
            hue="arm",
            ax=ax,
            **INTERVAL,
            **look,
        )
        in_percent(ax.yaxis)
        ax.set_ylim(0, max(0.1, ax.get_ylim()[1]))
    legend_outside(fig, columns=2)
    fig.supxlabel("training problems")
    fig.supylabel("test success, percent")
    return fig


def collect(results: Path) -> list[Json]:
    """Return the verified pairs that all runs left behind, each question and answer of a backbone once."""
    rows: dict[tuple[str, str, str], Json] = {}
    for path in sorted(results.glob("records/*/remade.jsonl")):
        for row in _pairs(path):
            rows.setdefault((row["backbone"], row["question"], row["answer"]), row)
    return list(rows.values())


def _pairs(path: Path) -> list[Json]:
    """Return the pairs of a run; raises UserError where they cannot be read."""
    try:
        return read_jsonl(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {REMEDY}.") from error


def save_dataset(results: Path, out: Path) -> list[Path]:
    """Write the collected pairs as JSONL files of SHARD rows with a data set card, if there are any; their paths."""
    rows = collect(results)
    if not rows:
        return []
    # fewer rows than before would leave the last files of then
    for stale in out.glob("train*.jsonl"):
        stale.unlink()
    # sorted keys: the same pairs are the same bytes
    lines = [json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows]
    texts = {}
    for start in range(0, len(lines), SHARD):
        texts[out / f"train-{start // SHARD:02}.jsonl"] = "".join(lines[start : start + SHARD])
    texts[out / "README.md"] = card(rows)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def card(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the data set card: what the pairs are, how they were made, how many there are of which kind."""
    kinds = DataFrame(rows).groupby(["backbone", "source"])
    table = kinds.agg(pairs=("answer", "size"), runs=("run", "nunique")).reset_index()
    return CARD.format(total=len(rows), counted=table.to_markdown(index=False))
