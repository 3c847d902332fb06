"""What we claim, as data: each claim is comparisons of run records, judged backbone by backbone."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from nslora.config import RunConfig
from nslora.study import classifier, stats, stream
from nslora.study.records import SCHEDULES, Records, estimate, paired
from nslora.study.schedules import Trees, answers
from nslora.study.schedules.routers import begun, ends_by, ends_of
from nslora.study.schedules.trees import NODE, difference, schedules, scored
from nslora.study.stats import AREA, DIFFERENCE, SHARE, Bounds, Interval
from nslora.tasks import bigbench
from nslora.types import Json

# Numbers by `backbone` and `seed`: the column `value`, and what `records.estimate` needs for its floor.
Values = Callable[[Records], DataFrame]
SHOWN = "points [interval]"
NOT_RUN, UNDECIDED, HOLDS, FAILS = "not run", "undecided", "holds", "fails"
# runs or trees that were registered for it are missing: what is shown is no verdict
INCOMPLETE = "incomplete"


def every_tree(trees: Trees) -> Trees:
    """Return all trees: what a comparison is about that chooses none."""
    return trees


@dataclass(frozen=True)
class Comparison:
    """A number that a claim says is above a bound.

    Attributes:
        words: what the number is.
        values: the number per run or item, from the records of `study`.
        bound: what it has to exceed.
        bounds: its possible range.
        task: the comparison is due on the backbones on which the study ran this task; empty for any task.
        study: the study whose runs it compares; `schedules` compares ends of trees, a value per instance.
        among: chooses the trees that it is about.
    """

    words: str
    values: Values
    bound: float = 0.0
    bounds: Bounds = DIFFERENCE
    task: str = "mixed"
    study: str = "main"
    among: Callable[[Trees], Trees] = every_tree

    def due(self, records: Records) -> list[str]:
        """Return the backbones on which the study ran the task."""
        runs = records.of(self.study).runs
        if self.study == SCHEDULES:
            runs = self.among(confirmed(records.trees)).instances
        return sorted(set(runs.backbone[(runs.task == self.task) | (self.task == "")]))


# ---------------------------------------------------------------------------------------------- comparisons


def remade(records: Records) -> DataFrame:
    """Return success on math of weights trained on own verified working minus on bare results, per item."""
    scores = records.with_settings(records.scores, "targets")
    return paired(scores[scores.task == "math"], "verified", "gold", "targets")


def areas(rows: DataFrame) -> DataFrame:
    """Return AUROC - 0.5 of `score` for `label` per backbone and seed, without those of one class only."""
    values = []
    for key, group in rows.groupby(["backbone", "seed"]):
        area = stats.auroc_interval(group.label, group.score)
        values.append((*key, area.mean - 0.5, area.variance))
    return DataFrame(values, columns=["backbone", "seed", "value", "variance"]).dropna()


def needs_estimated(records: Records) -> DataFrame:
    """Return how well P(content) of failing training items tells hidden content needs from style needs."""
    return areas(classifier.one_need(classifier.estimated_needs(records)))


def requests_avoided(records: Records) -> DataFrame:
    """Return the share of textgrad's editor requests that neurosymbolic does not make, replayed ones included.

    Below 0 where it makes more.
    """
    runs = records.runs[records.runs.task == "mixed"]
    # what was replayed from a recording was a request all the same
    requests = runs.assign(requests=runs["editor.calls"] + runs["editor.replayed"])
    key = ["backbone", "seed", "rule", "instance"]
    wide = requests.pivot_table(index=key, columns="method", values="requests")
    wide = wide.reindex(columns=["neurosymbolic", "textgrad"]).astype(float).dropna()
    avoided = (1 - wide.neurosymbolic / wide.textgrad.clip(lower=1)).clip(lower=-1)
    variance = stats.share_variance(avoided.clip(lower=0), wide.textgrad)
    return DataFrame({"value": avoided, "variance": variance}).reset_index()


def regret_saved(other: str) -> Comparison:
    """Compare regret of method `other` on the stream with that of neurosymbolic, by backbone, rule and seed."""

    def values(records: Records) -> DataFrame:
        runs = stream.regrets(stream.by_move(records))
        runs = runs.set_index(["backbone", "seed", "rule"])
        ours, theirs = (runs[runs.method == name] for name in ("neurosymbolic", other))
        value, variance = theirs.regret - ours.regret, theirs.variance + ours.variance
        return DataFrame({"value": value, "variance": variance}).dropna().reset_index()

    words = f"regret on the stream: {other} - neurosymbolic"
    return Comparison(words, values, task="stream", study="stream")


def confirmed(trees: Trees) -> Trees:
    """Return the trees that decide claims: those of the test split, on which nothing was chosen."""
    return trees.where(trees.instances.split == "test")


def on_trees(
    words: str,
    values: Callable[[Trees], DataFrame],
    bound: float = 0.0,
    bounds: Bounds = DIFFERENCE,
    among: Callable[[Trees], Trees] = every_tree,
) -> Comparison:
    """Compare `values` of trees (of all splits) on those instances of the test split that `among` chooses."""

    def tested(records: Records) -> DataFrame:
        if records.trees.instances.empty:
            return DataFrame(columns=["backbone", "seed", "value", "variance"])
        frame = values(records.trees)
        return frame[frame.instance.isin(among(confirmed(records.trees)).instances.index)]

    return Comparison(words, tested, bound, bounds, task="", study=SCHEDULES, among=among)


def routers(
    a: str, b: str, bound: float = 0.0, among: Callable[[Trees], Trees] = every_tree
) -> Comparison:
    """Compare test success of two routers (keys of `routers.ROUTERS`) on the same trees."""
    words = f"test success on {KINDS.get(among, 'trees')}: {a} - {b}"
    return on_trees(words, lambda trees: answers.between(trees, a, b), bound, among=among)


def need_alone(trees: Trees, style: float) -> Series:
    """Tell of each tree whether all its items need content (`style` = 0), or all need style (1)."""
    return (trees.instances.task == "mixed") & (answers.style_share(trees) == style)


def facts_alone(trees: Trees) -> Trees:
    """Return the trees whose items need content and no style."""
    return trees.where(need_alone(trees, 0))


def style_alone(trees: Trees) -> Trees:
    """Return the trees whose items need style and no content."""
    return trees.where(need_alone(trees, 1))


def of_one_need(trees: Trees) -> Trees:
    """Return the trees of facts alone, of style alone, and of problems to work out."""
    return trees.where(
        need_alone(trees, 0) | need_alone(trees, 1) | (trees.instances.task == "math")
    )


def of_both_needs(trees: Trees) -> Trees:
    """Return the trees of facts and style together."""
    style = answers.style_share(trees)
    return trees.where((trees.instances.task == "mixed") & (style > 0) & (style < 1))


def followed(trees: Trees) -> Trees:
    """Return the trees of backbones that follow prompts as far as the default rule asks: elsewhere it tunes weights."""
    return trees.where(trees.instances.follows.astype(float) >= RunConfig().follows_floor)


def not_followed(trees: Trees) -> Trees:
    """Return the trees of backbones that follow prompts less than that."""
    return trees.where(trees.instances.follows.astype(float) < RunConfig().follows_floor)


def of_real_tasks(trees: Trees) -> Trees:
    """Return the trees of BIG-bench's tasks."""
    return trees.where(trees.instances.task.isin(list(bigbench.TASKS)))


