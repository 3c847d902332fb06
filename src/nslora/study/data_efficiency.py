"""Is remade data worth reusing? Success on math by number of problems and by what weights are trained on. No torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nslora.study.figures import BLUE, GREEN, INK, ORANGE, PAGE, styled
from nslora.study.records import UNIT, Records, estimates

ARMS = {  # settings.targets of the study's runs, in the order of the legend
    "gold": ("raw answers", BLUE, "-"),
    "duplicated": ("raw answers, each twice", BLUE, ":"),
    "verified": ("remade answers alone", GREEN, "-"),
    "both": ("raw and remade answers", GREEN, ":"),
    "unverified": ("remade answers, right or wrong", ORANGE, "-"),
}

AGAIN = (
    "4 moves, 4 epochs",
    "2 moves, 8 epochs",
)  # schedules: two rounds, and one with as many epochs in all
SHARD = 500  # rows of a file: no file of the data set should be large

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

| backbone | source | pairs | runs |
| :-- | :-- | --: | --: |
{counted}

Fields: `question`, `answer`; `system` and `template`, the prompt under which the pair is trained; `parent`, the item
that the answer was made for; `source`; `backbone`; `reward`; `run`, the record that holds everything else;
`prompt_diff`, what the run had changed of the start's prompt, as (op, token).

To load: `datasets.load_dataset("json", data_files="train-*.jsonl")`. Do not test on the runs' own items: facts of a
seed occur here in the wordings of its training split.
"""


def study(records: Records, method: str = "alternate") -> pd.DataFrame:
    """Test scores of `method` on math in the arms of the study, with the settings that tell its runs apart."""
    scores = records.scores[(records.scores.task == "math") & (records.scores.split == "test")]
    settings = scores.settings.map(json.loads)
    scores = scores.assign(
        targets=[s["targets"] for s in settings],
        items=[s["items"] for s in settings],
        schedule=[f"{s['moves']} moves, {s['epochs']} epochs" for s in settings],
    )
    return scores[(scores.method == method) & scores.targets.isin(ARMS)]


def efficiency(records: Records, method: str = "alternate") -> pd.DataFrame:
    """Test success on math per backbone, arm (`targets`) and number of training problems (`items`), with intervals.

    Only runs of `method` under the schedule (moves, and epochs of each) that most arms were run with.
    """
    arms = compared(study(records, method))
    table = estimates(
        arms.set_index([*UNIT, "targets", "items"]).success, ["backbone", "targets", "items"]
    )
    return table.assign(method=method)


def compared(arms: pd.DataFrame) -> pd.DataFrame:
    """Rows of `study` under the schedule that most arms were run with."""
    tried = arms.groupby("schedule").targets.nunique()
    return arms[arms.schedule == tried.idxmax()] if len(arms) else arms


def iterating(records: Records, method: str = "alternate") -> pd.DataFrame:
    """Test success on math of the arm *remade alone* per backbone, `items` and `schedule`, where there are several.

    Two moves are one round of remaking and training, four are two rounds.
    """
    arms = study(records, method)
    arms = arms[arms.targets == "verified"]
    several = arms.groupby(["backbone", "items"]).schedule.transform("nunique") > 1
    arms = arms[several].set_index([*UNIT, "items", "schedule"])
    return estimates(arms.success, ["backbone", "items", "schedule"])


def counts(records: Records, method: str = "alternate") -> pd.DataFrame:
    """Mean number of training pairs per source and epoch of the runs in `efficiency`, by backbone, arm and items."""
    arms = (
        compared(study(records, method)).groupby("run_id")[["backbone", "targets", "items"]].first()
    )
    steps = records.steps[
        (records.steps.move == "numerical") & records.steps.run_id.isin(arms.index)
    ]
    pairs = (
        steps.set_index("run_id")
        .filter(like="detail.pairs.")
        .dropna(axis="columns", how="all")
        .fillna(0)
    )
    frame = arms.join(
        pairs.rename(columns=lambda name: name.removeprefix("detail.pairs.")), how="inner"
    )
    return frame.groupby(["backbone", "targets", "items"]).mean().reset_index()


