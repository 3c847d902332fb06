"""How fast does a method adapt when its task changes? The phases of the stream, move by move. No torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nslora.study.figures import COLOURS, GREY, INK, PAGE, label_ends, styled
from nslora.study.records import Records, estimates, in_order

PHASES = ("facts, a rule", "more facts", "another rule")
RUN = ["backbone", "method", "seed", "rule"]
RECOVERED = 0.9  # of the level before the change


def by_move(records: Records) -> pd.DataFrame:
    """Best dev reward so far in the phase, per run of the stream, phase (from 1) and move (0: before the first one).

    A run that stops before its phase's budget is spent keeps its value for the rest of the phase.
    """
    rows = [pd.DataFrame(columns=[*RUN, "phase", "move", "value"])]
    for _, run in records.stream.steps.groupby("run_id"):
        run, moves = run.sort_values("step"), json.loads(run.settings.iloc[0])["moves"]
        for phase, part in run.groupby(
            (run.move == "stop").cumsum()
        ):  # each phase begins with a record without a move
            held = pd.Series(part["dev.value"].cummax().to_numpy(float)).reindex(
                range(moves + 1), method="ffill"
            )
            head = {name: run[name].iloc[0] for name in RUN}
            rows.append(
                pd.DataFrame({**head, "phase": phase, "move": held.index, "value": held.to_numpy()})
            )
    return in_order(pd.concat([row for row in rows if len(row)] or rows, ignore_index=True))


def curves(records: Records) -> pd.DataFrame:
    """Means over seeds of `by_move`, with intervals."""
    by = ["backbone", "method", "phase", "move"]
    return estimates(by_move(records).set_index([*by, "seed", "rule"]).value.astype(float), by)


def recovery(rewards: pd.DataFrame) -> pd.DataFrame:
    """Moves until a change is made good: per run (rows of `by_move`) and phase after the first, column `moves`.

    That is until RECOVERED of the level before the change is reached again; budget + 1 if it is not, NaN if that level
    was 0.
    """
    rows = []
    for key, run in rewards.groupby(RUN):
        last = run.groupby("phase").value.last()
        for phase, part in run[run.phase > 1].groupby("phase"):
            level = RECOVERED * last[phase - 1]
            reached = part.move[part.value >= level]
            moves = np.nan if level == 0 else reached.min() if len(reached) else part.move.max() + 1
            rows.append((*key, phase, moves))
    return pd.DataFrame(rows, columns=[*RUN, "phase", "moves"])


def retention(records: Records) -> pd.DataFrame:
    """Of the facts right at the end of the first phase, the share still right at the end, per run: column `kept`.

    A fact is right if the replies to all its test questions are; NaN where none was.
    """
    scores = records.stream.scores
    facts = scores[(scores.need == "both") & scores.split.isin(("test-1", "test"))]
    facts = facts.assign(fact=facts.id.str.rpartition(":")[0])
    means = facts.pivot_table(index=[*RUN, "fact"], columns="split", values="content")
    means = means.reindex(columns=["test-1", "test"])
    known = means[means["test-1"] == 1]
    kept = (known["test"] == 1).groupby(RUN).mean()
    runs = pd.MultiIndex.from_frame(records.stream.runs[RUN])
    return kept.reindex(runs).rename("kept").reset_index()


def regrets(rewards: pd.DataFrame) -> pd.DataFrame:
    """The dev reward that was missing on average over all moves, per run (rows of `by_move`): column `regret`."""
    missing = 1 - rewards.value.astype(float)
    return missing.groupby([rewards[name] for name in RUN]).mean().rename("regret").reset_index()


def summary(records: Records) -> pd.DataFrame:
    """Means over seeds per backbone and method, the measures as columns.

    Test success at each phase's end; `first facts kept` (`retention`); `moves to recover` after each change
    (`recovery`); `regret` (`regrets`), and `seeds`.
    """
    rewards, by = by_move(records), ["backbone", "method"]
    if rewards.empty:
        return pd.DataFrame(columns=by).set_index(by)
    scores = records.stream.scores
    tests = scores[scores.split.str.startswith("test", na=False)]
    ends = tests.pivot_table(index=by, columns="split", values="success").rename(
        columns={"test": f"test-{len(PHASES)}"}
    )
    parts = [
        ends[sorted(ends)],
        retention(records).groupby(by).kept.mean().rename("first facts kept"),
    ]
    moves = recovery(rewards).pivot_table(index=by, columns="phase", values="moves", dropna=False)
    parts.append(moves.add_prefix("moves to recover, phase "))
    parts.append(regrets(rewards).groupby(by).regret.mean())
    parts.append(records.stream.runs.groupby(by).seed.nunique().rename("seeds"))
    return in_order(pd.concat(parts, axis=1).reset_index()).set_index(by)


@styled
def stream(frame: pd.DataFrame) -> Figure:
    """Dev reward by move through the phases (`curves`), a panel per backbone and a line per method."""
    backbones, moves = sorted(set(frame.backbone)), int(frame.move.max())
    fig = Figure(figsize=(PAGE, 0.4 + 1.9 * len(backbones)), layout="constrained")
    axes = fig.subplots(len(backbones), 1, squeeze=False, sharex=True)[:, 0]
    for ax, backbone in zip(axes, backbones, strict=True):
        here, ends = frame[frame.backbone == backbone], {}
        for (method, phase), line in here.groupby(["method", "phase"]):
            x, colour = line.move + (phase - 1) * (moves + 1), COLOURS.get(str(method), GREY)
            ax.plot(x, line["mean"], "o-", ms=2.5, color=colour, lw=1.4)
            ax.fill_between(
                x, line.low.clip(0, 1), line.high.clip(0, 1), color=colour, alpha=0.12, lw=0
            )
            if phase == len(PHASES):
                ends[method] = line["mean"].iloc[-1]
        for phase in range(1, len(PHASES)):
            ax.axvline(phase * (moves + 1) - 0.5, color="#888888", lw=0.7, ls=":")
        ax.set(title=backbone, ylabel="best dev reward", ylim=(-0.03, 1.2), yticks=(0, 0.5, 1))
        label_ends(ax, ends)
    for phase, words in enumerate(PHASES):
        where = phase * (moves + 1) + moves / 2
        axes[0].text(where, 1.17, words, ha="center", va="top", fontsize=7, color=INK)
    ticks = range((moves + 1) * len(PHASES))
    axes[-1].set_xticks(ticks, [str(tick % (moves + 1)) for tick in ticks])
    axes[-1].set_xlabel("moves since the change")
    return fig
