"""Tables, figures, numbers and claims of a results folder: rebuilt from its records in seconds, without torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nslora import config
from nslora.study import (
    ablations,
    claims,
    costs,
    data_efficiency,
    figures,
    records,
    signal,
    stats,
    stream,
    when_figures,
)
from nslora.study.records import Records, load

DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
MISSING = "-"
MADE = (
    "tables",
    "figures",
    "remade",
)  # folders that hold nothing but what is made from the records
Draw = Callable[[pd.DataFrame], Figure]
CAPTION = (
    "Test success (content and style both right), percent: mean ± half-width of the {level:.0%} {kind}; seeds: {n}. "
    "`-`: not run; a value without ± has one seed; where other methods have more style rules, how many it has."
)
TRACED = "one neurosymbolic run per backbone (its lowest seed), no interval"


def caption(frame: pd.DataFrame) -> str:
    """Caption of a table of test success."""
    kinds = " or ".join(sorted(set(frame.interval))) or "t-interval on seed means"
    return CAPTION.format(level=stats.LEVEL, kind=kinds, n=count(frame))


def count(frame: pd.DataFrame) -> str:
    """The number of seeds, or their range."""
    return "0" if frame.empty else "-".join(str(n) for n in sorted({frame.n.min(), frame.n.max()}))


def cell(row: Any, most: int, rules: int) -> str:
    """`mean ± half` in percent; with n below the `most` seeds of the table, and with its rules below its column's."""
    half = "" if np.isnan(row.half) else f" ± {100 * row.half:.1f}"
    notes = [f"n={row.n}"] if row.n < most else []
    notes += [f"{row.rules:.0f} of {rules:.0f} rules"] if row.rules < rules else []
    return f"{100 * row.mean:.1f}{half}" + (f" ({', '.join(notes)})" if notes else "")


