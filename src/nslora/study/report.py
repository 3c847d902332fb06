"""Tables, figures, numbers and claims of a results folder: rebuilt from its records in seconds, without torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

import re
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas import DataFrame

from nslora.config import RunConfig
from nslora.runs.store import write_json, write_text
from nslora.study import (
    ablations,
    claims,
    classifier,
    costs,
    data_efficiency,
    figures,
    records,
    signal,
    stats,
    stream,
)
from nslora.study.records import Records, load
from nslora.study.schedules import Trees, answers, trees
from nslora.study.schedules.routers import inner_nodes
from nslora.types import Json

MISSING = "-"
# characters of a row's name that a printed table has on one line
LINE = 50
# folders that hold nothing but what is made from the records
MADE = ("tables", "figures", "remade")
CAPTION = (
    "Test success (content and style both right), percent: mean [{level:.0%} interval, {kind}]; seeds: {n}. "
    "`-`: not run; a value without an interval has one seed; `k of m rules`: fewer style rules than others have."
)
CEILINGS = (
    " A ceiling is what a method reaches by construction at most: items that need the other kind of move are lost to "
    "weights that see bare gold answers, and to prompts."
)
OVER_INSTANCES = stats.KIND.replace("seed means", "instances")
ON_TREES = f"Mean [{stats.LEVEL:.0%} interval, {OVER_INSTANCES}]; n counts instances (trees)."
TREE_TABLES = {
    "adaptivity": "V = mean_i max_s R(i, s) - max_s mean_i R(i, s) and its two parts, R being test success, points. "
    "Without bias: the schedule of an instance is chosen on dev, the fixed one on other instances; at least: the fixed "
    "one in hindsight.",
    "regret": "Test success that a router loses against the best path in hindsight with as many moves, points.",
    "routers": "Test success that a router loses, over all backbones, points: against the best path in hindsight, the "
    "best that costs no more tokens, and the best on dev of all schedules.",
    "fixed_schedules": "Test success that a fixed schedule loses against the best path in hindsight, points.",
    "signal_test": "AUROC, percent, for 'S is the better next move', among nodes with as many moves; that of the move "
    "number among all nodes.",
    "first_moves": "Test success of beginning with the prompt minus that of beginning with the weights, points, each "
    "continued as is best on dev.",
}
JUDGED = (
    "A claim holds if all its comparisons do on every backbone where they were run (intersection-union; one-sided "
    f"tests at {stats.ALPHA:.1%}, Holm over the claims). Pooled estimates in points, with {stats.LEVEL:.0%} "
    f"intervals ({stats.KIND}; on trees an instance is a seed), of the comparison that is least above its bound; they "
    "decide nothing."
)
TRACED = "one neurosymbolic run per backbone (its lowest seed), no interval"


class Markdown(str):
    """Text that a notebook renders as Markdown and a terminal prints as it is."""

    def _repr_markdown_(self) -> str:
        return str(self)


# ---------------------------------------------------------------------------------------------- tables


def percent(share: float | None) -> str:
    """Return a share in percent with one decimal, or a dash."""
    # adding zero turns -0.0 into 0.0
    return "--" if share is None or np.isnan(share) else f"{100 * share + 0.0:.1f}"


def count(frame: DataFrame) -> str:
    """Return the number of seeds, or their range."""
    return "-".join(str(n) for n in sorted({frame.n.min(), frame.n.max()})) if len(frame) else "0"


def caption(frame: DataFrame) -> str:
    """Return the caption of a table of test success."""
    return CAPTION.format(
        level=stats.LEVEL,
        kind=stats.KIND,
        n=count(frame),
    )


def cell(row: Any) -> str:
    """Return `mean [low, high]` in percent, with n below the table's `most` seeds, and rules below its column's."""
    text = percent(row.mean)
    if not np.isnan(row.low):
        text += f" [{percent(row.low)}, {percent(row.high)}]"
    notes = []
    if row.n < row.most:
        notes.append(f"n={row.n}")
    if row.rules < row.most_rules:
        notes.append(f"{row.rules:.0f} of {row.most_rules:.0f} rules")
    return f"{text} ({', '.join(notes)})" if notes else text


def grid(frame: DataFrame, columns: Sequence[str], index: str = "method") -> DataFrame:
    """Return a display table: `index` by `columns`, cells as text, in the order of the frame."""
    frame = frame if "rules" in frame else frame.assign(rules=1)
    keys = list(columns)
    frame = frame.assign(most=frame.n.max(), most_rules=frame.groupby(keys).rules.transform("max"))
    names = records.in_order(frame[[index]])[index].unique()
    heads = pd.MultiIndex.from_frame(frame[keys].drop_duplicates())
    cells = frame.assign(text=[cell(row) for row in frame.itertuples()])
    # pivoting sorts; the order of the frame comes back
    table = cells.pivot(index=index, columns=keys, values="text")
    return table.reindex(index=names, columns=heads).fillna(MISSING).rename_axis(index=index)


def flat(table: DataFrame) -> DataFrame:
    """Return the table with stacked header levels joined into one, for Markdown."""
    heads = [
        head if isinstance(head, str) else "<br>".join(map(str, head)) for head in table.columns
    ]
    return table.set_axis(heads, axis=1)


def markdown(table: DataFrame) -> str:
    """Return a display table as a Markdown table, columns of numbers to the right."""
    table = flat(table)
    if table.empty:
        return f"| {table.index.name} |\n|:--|\n"
    numeric = table.astype(str).apply(lambda cells: cells.str.match(r"[-+]?\d|-$").all())
    aligned = ["left", *numeric.map({True: "right", False: "left"})]
    return table.to_markdown(disable_numparse=True, colalign=aligned) + "\n"


def latex(table: DataFrame) -> str:
    """Return a display table as a booktabs tabular; long names of rows are broken into lines."""
    bare = table.rename_axis(index=None, columns=[None] * table.columns.nlevels)
    if bare.columns.nlevels == 1:
        bare.columns = bare.columns.get_level_values(0)
    head = "p{9cm}" if max(map(len, table.index), default=0) > LINE else "l"
    style = {"multicolumn_format": "c", "column_format": head + "r" * table.shape[1]}
    return bare.to_latex(escape=True, **style)


def save_table(
    table: DataFrame, frame: DataFrame, stem: Path, text: str, printed: DataFrame | None = None
) -> list[Path]:
    """Write `stem`.md and .tex (display; on paper `printed`, if given) and .csv (the numbers); returns the paths."""
    texts = {
        stem.with_suffix(".md"): f"{markdown(table)}\n{text}\n",
        stem.with_suffix(".tex"): latex(table if printed is None else printed),
        stem.with_suffix(".csv"): frame.to_csv(**figures.CSV),
    }
    for path, content in texts.items():
        write_text(path, content)
    return list(texts)


def main_table(all_records: Records) -> DataFrame:
    """Return the main table as text cells: methods by (task, backbone), with the ceilings of pure methods below."""
    table = grid(records.success(all_records), ["task", "backbone"])
    ceilings = records.ceilings(all_records)
    if ceilings.empty:
        return table
    # below the methods, in the columns of tasks that have a ceiling
    shares = ceilings.set_index(["method", "task", "backbone"])["mean"].map(percent)
    below = shares.unstack(["task", "backbone"]).reindex(columns=table.columns)
    below = below.astype(object).fillna(MISSING)
    return pd.concat([table, below]).rename_axis(index="method")


def show_table(results: Path) -> Markdown:
    """Return Markdown of the main table and its caption, for the README, a terminal or a notebook."""
    all_records = load(results)
    if all_records.of("main").runs.empty:
        return Markdown("no finished runs yet")
    note = caption(records.success(all_records)) + CEILINGS
    return Markdown(f"{markdown(main_table(all_records))}\n{note}\n")


def verdicts(judged: Json) -> DataFrame:
    """Return the claims as text cells: verdict, that on each backbone, and the pooled estimate nearest to its bound."""
    rows = DataFrame(judged["claims"]).set_index("claim")
    each = DataFrame(rows.backbones.tolist(), rows.index).sort_index(axis=1)
    table = rows[["verdict"]].join(each).fillna(MISSING)
    for claim in judged["claims"]:
        table.loc[claim["claim"], "pooled estimate"] = least(claims.pooled(claim))
    return table


def least(rows: list[Json]) -> str:
    """Return the estimate of the comparison that is least above its bound, and of how many it is."""
    ran = [row for row in rows if row["n"]]
    if not ran:
        return MISSING
    text = claims.points(min(ran, key=lambda row: row["estimate"] - row["bound"]))
    return text if len(ran) == 1 else f"{text}, least of {len(ran)}"


def readme_claims(results: Path) -> Markdown:
    """Return Markdown of the claims and how they are judged, for the README."""
    return Markdown(f"{markdown(verdicts(claims.judged(load(results))))}\n{JUDGED}\n")


def plain(frame: DataFrame, index: str) -> DataFrame:
    """Return a frame of anything as a display table of texts."""
    return frame.set_index(index).astype(object).map(shown_as)


def shown_as(value: Any) -> str:
    """Return a cell as text: whole numbers from 100 on, three digits below."""
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def build_tables(all_records: Records, judged: Json, out: Path) -> list[Path]:
    """Write the tables that the records allow; the main one and the claims always."""
    frame = records.success(all_records)
    paths = save_table(main_table(all_records), frame, out / "main", caption(frame) + CEILINGS)
    compared = claims.comparisons(judged)
    shown = compared[["claim", "comparison", "backbone", claims.SHOWN, "n", "p"]]
    said = f"Points, {stats.LEVEL:.0%} intervals ({stats.KIND}), one-sided p before Holm."
    numbers = compared.drop(columns=[claims.SHOWN, "sentence"])
    paths += save_table(plain(shown, "claim"), numbers, out / "claims", said)
    table = verdicts(judged)
    paths += save_table(table, table.reset_index(), out / "verdicts", JUDGED)
    # name: frame, its columns across, its index
    grids = {
        "rules": (records.by_rule(all_records), ["backbone", "rule"], "method"),
        "factorial": (records.factorial(all_records), ["backbone", "cell"], "method"),
        "needs": (records.by_need(all_records), ["backbone", "need"], "method"),
        "baking": (data_efficiency.baking(all_records), ["backbone", "rule"], "arm"),
    }
    for name, (numbers, across, index) in grids.items():
        if len(numbers):
            table = grid(numbers, across, index)
            paths += save_table(table, numbers, out / name, caption(numbers))
    lists = {
        "decided": (records.decided(all_records), "Schedules (N, S) and reasons, how often each."),
        "cost": (costs.costs(all_records), "Mean cost of one run on the mixed task."),
    }
    for name, (numbers, said) in lists.items():
        if len(numbers):
            paths += save_table(plain(numbers, "method"), numbers, out / name, said)
    return [*paths, *tree_tables(all_records.trees, out)]


def tree_tables(grown: Trees, out: Path) -> list[Path]:
    """Write what the trees of schedules say, where there are any."""
    if grown.instances.empty:
        return []
    regrets, cues = answers.regrets(grown), answers.signal_test(grown)
    values = answers.adaptivity(grown)
    success = values.measure == "test success"
    hindsight, pooled = regrets.measure == answers.HINDSIGHT, regrets.backbone == answers.ALL
    # name: frame, which rows are shown, its columns across, its index
    by = ["split", "backbone"]
    grids = {
        "adaptivity": (values, success, by, "quantity"),
        "regret": (regrets, hindsight, by, "router"),
        "routers": (regrets, pooled, ["split", "measure"], "router"),
        "fixed_schedules": (answers.fixed_schedules(grown), ..., by, "schedule"),
        "signal_test": (cues, cues.after == answers.ALL, by, "cue"),
        "first_moves": (answers.first_moves(grown), ..., by, "family"),
    }
    paths = []
    for name, (numbers, rows, across, index) in grids.items():
        shown = numbers if rows is ... else numbers[rows]
        if len(shown):
            said = f"{TREE_TABLES[name]} {ON_TREES}"
            table = grid(shown, across, index)
            # the paper tells what tuning has not seen
            paths += save_table(table, numbers, out / name, said, table.get("test"))
    spending = answers.spending(grown)
    shown = plain(spending[spending.backbone == answers.ALL], "router")
    said = "Means of a run, and what it spends: moves, tokens (trained, generated, the editor's), seconds."
    return [*paths, *save_table(shown, spending, out / "router_costs", said)]


# ---------------------------------------------------------------------------------------------- figures


def dots(xlabel: str, y: str = "method") -> Callable[[DataFrame], Figure]:
    """Return `figures.dots` under one label."""
    return partial(figures.dots, xlabel=xlabel, y=y)


@dataclass(frozen=True)
class Picture:
    """One figure of the report.

    Attributes:
        name: the name of its files.
        what: what it shows, for the file beside it.
        frame: makes the tidy frame behind it from the records; an empty one draws nothing.
        draw: draws the frame.
        studies: the studies whose runs are behind it.
        tasks: their tasks; none named: all.
        interval: what the interval is.
    """

    name: str
    what: str
    frame: Callable[[Records], DataFrame]
    draw: Callable[[DataFrame], Figure]
    studies: tuple[str, ...] = ("main",)
    tasks: tuple[str, ...] = ("mixed",)
    interval: str = f"{stats.LEVEL:.0%}, {stats.KIND}"

    def about(self, all_records: Records, frame: DataFrame) -> Json:
        """Return the sidecar: what is shown, what the interval is, n, and the runs behind it."""
        if claims.SCHEDULES in self.studies:
            instances = all_records.trees.instances
            shown = instances.backbone.isin(set(frame.backbone) - {answers.ALL})
            return {
                "figure": self.what,
                "interval": self.interval,
                "n_instances": count(frame),
                "sources": sorted(instances.index[shown]),
            }
        runs = all_records.runs[all_records.runs.study.isin(self.studies)]
        # what is behind a figure: the runs of its backbones and methods, and the frozen references
        if self.tasks:
            runs = runs[runs.task.isin(self.tasks)]
        for name in {"backbone", "method"} & set(frame):
            runs = runs[runs[name].isin([*frame[name], "frozen"])]
        traced = "run_id" in frame
        return {
            "figure": self.what,
            "interval": TRACED if traced else self.interval,
            "n_seeds": "1" if traced else count(frame),
            "sources": sorted(set(frame.run_id if traced else runs.run_id)),
        }


def tree_picture(
    name: str,
    what: str,
    frame: Callable[[Trees], pd.DataFrame],
    draw: Callable[[pd.DataFrame], Figure],
) -> Picture:
    """Return a figure of the trees of schedules."""
    return Picture(
        name,
        what,
        lambda all_records: frame(all_records.trees),
        draw,
        (claims.SCHEDULES,),
        interval=f"{stats.LEVEL:.0%}, {OVER_INSTANCES}",
    )


def values_of_adaptivity(trees: Trees) -> pd.DataFrame:
    """Return V by kind, splits and measures in rows of panels."""
    frame = answers.adaptivity(trees)
    frame = frame[frame.quantity.str.startswith("V, ")]
    kind = frame.quantity.str.removeprefix("V, ")
    return frame.assign(row=frame.split + ": " + frame.measure, kind=kind)


def regrets_in_hindsight(trees: Trees) -> pd.DataFrame:
    """Return the regret of every router at equal moves, splits in rows of panels."""
    frame = answers.regrets(trees)
    return frame[frame.measure == answers.HINDSIGHT].rename(columns={"split": "row"})


CHANGE = dots("change against the unchanged method, points", "change")
PICTURES = (
    Picture(
        "success",
        "test success",
        lambda all_records: records.success(all_records).rename(columns={"task": "row"}),
        dots("test success, percent"),
        tasks=(),
    ),
    Picture(
        "interaction",
        "test success, and share kept of what the frozen backbone could do",
        records.interaction,
        dots("percent of test items, and of what the frozen backbone could do"),
    ),
    Picture("cost_curves", "best dev reward so far by cost", costs.curves, costs.cost_curves),
    Picture("signal_traces", "reward and signal", signal.traces, signal.signal_traces),
    Picture(
        "threshold_sensitivity",
        "what stopping LoRA at a threshold of C1 gives up and saves",
        signal.thresholds,
        signal.threshold_sensitivity,
        tasks=(),
    ),
    Picture(
        "need_roc",
        "P(content) for hidden content against style needs",
        classifier.roc,
        classifier.need_roc,
        interval=f"{stats.LEVEL:.0%} score interval of the area over items (Newcombe)",
    ),
    Picture(
        "ablations",
        "change in test success, and in what is kept, by a changed setting",
        ablations.ablations,
        CHANGE,
        ("main", "ablations"),
    ),
    Picture(
        "controls",
        "change in test success, and in what is kept, of textgrad on style without the critique",
        partial(ablations.ablations, task="style", method="textgrad", study="controls"),
        CHANGE,
        ("main", "controls"),
        ("style",),
    ),
    Picture(
        "data_efficiency",
        "test success on math by number of training problems and what weights are trained on",
        data_efficiency.efficiency,
        data_efficiency.data_efficiency,
        ("data-efficiency",),
        ("math",),
    ),
    Picture(
        "stream",
        "dev reward through the stream",
        stream.curves,
        stream.stream,
        ("stream",),
        ("stream",),
    ),
    Picture(
        "cost_parts",
        "minutes of a run by kind of work",
        costs.parts,
        costs.cost_parts,
        interval="none: means",
    ),
    tree_picture(
        "adaptivity",
        "value of adaptivity, in hindsight and without bias",
        values_of_adaptivity,
        dots("value of adaptivity, points", "kind"),
    ),
    tree_picture(
        "regret",
        "regret of every router against the best path in hindsight",
        regrets_in_hindsight,
        dots("regret in test success, points", "router"),
    ),
    tree_picture(
        "signal_test",
        "AUROC of each cue for 'S is the better next move', by moves made",
        answers.by_moves,
        answers.cue_dots,
    ),
    tree_picture(
        "first_move",
        "what rewriting the prompt first brings, by share of style needs and how far the backbone follows prompts",
        partial(answers.first_moves, by=("style",)),
        answers.first_move_map,
    ),
)


def build_figures(all_records: Records, out: Path, images: bool) -> list[Path]:
    """Write the figures that the records allow (or only their numbers); returns the paths."""
    paths = []
    for picture in PICTURES:
        frame = picture.frame(all_records)
        if len(frame):
            drawn = picture.draw(frame) if images else None
            about = picture.about(all_records, frame)
            paths += figures.save_figure(drawn, frame, out / picture.name, about)
    return paths


# ---------------------------------------------------------------------------------------------- numbers, build, verify


def macro(*words: object) -> str:
    """Return a LaTeX command name: letters only, each run of them capitalised but the first; 0.5b is ZeroFiveB."""
    parts = re.findall(r"[A-Za-z]+|[0-9]", " ".join(map(str, words)))
    # "5" is called DIGIT FIVE
    parts = [unicodedata.name(p).split()[1].lower() if p.isdigit() else p for p in parts]
    name = "".join(part[0].upper() + part[1:] for part in parts)
    return name[:1].lower() + name[1:]


def tree_counts(grown: Trees) -> dict[str, int]:
    """Count what the nodes of trees that tuning has not seen say of edits and of the signal.

    `edits` are symbolic moves; of the accepted ones, test success is lower (lost) or higher (gained) than before.
    `nodes` are those that a move follows, unequal where the better move is known. C1 and C2 are small by the default
    thresholds.
    """
    unseen = grown.instances.index[grown.instances.split == "test"]
    nodes = grown.nodes[grown.nodes.index.isin(unseen, level="instance")]
    if nodes.empty:
        return {}
    after = DataFrame(
        {
            "move": nodes.index.get_level_values("schedule").str[-1:],
            "parent": [(instance, schedule[:-1]) for instance, schedule in nodes.index],
            # None after a numerical move
            "accepted": nodes.accepted.eq(True),
            "success": nodes["test.success"],
        }
    )
    after["change"] = after.success - after.parent.map(after.success)
    edits = after[after.move == "S"]
    accepted = edits[edits.accepted]
    inner = inner_nodes(grown)
    inner = inner[inner.instance.isin(unseen)]
    numerical, default = nodes[after.move == "N"], RunConfig()
    c1, c2 = numerical["signal.c1"].dropna(), numerical["signal.c2"].dropna()
    return {
        "edits": len(edits),
        "editsAccepted": len(accepted),
        "editsLost": sum(accepted.change < 0),
        "editsGained": sum(accepted.change > 0),
        "nodes": len(inner),
        "nodesUnequal": sum(inner.prefers.abs() > 1e-9),
        "cOneNodes": len(c1),
        "cOneSmall": sum(c1 > -default.c1_eps),
        "cTwoNodes": len(c2),
        "cTwoSmall": sum(c2 < default.c2_eps),
    }


def numbers(all_records: Records, judged: Json) -> str:
    """Return one \\newcommand per number.

    They are what is made of a study, percentages of the main table, and verdicts and estimates of every claim.
    """
    trees_left = sum(study == claims.SCHEDULES for study, _ in all_records.missing)
    values: dict[str, str] = {
        "runs": str(len(all_records.runs)),
        "runsLeft": str(len(all_records.missing) - trees_left),
        "trees": str(sum(all_records.trees.instances.split == "test")),
        "treesLeft": str(trees_left),
        "treesTuning": str(sum(all_records.trees.instances.split == "tuning")),
        **{name: str(n) for name, n in tree_counts(all_records.trees).items()},
    }
    for row in records.success(all_records).itertuples():
        name = macro("success", row.task, row.backbone, row.method)
        ends = {"": row.mean, "Low": row.low, "High": row.high}
        values |= {name + end: percent(value) for end, value in ends.items()}
    for claim in judged["claims"]:
        # over all backbones, then on each
        said = {"": claim["verdict"], **claim["backbones"]}
        for backbone, verdict in said.items():
            values[macro("claim", claim["key"], "verdict", backbone)] = verdict
        words = list(dict.fromkeys(row["comparison"] for row in claim["comparisons"]))
        for row in claim["comparisons"]:
            i = words.index(row["comparison"]) + 1 if len(words) > 1 else ""
            where = "" if row["backbone"] == "all" else row["backbone"]
            for part in ("estimate", "low", "high"):
                values[macro("claim", claim["key"], i, part, where)] = percent(row[part])
            values[macro("claim", claim["key"], i, "seeds", where)] = str(row["n"])
    return "".join(f"\\newcommand{{\\{name}}}{{{value}}}\n" for name, value in values.items())


def build(results: Path, out: Path | None = None, images: bool = True) -> list[Path]:
    """Rebuild tables, figures, numbers.tex and claims.json of `results` (into `out`, if given); returns the paths.

    Files that earlier versions or records left in their folders are removed.
    """
    out = out or results
    all_records = load(results)
    judged = claims.judged(all_records)
    paths = [out / "claims.json", out / "numbers.tex"]
    write_json(paths[0], judged)
    write_text(paths[1], numbers(all_records, judged))
    paths += data_efficiency.save_dataset(results, out / "remade")
    paths += build_tables(all_records, judged, out / "tables")
    paths += build_figures(all_records, out / "figures", images)
    # without images the pictures that are there are still good
    stale = {path for name in MADE for path in out.glob(f"{name}/*")} if images else set()
    for path in stale - set(paths):
        path.unlink()
    return paths


def disagreements(all_records: Records) -> list[str]:
    """Return where a receipt or a node and its graded items disagree, one sentence each."""
    runs = all_records.runs.set_index("run_id").to_dict("index")
    means = all_records.scores.groupby(["run_id", "split"])[records.PARTS].mean()
    said = trees.disagreements(all_records.trees)
    for (run_id, split, part), mean in means.stack().items():
        place = "factorial" if split in records.FACTORIAL else "final"
        stored = runs[run_id].get(f"{place}.{split}.{part}", np.nan)
        # `not <=`, so that a missing number is a disagreement
        if not abs(mean - stored) <= 1e-6:
            said.append(f"{run_id}: run.json and scores.csv disagree on {split} {part}.")
    return said


def begun(results: Path) -> bool:
    """Tell whether a folder of results holds a record, or anything that is made from records."""
    patterns = ("claims.json", *(f"{name}/*" for name in ("records", *MADE)))
    return any(path for pattern in patterns for path in results.glob(pattern))


def verify(results: Path) -> list[str]:
    """Return where stored files differ from what the records give, one sentence each; images are not compared."""
    differences = disagreements(load(results))
    if not begun(results):
        return differences
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        fresh = {path.relative_to(made) for path in build(results, made, images=False)}
        stored = {path.relative_to(results) for name in MADE for path in results.glob(f"{name}/*")}
        # images are made anew by `build`, not compared
        stored = {path for path in stored if path.suffix not in (".pdf", ".png")}
        for path in sorted(fresh | stored):
            if path not in fresh:
                differences.append(f"{path} is stored but does not follow from the records.")
            elif not (results / path).exists():
                differences.append(f"{path} is missing.")
            elif (results / path).read_bytes() != (made / path).read_bytes():
                differences.append(f"{path} differs from what the records give.")
    return differences


def run_picture(record: Path) -> Figure:
    """Draw one finished run at a glance (a record folder): reward and loss per move."""
    run = records.read([record])
    shown = ["dev.value", "hidden.dev.content", "hidden.dev.style", "evidence.loss"]
    steps = records.complete(run.steps, shown)[["step", "move", *shown]]
    return figures.run_picture(steps.rename(columns=lambda name: name.rpartition(".")[2]))