# what a choice of trees is called
KINDS = {
    facts_alone: "trees of facts alone",
    style_alone: "trees of style alone",
    followed: "trees of backbones that follow prompts",
    not_followed: "trees of backbones that do not follow prompts",
    of_real_tasks: "trees of real tasks",
}


def against_fixed(records: Records) -> list[Comparison]:
    """Compare neurosymbolic, where prompts are followed, with every schedule of full depth that is fixed in advance."""
    depths = confirmed(records.trees).instances.depth
    depth = int(depths.max()) if len(depths) else 1
    return [against(schedule) for schedule in schedules(depth) if len(schedule) == depth]


def against(schedule: str) -> Comparison:
    """Compare neurosymbolic with one fixed schedule."""
    words = f"test success on {KINDS[followed]}: neurosymbolic - {schedule}"

    def as_deep(trees: Trees) -> Trees:
        here = followed(trees)
        return here.where(here.instances.depth == len(schedule))

    return on_trees(words, lambda trees: beyond(trees, schedule), among=as_deep)


def beyond(trees: Trees, schedule: str) -> DataFrame:
    """Return test success of neurosymbolic minus that of one schedule for all ("": of the frozen backbone)."""
    deep_enough = trees.instances.index[trees.instances.depth >= len(schedule)]
    fixed = ends_of(Series(schedule, index=deep_enough))
    return difference(trees, ends_by(trees, "neurosymbolic"), fixed)


