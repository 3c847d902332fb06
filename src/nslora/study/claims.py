"""The paper's claims, and five of ours, as data: each a comparison of run records, with an interval and a verdict."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nslora.study import data_efficiency, signal, stats, stream
from nslora.study.records import MEASURES, UNIT, Records, estimate, paired

Values = Callable[[Records], pd.Series]  # numbers indexed by backbone, seed and anything else


@dataclass(frozen=True)
class Comparison:
    """A number that the claim says is above `least`; `words` say what it is."""

    words: str
    values: Values
    least: float = 0.0

    @property
    def text(self) -> str:
        """The words, with the bound where it is not 0."""
        return f"{self.words} (above {100 * self.least:.0f} points)" if self.least else self.words


@dataclass(frozen=True)
class Claim:
    """A sentence that holds if every comparison does, and fails if any does."""

    key: str
    text: str
    comparisons: tuple[Comparison, ...]


def methods(a: str, b: str, task: str, least: float = 0.0) -> Comparison:
    """Test success of method `a` minus method `b`, paired by seed and item, in the main comparison."""

    def values(records: Records) -> pd.Series:
        scores = records.main.scores
        return paired(scores[scores.task == task], a, b)

    return Comparison(f"test success on {task}: {a} - {b}", values, least)


def known_kept(records: Records) -> pd.Series:
    """Per item that the frozen backbone gets right: is it still right after neurosymbolic adaptation (task mixed)?"""
    scores = records.main.scores
    split, metric = MEASURES["known facts kept"]
    kept = (scores.task == "mixed") & (scores.split == split) & (scores.method == "neurosymbolic")
    return scores[kept].set_index(UNIT)[metric]


def without(settings: pd.Series, *names: str) -> pd.Series:
    """Settings (JSON) less the named ones, so that runs which differ in nothing else can be paired."""
    return settings.str.replace(rf'"({"|".join(names)})": ("\w+"|\d+)', "", regex=True)


def remade(records: Records) -> pd.Series:
    """Test success on math: trained on remade answers minus raw ones, paired by all other settings, seed and item."""
    scores = records.scores[records.scores.task == "math"]
    target = scores.settings.str.extract(r'"targets": "(\w+)"', expand=False)
    rest = without(scores.settings, "targets")
    return paired(
        scores.assign(targets=target, settings=rest), "verified", "gold", factor="targets"
    )


def remade_again(records: Records) -> pd.Series:
    """Test success on math of remade answers alone: two rounds minus one of as many epochs, paired by item."""
    scores = data_efficiency.study(records)
    scores = scores.assign(settings=without(scores.settings, "moves", "epochs"))[
        scores.targets == "verified"
    ]
    return paired(scores, *data_efficiency.AGAIN, factor="schedule")


def area(rows: pd.DataFrame) -> pd.Series:
    """AUROC - 0.5 of `score` for `label` per backbone and seed; those with one class only are left out."""
    groups = {
        key: stats.auroc(group.label, group.score) - 0.5
        for key, group in rows.groupby(["backbone", "seed"])
    }
    index = (
        pd.MultiIndex.from_tuples(list(groups), names=["backbone", "seed"])
        if groups
        else area_index()
    )
    return pd.Series(list(groups.values()), index, dtype=float).dropna()


def area_index() -> pd.MultiIndex:
    """No backbone and no seed."""
    return pd.MultiIndex.from_arrays([[], []], names=["backbone", "seed"])


def saturation(column: str, sign: float) -> Values:
    """How well a signal of `lora` runs tells that later moves bring less than gain_eps of dev reward (any task)."""

    def values(records: Records) -> pd.Series:
        moves = signal.lora_moves(records)
        known = moves[(moves.later > 0) & moves[column].notna()]
        return area(known.assign(label=known.left < known.gain_eps, score=sign * known[column]))

    return values


def needs_told(records: Records) -> pd.Series:
    """How well P(content) of failing training items tells hidden content needs from style needs (task mixed)."""
    return area(signal.one_need(signal.predicted_needs(records)))


def calls_avoided(records: Records) -> pd.Series:
    """Share of textgrad's editor requests that neurosymbolic does not make (task mixed), replayed ones included."""
    runs = records.main.runs
    runs = runs[(runs.task == "mixed") & runs.method.isin(("neurosymbolic", "textgrad"))]
    if runs.empty:
        return pd.Series(index=area_index(), dtype=float)
    requests = (runs["editor.calls"] + runs["editor.replayed"]).astype(float)
    wide = runs.assign(requests=requests).pivot(
        index=["backbone", "seed", "rule"], columns="method", values="requests"
    )
    wide = wide.reindex(columns=["neurosymbolic", "textgrad"])
    return (1 - wide.neurosymbolic / wide.textgrad.where(wide.textgrad > 0)).dropna()


def regret_saved(other: str) -> Comparison:
    """Regret of method `other` minus that of neurosymbolic on the stream, by backbone, rule and seed."""

    def values(records: Records) -> pd.Series:
        runs = stream.regrets(stream.by_move(records))
        wide = runs.pivot(index=["backbone", "seed", "rule"], columns="method", values="regret")
        wide = wide.reindex(columns=["neurosymbolic", other]).astype(float)
        return (wide[other] - wide.neurosymbolic).dropna()

    return Comparison(f"regret on the stream: {other} - neurosymbolic", values)


