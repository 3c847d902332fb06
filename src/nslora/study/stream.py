"""How fast does a method adapt when its task changes? The phases of the stream, move by move."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas import DataFrame

from nslora.study import stats
from nslora.study.figures import INK, PAGE, draw_lines, legend_outside, panels, styled
from nslora.study.records import Records, estimates, in_order, until_budget

PHASES = ("facts, a rule", "more facts", "another rule")
RUN = ["backbone", "method", "seed", "rule"]
# of the level before the change
RECOVERED = 0.9


def by_move(records: Records) -> DataFrame:
    """Return the best dev reward so far in the phase, per run of the stream, phase (from 1) and move (0: the start).

    A run that stops before its phase's budget is spent keeps its value for the rest of the phase. `items` is the number
    of dev items behind a value.
    """
    stream = records.of("stream")
    steps = stream.steps.sort_values(["run_id", "step"])
    steps = records.with_settings(steps, "moves", "rounds")
    # with one budget for all, no phase makes more moves than there are rounds
    rounds = steps["rounds"].astype(float).fillna(0)
    steps = steps.assign(moves=steps.moves.where(rounds == 0, rounds).astype(int))
    # each phase begins with a record without a move
    steps = steps.assign(phase=(steps.move == "start").groupby(steps.run_id).cumsum())
    by = ["run_id", "phase"]
    # the best so far, since a run returns its best candidate
    best = steps.groupby(by)["dev.value"].cummax()
    steps = steps.assign(value=best, items=steps["dev.n"])
    return in_order(until_budget(steps, by, [*RUN, "phase", "value", "items"]))


def curves(records: Records) -> DataFrame:
    """Return means over seeds of `by_move`, with intervals."""
    moves = by_move(records)
    moves["variance"] = stats.share_variance(moves.value, moves["items"])
    return estimates(moves, ["backbone", "method", "phase", "move"])


def recovery(rewards: DataFrame) -> DataFrame:
    """Return how many `moves` it takes to make a change good, per run (rows of `by_move`) and phase after the first.

    A change is made good when RECOVERED of the level before it is reached again; budget + 1 if it never is, NaN if that
    level was 0.
    """
    rows = []
    for key, run in rewards.groupby(RUN):
        last = run.groupby("phase").value.last()
        for phase, part in run[run.phase > 1].groupby("phase"):
            level = RECOVERED * last[phase - 1]
            reached = part.move[part.value >= level]
            moves = reached.min() if len(reached) else part.move.max() + 1
            rows.append((*key, phase, moves if level > 0 else np.nan))
    return DataFrame(rows, columns=[*RUN, "phase", "moves"])


def retention(records: Records) -> DataFrame:
    """Return, of the facts right at the end of the first phase, the share still right at the end, per run: `kept`.

    A fact is right if the replies to all its test questions are; NaN where none was.
    """
    stream = records.of("stream")
    facts = stream.scores[stream.scores.need == "both"]
    # a fact counts as learned when all its wordings are right
    right = facts.pivot_table(index=[*RUN, "fact"], columns="split", values="content") == 1
    right = right.reindex(columns=["test-1", "test"], fill_value=False)
    kept = right.test[right["test-1"]].groupby(RUN).mean()
    runs = pd.MultiIndex.from_frame(stream.runs[RUN])
    return kept.reindex(runs).rename("kept").reset_index()


def regrets(rewards: DataFrame) -> DataFrame:
    """Return the dev reward missing on average over all moves, per run (rows of `by_move`): `regret`, `variance`."""
    missing = rewards.assign(regret=1 - rewards.value.astype(float))
    means = missing.groupby(RUN)[["regret", "items"]].mean().astype(float)
    means["variance"] = stats.share_variance(means.regret, means["items"])
    return means.drop(columns="items").reset_index()


def summary(records: Records) -> DataFrame:
    """Return means over seeds per backbone and method, the measures as columns.

    Test success at each phase's end; `first facts kept` (`retention`); `moves to recover` after each change
    (`recovery`); `regret` (`regrets`), and `seeds`.
    """
    rewards, by = by_move(records), ["backbone", "method"]
    if rewards.empty:
        return DataFrame(columns=by).set_index(by)
    stream = records.of("stream")
    success = stream.scores.pivot_table(index=by, columns="split", values="success")
    success = success.filter(like="test").rename(columns={"test": f"test-{len(PHASES)}"})
    moves = recovery(rewards).pivot_table(
        index=by,
        columns="phase",
        values="moves",
        dropna=False,
    )
    parts = [
        success[sorted(success)],
        retention(records).groupby(by).kept.mean().rename("first facts kept"),
        moves.add_prefix("moves to recover, phase "),
        regrets(rewards).groupby(by).regret.mean(),
        stream.runs.groupby(by).seed.nunique().rename("seeds"),
    ]
    return in_order(pd.concat(parts, axis=1).reset_index()).set_index(by)


@styled
def stream(frame: DataFrame) -> Figure:
    """Draw dev reward by move through the phases (`curves`), a panel per backbone and a line per method."""
    # phases beside each other, each as wide as its moves and its start
    width = int(frame.move.max()) + 1
    frame = frame.assign(position=frame.move + (frame.phase - 1) * width).reset_index(drop=True)
    frame = frame.astype({"position": float, "phase": int})
    fig = Figure(figsize=(PAGE, 0.6 + 1.9 * frame.backbone.nunique()))
    for ax, here in panels(fig, frame, "backbone", sharex=True):
        # a line of its own per phase
        for _, part in here.groupby("phase"):
            draw_lines(ax, part, "position", marker="o")
        ax.set(ylim=(-0.03, 1.2), yticks=(0, 0.5, 1))
        for phase, words in enumerate(PHASES):
            ax.axvline(phase * width - 0.5, color="#888888", lw=0.7, ls=":")
            ax.text(
                (phase + 0.5) * width - 0.5,
                1.1,
                words,
                ha="center",
                fontsize=7,
                color=INK,
            )
    legend_outside(fig)
    ticks = range(width * len(PHASES))
    fig.axes[-1].set_xticks(ticks, [str(tick % width) for tick in ticks])
    fig.supxlabel("moves since the change")
    fig.supylabel("best dev reward")
    return fig