def not_worse(trees: Trees) -> DataFrame:
    """Return success of neurosymbolic minus that of one kind of move, the kind being chosen on dev of each instance."""
    pure = [ends_by(trees, name) for name in ("weights only", "prompts only")]
    ends = pd.concat(pure).set_index(NODE)
    on_dev = trees.nodes.dev.reindex(ends.index)
    # weights come first and are kept where both are equal
    better = on_dev.groupby("instance").idxmax()
    return difference(trees, ends_by(trees, "neurosymbolic"), ends.loc[better].reset_index())


def kept(trees: Trees) -> DataFrame:
    """Return the share of known facts that neurosymbolic adaptation keeps, per instance."""
    ends = scored(trees, ends_by(trees, "neurosymbolic"))
    places = zip(ends.instance, ends.returned, strict=True)
    value = trees.nodes.locality.reindex(places).to_numpy(float)
    known = trees.instances.known.reindex(ends.instance).to_numpy(float)
    columns = ends[["instance", "family", "split", "backbone"]]
    rows = columns.assign(seed=range(len(ends)), value=value)
    return rows.assign(variance=stats.share_variance(value, known)).dropna()


def adaptivity(trees: Trees) -> DataFrame:
    """Return V of each instance, its schedule chosen on dev and the fixed one on other instances of its backbone."""
    return answers.between(trees, "all, best on dev", "best fixed")


def prompt_first(trees: Trees) -> DataFrame:
    """Return success of all schedules S... minus that of all N..., of full depth."""
    return difference(trees, begun(trees, "S"), begun(trees, "N"))