def grid(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Display table: methods by `columns`, cells as text, in the order of the frame."""
    rules = frame.groupby(columns).rules.transform("max")
    rows = [
        (row, cell(row, frame.n.max(), run))
        for row, run in zip(frame.itertuples(index=False), rules, strict=True)
    ]
    texts = {(row.method, *(getattr(row, c) for c in columns)): text for row, text in rows}
    heads = list(dict.fromkeys(key[1:] for key in texts))
    names = records.in_order(frame[["method"]].drop_duplicates()).method
    body = [[texts.get((name, *head), MISSING) for head in heads] for name in names]
    index = (
        pd.MultiIndex.from_tuples(heads, names=columns)
        if heads
        else pd.MultiIndex.from_arrays([[], []])
    )
    return pd.DataFrame(body, index=pd.Index(names, name="method"), columns=index)


def middle(all_records: Records) -> pd.DataFrame:
    """Interquartile mean over tasks and backbones of the methods that ran on all, at three seeds at least."""
    scores = all_records.main.scores
    test = scores[scores.split == "test"]
    table = (
        test.groupby(["method", "seed", "task", "backbone"])
        .success.mean()
        .unstack(["task", "backbone"])
        .dropna()
    )
    if table.shape[1] < 2:
        return pd.DataFrame()
    iqm = pd.Series([stats.iqm(row) for row in table.to_numpy(float)], table.index, dtype=float)
    frame = records.estimates(iqm, ["method"])
    return frame[frame.n >= stats.LEAST_SEEDS].assign(task="all", backbone="IQM")


def main_frame(all_records: Records) -> pd.DataFrame:
    """The main table's numbers: task, backbone, method, mean, low, high, half, n, interval (shares), and `rules`."""
    return pd.concat([records.success(all_records), middle(all_records)], ignore_index=True)


def main_table(results: Path) -> pd.DataFrame:
    """The main table as text cells: methods by (task, backbone)."""
    return grid(main_frame(load(results)), ["task", "backbone"])


def markdown(table: pd.DataFrame) -> str:
    """A display table as a Markdown table; header levels are stacked."""
    heads = [str(table.index.name), *("<br>".join(head) for head in table.columns)]
    body = [[str(name), *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def latex(table: pd.DataFrame) -> str:
    """A display table as a booktabs tabular."""
    heads = table.columns if table.columns.nlevels > 1 else table.columns.get_level_values(0)
    text = (
        table.set_axis(heads, axis=1)
        .rename_axis(index=None, columns=[None] * heads.nlevels)
        .to_latex(escape=True, multicolumn_format="c", column_format="l" + "r" * table.shape[1])
    )
    return text.replace("±", r"$\pm$")


def readme_table(results: Path) -> str:
    """Markdown of the main table and its caption, for the README."""
    frame = main_frame(load(results))
    return f"{markdown(grid(frame, ['task', 'backbone']))}\n{caption(frame)}\n"


def show_table(results: Path) -> str:
    """The main table as aligned plain text, for a terminal or a notebook."""
    frame = main_frame(load(results))
    table = grid(frame, ["task", "backbone"])
    if table.empty:
        return "no finished runs yet"
    return f"{table.rename_axis(index=None, columns=[None, None]).to_string()}\n\n{caption(frame)}"


def save_table(table: pd.DataFrame, frame: pd.DataFrame, stem: Path, text: str) -> list[Path]:
    """Write `stem`.md and .tex (display) and .csv (the numbers); returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".md", ".tex", ".csv")]
    paths[0].write_text(f"{markdown(table)}\n{text}\n", encoding="utf-8")
    paths[1].write_text(latex(table), encoding="utf-8")
    frame.to_csv(paths[2], index=False, float_format="%.6g", lineterminator="\n")
    return paths


def verdicts(judged: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every comparison of every claim, pooled and per backbone: as text cells, and as numbers."""
    rows = [
        {"claim": claim["key"], **row} for claim in judged["claims"] for row in claim["comparisons"]
    ]
    frame = pd.DataFrame(rows).drop(columns=["backbones", "interval"])
    shown = [
        f"{percent(row.difference)} [{percent(row.low)}, {percent(row.high)}]" if row.n else MISSING
        for row in frame.itertuples()
    ]
    texts = frame[["comparison", "backbone"]].assign(
        **{"points [interval]": shown}, seeds=frame.n, verdict=frame.verdict
    )
    texts = texts.astype(str).set_index(frame.claim)
    return texts.set_axis(pd.MultiIndex.from_arrays([texts.columns]), axis=1), frame


def build_tables(all_records: Records, judged: dict[str, Any], out: Path) -> list[Path]:
    """Write the tables that the records allow."""
    frame, cost = main_frame(all_records), costs.costs(all_records)
    paths = save_table(grid(frame, ["task", "backbone"]), frame, out / "main", caption(frame))
    by_rule = records.success(all_records, ("task", "rule", "backbone", "method"))
    by_rule = by_rule[by_rule.task == "style"].drop(columns="task")
    if len(by_rule):
        paths += save_table(
            grid(by_rule, ["backbone", "rule"]), by_rule, out / "rules", caption(by_rule)
        )
    baked = data_efficiency.baking(all_records).rename(columns={"arm": "method"}).assign(rules=1)
    if len(baked):
        shown = grid(baked, ["backbone", "rule"]).rename_axis(index="arm")
        paths += save_table(shown, baked, out / "baking", caption(baked))
    said = f"Comparisons of each claim, points and {stats.LEVEL:.0%} intervals over seeds; bound 0 if none is named."
    paths += save_table(*verdicts(judged), out / "claims", said)
    if len(cost):
        texts = cost.set_index("method").map(
            lambda value: value if isinstance(value, str) else f"{value:,.0f}"
        )
        texts.columns = pd.MultiIndex.from_arrays([texts.columns])
        paths += save_table(texts, cost, out / "cost", "Mean cost of one run on the mixed task.")
    return paths


def meta(all_records: Records, frame: pd.DataFrame, what: str, tasks: list[str]) -> dict[str, Any]:
    """A figure's sidecar: what is shown, what the interval is, n, and the runs behind it."""
    runs = pd.concat([all_records.main.runs, all_records.stream.runs])
    runs = runs[runs.task.isin(tasks) & runs.backbone.isin(frame.backbone)]
    if "interval" not in frame:
        return {
            "figure": what,
            "interval": TRACED,
            "n_seeds": "1",
            "sources": sorted(set(frame.run_id)),
        }
    kind = f"{stats.LEVEL:.0%} {' or '.join(sorted(set(frame.interval)))}"
    used = sorted(runs.run_id[runs.method.isin({*frame.method, "frozen"})])
    return {"figure": what, "interval": kind, "n_seeds": count(frame), "sources": used}


def build_figures(all_records: Records, out: Path, images: bool) -> list[Path]:
    """Write the figures that the records allow (or only their numbers); each a function of its tidy frame."""
    gains, by_task = (
        records.gains(all_records),
        records.success(all_records).rename(columns={"task": "row"}),
    )
    mixed = ["mixed"]
    plan: dict[str, tuple[str, pd.DataFrame, Draw, list[str]]] = {
        "gain_matrix": (
            "gain in test success over frozen",
            gains,
            figures.gain_matrix,
            list(gains.task),
        ),
        "success": (
            "test success",
            by_task,
            lambda f: figures.dots(f, "test success, percent"),
            list(by_task.row),
        ),
        "interaction": (
            "test success, and share kept of what the frozen backbone could do",
            records.interaction(all_records),
            lambda f: figures.dots(
                f, "percent of test items, and of what the frozen backbone could do"
            ),
            mixed,
        ),
        "cost_curves": (
            "best dev reward so far by cost",
            records.curves(all_records),
            figures.cost_curves,
            mixed,
        ),
        "signal_traces": (
            "reward and signal",
            records.traces(all_records),
            figures.signal_traces,
            mixed,
        ),
        "threshold_sensitivity": (
            "what stopping LoRA at a threshold of C1 gives up and saves",
            signal.thresholds(all_records),
            when_figures.threshold_sensitivity,
            [t for t in config.TASKS if t != records.STREAM],
        ),
        "need_roc": (
            "P(content) for hidden content against style needs",
            signal.roc(all_records),
            when_figures.need_roc,
            mixed,
        ),
        "ablations": (
            "change in test success, and in what is kept, by one changed setting",
            ablations.ablations(all_records),
            ablations.ablation_dots,
            mixed,
        ),
        "controls": (
            "change in test success, and in what is kept, of textgrad on style without the critic's message",
            ablations.ablations(all_records, "style", "textgrad"),
            ablations.ablation_dots,
            ["style"],
        ),
        "data_efficiency": (
            "test success on math by number of training problems and what weights are trained on",
            data_efficiency.efficiency(all_records),
            data_efficiency.data_efficiency,
            ["math"],
        ),
        "stream": (
            "dev reward through the stream",
            stream.curves(all_records),
            stream.stream,
            ["stream"],
        ),
        "cost_parts": (
            "minutes of a run by kind of work",
            costs.parts(all_records),
            costs.cost_parts,
            mixed,
        ),
        "prompt_diffs": (
            "diff of both prompt texts",
            records.diffs(all_records),
            figures.prompt_diffs,
            mixed,
        ),
    }
    paths = []
    for name, (what, frame, draw, tasks) in plan.items():
        if len(frame):
            said = meta(all_records, frame, what, tasks)
            paths += figures.save_figure(draw(frame) if images else None, frame, out / name, said)
    return paths


def macro(*words: object) -> str:
    """A LaTeX command name, letters only, each run of letters capitalised but the first: 0.5b becomes ZeroFiveB."""
    parts = re.findall(r"[A-Za-z]+|[0-9]", " ".join(map(str, words)))
    name = "".join(
        DIGITS[int(part)] if part.isdigit() else part[0].upper() + part[1:] for part in parts
    )
    return name[:1].lower() + name[1:]


def numbers(all_records: Records, judged: dict[str, Any]) -> str:
    """One \\newcommand per number: percentages of the main table, and differences in points of every claim."""
    values: dict[str, str] = {"runs": str(len(all_records.runs))}
    for row in main_frame(all_records).itertuples(index=False):
        name = macro("success", row.task, row.backbone, row.method)
        values |= {
            name: percent(row.mean),
            f"{name}Half": percent(row.half),
            f"{name}Seeds": str(row.n),
        }
    for claim in judged["claims"]:
        values[macro("claim", claim["key"], "verdict")] = claim["verdict"]
        pooled = [row for row in claim["comparisons"] if row["backbone"] == "all"]
        for i, row in enumerate(pooled):
            name = macro("claim", claim["key"], i + 1 if len(pooled) > 1 else "")
            values |= {
                name + part.capitalize(): percent(row[part])
                for part in ("difference", "low", "high")
            }
            values[f"{name}Seeds"] = str(row["n"])
    return "".join(f"\\newcommand{{\\{name}}}{{{value}}}\n" for name, value in values.items())


def percent(share: float | None) -> str:
    """A share in percent with one decimal, or a dash."""
    return "--" if share is None or np.isnan(share) else f"{100 * share + 0.0:.1f}"


def build(results: Path, out: Path | None = None, images: bool = True) -> list[Path]:
    """Rebuild tables, figures, numbers.tex and claims.json of `results` (into `out`, if given); returns the paths.

    Files that earlier versions or records left in their folders are removed.
    """
    out = out or results
    all_records = load(results)
    judged = claims.judged(all_records)
    out.mkdir(parents=True, exist_ok=True)
    (out / "claims.json").write_text(json.dumps(judged, indent=1) + "\n", encoding="utf-8")
    (out / "numbers.tex").write_text(numbers(all_records, judged), encoding="utf-8")
    paths = [
        out / "claims.json",
        out / "numbers.tex",
        *data_efficiency.save_dataset(results, out / "remade"),
    ]
    paths += build_tables(all_records, judged, out / "tables")
    paths += build_figures(all_records, out / "figures", images)
    if images:  # else the pictures are not made anew
        for path in {path for name in MADE for path in out.glob(f"{name}/*")} - set(paths):
            path.unlink()
    return paths


def verify(results: Path) -> list[str]:
    """Differences between what is stored and what the records give, one sentence each; images are not compared."""
    differences = []
    for run_id, group in (all_records := load(results)).scores.groupby("run_id"):
        run = all_records.runs[all_records.runs.run_id == run_id].iloc[0]
        for split, rows in group.groupby("split"):
            for part in records.PARTS:
                if abs(rows[part].mean() - run[f"final.{split}.{part}"]) > 1e-6:
                    differences.append(
                        f"{run_id}: run.json and scores.csv disagree on {split} {part}."
                    )
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        fresh = {path.relative_to(made) for path in build(results, made, images=False)}
        old = {path.relative_to(results) for name in MADE for path in results.glob(f"{name}/*")}
        for path in sorted(fresh | {path for path in old if path.suffix not in (".pdf", ".png")}):
            if path not in fresh:
                differences.append(f"{path} is stored but does not follow from the records.")
            elif not (results / path).exists():
                differences.append(f"{path} is missing.")
            elif (results / path).read_bytes() != (made / path).read_bytes():
                differences.append(f"{path} differs from what the records give.")
    return differences


def run_picture(record: Path) -> Figure:
    """One finished run at a glance (a record folder): reward and loss per move, and the diff of both prompt texts."""
    run, steps, _ = records.read_run(record)
    names = {
        "dev.value": "value",
        "dev.content": "content",
        "dev.style": "style",
        "cost.loss": "loss",
    }
    frame = (
        pd.DataFrame(steps).rename(columns=names).reindex(columns=["step", "move", *names.values()])
    )
    return figures.run_picture(frame, run["best.prompt_diff"])