def baking(records: Records, method: str = "alternate") -> pd.DataFrame:
    """Test success on style per backbone, rule and `arm`: what is left of a refined prompt in weights, with intervals.

    Arms: nothing (frozen), the prompt alone (textgrad, with all of its moves), and weights after one symbolic and one
    numerical move, tuned and used under the refined prompt or, on the same replies, under the start prompt (`bake`).
    Only backbones with baked runs, and beside those the runs that differ in nothing but `bake`.
    """
    main, scores = records.main.scores, records.scores[records.scores.method == method]
    settings = [json.loads(text) for text in scores.settings]
    baked = pd.Series([s.pop("bake") for s in settings], index=scores.index, dtype=bool)
    scores = scores.assign(otherwise=[json.dumps(s, sort_keys=True) for s in settings])
    arms = {
        "nothing": main[main.method == "frozen"],
        "prompt": main[main.method == "textgrad"],
        "prompt and weights": scores[~baked & scores.otherwise.isin(scores[baked].otherwise)],
        "weights": scores[baked],
    }
    rows = [
        rows[
            (rows.task == "style")
            & (rows.split == "test")
            & rows.backbone.isin(scores[baked].backbone)
        ]
        .assign(arm=arm)
        .set_index([*UNIT, "arm"])
        .success
        for arm, rows in arms.items()
    ]
    table = estimates(pd.concat(rows), ["backbone", "rule", "arm"])
    return table.sort_values(
        ["backbone", "rule", "arm"], key=lambda c: c.map(list(arms).index) if c.name == "arm" else c
    )


@styled
def data_efficiency(frame: pd.DataFrame) -> Figure:
    """Test success against the number of training problems, a line per arm and a panel per backbone.

    `frame` is that of `efficiency` (shares, shown in percent).
    """
    backbones = sorted(set(frame.backbone))
    fig = Figure(figsize=(min(PAGE, 2.2 + 2.4 * len(backbones)), 2.7), layout="constrained")
    for ax, backbone in zip(
        np.ravel(fig.subplots(1, len(backbones), sharey=True)), backbones, strict=True
    ):
        for place, (arm, (words, colour, dashes)) in enumerate(ARMS.items()):
            line = frame[(frame.backbone == backbone) & (frame.targets == arm)].sort_values("items")
            if len(line):
                x = line["items"] * 1.06 ** (
                    place - len(ARMS) // 2
                )  # beside each other, so that intervals can be told
                ax.plot(x, 100 * line["mean"], "o", ls=dashes, ms=3, color=colour, label=words)
                low, high = (100 * line[end].clip(0, 1) for end in ("low", "high"))
                ax.vlines(x, low, high, color=colour, alpha=0.6, lw=1.2)
        ticks = sorted(set(frame["items"]))
        ax.set_xlim(ticks[0] / 1.6, ticks[-1] * 1.6)
        ax.set(title=backbone, xscale="log", xlabel="training problems")
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_ylim(0, max(10, ax.get_ylim()[1]))
    fig.axes[0].set_ylabel("test success, percent")
    fig.legend(
        *fig.axes[0].get_legend_handles_labels(),
        loc="outside upper left",
        ncols=2,
        frameon=False,
        fontsize=7,
        labelcolor=INK,
    )
    return fig


def collect(results: Path) -> list[dict[str, Any]]:
    """The verified pairs that all runs left behind, each question and answer of a backbone once."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(results.glob("records/*/remade.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault((row["backbone"], row["question"], row["answer"]), row)
    return list(rows.values())


def save_dataset(results: Path, out: Path) -> list[Path]:
    """Write the collected pairs as JSONL files of SHARD rows with a data set card, if there are any; their paths."""
    rows = collect(results)
    if not rows:
        return []
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(
        "train*.jsonl"
    ):  # fewer rows than before would leave the last files of then
        stale.unlink()
    lines = [json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows]
    texts = {
        f"train-{i // SHARD:02}.jsonl": "".join(lines[i : i + SHARD])
        for i in range(0, len(lines), SHARD)
    }
    for name, text in (texts | {"README.md": card(rows)}).items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in (*texts, "README.md")]


def card(rows: Sequence[Mapping[str, Any]]) -> str:
    """The data set card: what the pairs are, how they were made and checked, and how many there are of which kind."""
    table = (
        pd.DataFrame(rows)
        .groupby(["backbone", "source"])
        .agg(pairs=("answer", "size"), runs=("run", "nunique"))
    )
    counted = "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in table.reset_index().to_numpy()
    )
    return CARD.format(total=len(rows), counted=counted)