# by key: a sentence, which holds on a backbone if every one of its comparisons does there; some depend on what was run
CLAIMS: dict[str, tuple[str, list[Comparison] | Callable[[Records], list[Comparison]]]] = {
    "facts-numerical": (
        "New facts are learned by tuning weights rather than by rewriting prompts.",
        [routers("weights only", "prompts only", among=facts_alone)],
    ),
    "style-symbolic": (
        "Style rules are learned by rewriting prompts rather than by tuning weights.",
        [routers("prompts only", "weights only", among=style_alone)],
    ),
    "beats-both": (
        "Deciding beats prompts alone and, where prompts are followed, weights alone, all with the same targets.",
        [
            # else it is weights alone
            routers("neurosymbolic", "weights only", among=followed),
            routers("neurosymbolic", "prompts only"),
        ],
    ),
    "beats-fixed": (
        "Where prompts are followed, deciding beats every schedule that is fixed in advance.",
        against_fixed,
    ),
    "prompt-first": (
        "Where facts and style are asked for, rewriting the prompt first beats tuning the weights first.",
        [
            on_trees(
                "test success on trees of facts and style: schedules S... - N..., of equal length",
                prompt_first,
                among=of_both_needs,
            )
        ],
    ),
    "adaptivity-pays": (
        "Choosing a schedule for each instance beats the best schedule for all of them.",
        [on_trees("V: test success of the schedule chosen on dev - best fixed", adaptivity)],
    ),
    "deciding-pays": (
        "Where prompts are followed, deciding has less regret than the best fixed schedule.",
        # else the rule is a fixed schedule, weights alone
        [routers("neurosymbolic", "best fixed", among=followed)],
    ),
    "signal-adds": (
        "Where prompts are followed, the default rule gains by the monitoring signal; and the signal alone beats the "
        "best fixed schedule.",
        [
            routers("neurosymbolic", "neurosymbolic, no signal", among=followed),
            routers("monitor, tuned", "best fixed", among=followed),
        ],
    ),
    "needs-add": (
        "Where prompts are followed, the default rule gains by estimated needs; and needs alone beat the best fixed "
        "schedule.",
        [
            routers("neurosymbolic", "neurosymbolic, no needs", among=followed),
            routers("needs-only", "best fixed", among=followed),
        ],
    ),
    "following-adds": (
        "Where prompts are not followed, the default rule gains by knowing it.",
        [routers("neurosymbolic", "neurosymbolic, no following", among=not_followed)],
    ),
    "remade-data": (
        "A model's own verified working trains it better than bare results (math).",
        [
            Comparison(
                "test success on math: own verified working - bare results",
                remade,
                task="math",
                study="data-efficiency",
            )
        ],
    ),
    "not-worse": (
        "Where there is one need, deciding between both moves loses at most 10 points against the better one alone.",
        [
            on_trees(
                "test success on trees of one need: neurosymbolic - the move alone that is better on dev",
                not_worse,
                -0.1,
                among=of_one_need,
            )
        ],
    ),
    "real-tasks": (
        "On real tasks, graded by exact match, adaptation helps, and deciding loses at most 5 points against weights.",
        [
            on_trees(
                "test success on trees of real tasks: neurosymbolic - frozen",
                lambda trees: beyond(trees, ""),
                among=of_real_tasks,
            ),
            routers("neurosymbolic", "weights only", -0.05, of_real_tasks),
        ],
    ),
    "knowledge-kept": (
        "Neurosymbolic adaptation keeps nine tenths of what the backbone knew.",
        [on_trees("share of facts kept by neurosymbolic on trees", kept, 0.9, SHARE)],
    ),
    "need-classifier": (
        "Which inputs need content and which need style can be told from the reward.",
        [
            Comparison(
                "AUROC - 0.5 of P(content) for hidden content against style needs",
                needs_estimated,
                bounds=AREA,
            )
        ],
    ),
    "editor-asked-less": (
        "Deciding asks the external LLM at least a quarter less often than rewriting prompts alone.",
        [
            Comparison(
                "share of textgrad's editor requests that neurosymbolic avoids on mixed",
                requests_avoided,
                0.25,
            )
        ],
    ),
    "adaptability": (
        "Where prompts are followed, both moves together lose less than either alone when facts arrive and the style "
        "changes.",
        # which know as little of the phases to come
        [regret_saved("lora-remade"), regret_saved("textgrad")],
    ),
}


# ---------------------------------------------------------------------------------------------- verdicts


def rounded(value: float) -> float | None:
    """Return six decimals, and None for NaN, so that JSON stays strict and alike on every machine."""
    return None if np.isnan(value) else round(value, 6) + 0.0


def result(comparison: Comparison, backbone: str, interval: Interval) -> Json:
    """Return one row of claims.json; `n` counts seeds or instances, `p` is one-sided and before Holm's adjustment."""
    bound = comparison.bound
    above = f" (above {100 * bound:.0f} points)" if bound else ""
    mean, low, high, n = interval.row
    return {
        "comparison": comparison.words + above,
        "backbone": backbone,
        "estimate": rounded(mean),
        "low": rounded(low),
        "high": rounded(high),
        "n": n,
        "bound": bound,
        "p": rounded(interval.p_above(bound)),
        "below": interval.below(bound),
    }


def compare(comparison: Comparison, records: Records) -> list[Json]:
    """Return a row for each backbone on which the comparison is due, and the pooled one ("all") last."""
    values = comparison.values(records.of(comparison.study))
    # a backbone on which the comparison is due and was not run keeps its row, with n = 0
    intervals = {
        backbone: estimate(values[values.backbone == backbone], comparison.bounds)
        for backbone in comparison.due(records)
    }
    intervals["all"] = stats.pooled([interval for interval in intervals.values() if interval.n])
    return [result(comparison, *pair) for pair in intervals.items()]


def worst(p_values: Iterable[float | None]) -> float:
    """Return the p-value of "all of these hold", the largest (intersection-union); NaN where one was not tested."""
    values = [np.nan if p is None else p for p in p_values]
    return max(values) if values and not np.isnan(values).any() else np.nan