CLAIMS = (
    Claim(
        "facts-numerical",
        "New facts are learned by tuning weights rather than by rewriting prompts.",
        (methods("lora", "textgrad", "facts"),),
    ),
    Claim(
        "style-symbolic",
        "Style rules are learned by rewriting prompts rather than by tuning weights.",
        (methods("textgrad", "lora", "style"),),
    ),
    Claim(
        "saturation-signal",
        "A small relative change of the loss and a small gradient norm tell that LoRA saturated.",
        (
            Comparison(
                "AUROC - 0.5 of C1 for 'later LoRA moves bring nothing'", saturation("c1", 1.0)
            ),
            Comparison(
                "AUROC - 0.5 of -C2 for 'later LoRA moves bring nothing'", saturation("c2", -1.0)
            ),
        ),
    ),
    Claim(
        "need-classifier",
        "A classifier of rewards tells which inputs need content and which need style.",
        (
            Comparison(
                "AUROC - 0.5 of P(content) for hidden content versus style needs", needs_told
            ),
        ),
    ),
    Claim(
        "editor-only-when-needed",
        "The external LLM is called only when it is needed.",
        (
            Comparison(
                "share of textgrad's editor requests avoided by neurosymbolic on mixed",
                calls_avoided,
            ),
        ),
    ),
    Claim(
        "remade-data",
        "Data remade under refined prompts trains better than raw data where data are scarce (math).",
        (Comparison("test success on math: remade - raw answers", remade),),
    ),
    Claim(
        "beats-both",
        "Neurosymbolic adaptation beats purely numerical and purely symbolic adaptation.",
        (methods("neurosymbolic", "lora", "mixed"), methods("neurosymbolic", "textgrad", "mixed")),
    ),
    Claim(
        "adaptability",
        "When facts arrive and the style changes, both moves together lose less than either alone.",
        (regret_saved("lora"), regret_saved("textgrad")),
    ),
    Claim(
        "not-worse",
        "Where one kind of move is enough, deciding between both loses nothing against it.",
        (
            methods("neurosymbolic", "lora", "facts", least=-0.03),
            methods("neurosymbolic", "textgrad", "style", least=-0.03),
            methods("neurosymbolic", "lora", "style", least=-0.03),
            methods("neurosymbolic", "lora", "math", least=-0.03),
            methods("neurosymbolic", "textgrad", "math", least=-0.03),
        ),
    ),
    Claim(
        "remade-again",
        "Remaking and training a second time adds to the first (math).",
        (Comparison("test success on math: remade twice - once, as many epochs", remade_again),),
    ),
    Claim(
        "near-demonstrated",
        "Shown no styled answer, both moves together come close to LoRA that is shown them.",
        (methods("neurosymbolic", "lora-demonstrated", "mixed", least=-0.05),),
    ),
    Claim(
        "knowledge-kept",
        "Neurosymbolic adaptation keeps what the backbone knew.",
        (Comparison("share of known facts kept by neurosymbolic on mixed", known_kept, least=0.9),),
    ),
)


def pooled(values: pd.Series) -> pd.Series:
    """The values of backbones with at least LEAST_SEEDS seeds (of all, if none has), at the seeds they share."""
    seeds = {
        key: set(group.index.get_level_values("seed")) for key, group in values.groupby("backbone")
    }
    seeds = {key: own for key, own in seeds.items() if len(own) >= stats.LEAST_SEEDS} or seeds
    shared = set.intersection(*seeds.values()) if seeds else set()
    levels = values.index.get_level_values
    return values[levels("backbone").isin(list(seeds)) & levels("seed").isin(list(shared))]


def rounded(value: float) -> float | None:
    """Six decimals, and None for what is not known, so that JSON stays strict and alike on every machine."""
    return None if np.isnan(value) else round(value, 6) + 0.0


def result(comparison: Comparison, backbone: str, values: pd.Series) -> dict[str, Any]:
    """One row of claims.json; `n` counts seeds."""
    interval = estimate(values)
    return {
        "comparison": comparison.text,
        "backbone": backbone,
        "backbones": sorted(set(values.index.get_level_values("backbone"))),
        "difference": rounded(interval.mean),
        "low": rounded(interval.low),
        "high": rounded(interval.high),
        "n": interval.n,
        "interval": interval.kind,
        "least": comparison.least,
        "verdict": stats.verdict(interval, comparison.least),
    }


def judge(claim: Claim, records: Records) -> dict[str, Any]:
    """The claim with its comparisons, pooled over backbones ("all", which the verdict rests on) and for each."""
    rows = []
    for comparison in claim.comparisons:
        values = comparison.values(records)
        rows.append(result(comparison, "all", pooled(values)))
        rows += [
            result(comparison, str(backbone), group)
            for backbone, group in values.groupby("backbone")
        ]
    verdicts = [row["verdict"] for row in rows if row["backbone"] == "all"]
    verdict = (
        "fails" if "fails" in verdicts else "undecided" if "undecided" in verdicts else "holds"
    )
    return {"key": claim.key, "claim": claim.text, "verdict": verdict, "comparisons": rows}


def judged(records: Records) -> dict[str, Any]:
    """All claims, as written to claims.json."""
    return {"level": stats.LEVEL, "claims": [judge(claim, records) for claim in CLAIMS]}


def told(records: Records, *keys: str) -> str:
    """The verdicts of the claims `keys` as lines to print, each followed by its comparisons with their intervals."""
    lines = []
    for claim in judged(records)["claims"]:
        if claim["key"] in keys:
            lines.append(f"{claim['verdict']:10} {claim['claim']}")
            rows = claim["comparisons"]
            lines += [
                f"{'':10} {row['backbone']}: {row['comparison']} = {measured(row)}" for row in rows
            ]
    return "\n".join(lines)


def measured(row: dict[str, Any]) -> str:
    """The difference of a row of claims.json, its interval and n, with three decimals."""
    value, low, high = (
        "?" if row[k] is None else f"{row[k]:.3f}" for k in ("difference", "low", "high")
    )
    return f"{value} [{low}, {high}], {row['n']} seeds" if row["n"] else "not run"