def verdict(rows: list[Json], p: float, whole: bool = True) -> str:
    """Return the verdict of comparisons that have to hold together, given their adjusted p-value."""
    if not any(row["n"] for row in rows):
        return NOT_RUN
    if not whole:
        return INCOMPLETE
    if any(row["below"] for row in rows):
        return FAILS
    return HOLDS if p < stats.ALPHA else UNDECIDED


def judged(records: Records) -> Json:
    """Judge all claims; the result is what claims.json holds.

    On a backbone a claim's p-value is the largest of its comparisons, over all backbones the largest of theirs
    (intersection-union); both are adjusted for the number of claims, run or not (Holm). A claim `holds` below ALPHA,
    so that every 95% interval lies above its bound, and `fails` where one lies below it. Pooled rows decide nothing.
    Of a registered study a claim is `incomplete` until every run (or tree) is made of the blocks that it compares.
    Others may come later: whatever they say, Holm's adjustment then is no stricter, so that what holds holds.
    """
    lacking = {study for study, _ in records.missing}
    rows, whole = {}, {}
    for key, (_, listed) in CLAIMS.items():
        due = listed(records) if callable(listed) else listed
        whole[key] = lacking.isdisjoint(comparison.study for comparison in due)
        rows[key] = [row for comparison in due for row in compare(comparison, records)]
    backbones = sorted({row["backbone"] for own in rows.values() for row in own} - {"all"})
    # "all" first: each claim by its worst backbone, adjusted among claims; then the same within each backbone
    adjusted = {}
    for backbone in ["all", *backbones]:
        # what half a study says must not help the others
        tested = {
            key: p_value(own, backbone) if whole[key] else np.nan for key, own in rows.items()
        }
        adjusted[backbone] = stats.holm(tested)
    claims = []
    for key, (text, _) in CLAIMS.items():
        own, p = on_backbones(rows[key]), adjusted["all"][key]
        verdicts = {}
        for name in backbones:
            if due := [row for row in own if row["backbone"] == name]:
                verdicts[name] = verdict(due, adjusted[name][key], whole[key])
        claim = {"key": key, "claim": text, "verdict": verdict(own, p, whole[key]), "p": rounded(p)}
        claims.append({**claim, "backbones": verdicts, "comparisons": rows[key]})
    return {"level": stats.LEVEL, "alpha": stats.ALPHA, "claims": claims}


def points(row: Json) -> str:
    """Return the estimate of a row of claims.json with its interval, in points or percent."""
    if not row["n"]:
        return NOT_RUN
    if row["low"] is None:
        return f"{100 * row['estimate']:.1f} (one seed)"
    return f"{100 * row['estimate']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def comparisons(judged: Json) -> DataFrame:
    """Return every comparison of every claim, per backbone and pooled ("all"), as numbers and as text."""
    rows = [
        {"claim": claim["key"], "sentence": f"{claim['verdict']}: {claim['claim']}", **row}
        | {SHOWN: points(row), "verdict": claim["backbones"].get(row["backbone"], "")}
        for claim in judged["claims"]
        for row in claim["comparisons"]
    ]
    return DataFrame(rows)


def table(records: Records, *keys: str) -> DataFrame:
    """Return some claims with their verdicts and the comparisons behind them, for a notebook to show."""
    rows = comparisons(judged(records))
    rows = rows[rows.claim.isin(keys)].set_index(["sentence", "comparison", "backbone"])
    return rows[[SHOWN, "n", "verdict"]]


def pooled(claim: Json) -> list[Json]:
    """Return the pooled rows of a claim of claims.json."""
    return [row for row in claim["comparisons"] if row["backbone"] == "all"]


def on_backbones(rows: list[Json]) -> list[Json]:
    """Return the rows that decide: all but the pooled ones."""
    return [row for row in rows if row["backbone"] != "all"]


def p_value(rows: list[Json], backbone: str) -> float:
    """Return a claim's p-value on a backbone, or on all that ran any of it ("all")."""
    own = on_backbones(rows)
    if backbone != "all":
        return worst(row["p"] for row in own if row["backbone"] == backbone)
    ran = [row for row in own if row["n"]]
    # every comparison has to have been run somewhere
    if {row["comparison"] for row in rows} > {row["comparison"] for row in ran}:
        return np.nan
    where = {row["backbone"] for row in ran}
    return worst(row["p"] for row in own if row["backbone"] in where)
