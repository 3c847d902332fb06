"""Training data for the need classifier: try both moves and see which raised each reward more.

A probe adapts one backbone to one task and rule, in three states, since inputs are classified all
along a run: the frozen start, after weights only, and after prompts only. Probes have seeds of their
own, so no experiment's invented facts are seen.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pandas import DataFrame

from nslora.algorithm import loop, needs
from nslora.algorithm.router import Choice
from nslora.algorithm.session import Session, State
from nslora.config import RunConfig
from nslora.model.backbone import load
from nslora.runs.run import open_editor
from nslora.runs.store import Store, write_json
from nslora.study.claims import rounded
from nslora.study.stats import auroc
from nslora.tasks.build import build
from nslora.types import Candidate, Json, Move, Scored

# of the first probe; experiments use smaller seeds
SEED = 1000
# by number: task and rule
PROBES = (
    ("mixed", "end_phrase"),
    ("mixed", "bullet"),
    ("mixed", "json"),
    ("mixed", "max_words"),
    # which has no rule
    ("math", "end_phrase"),
)
SIZES = {"items": 4, "test_items": 4, "candidates": 2, "feedback": 1, "replay": 0.0}
# numerical moves before "weights" (and half as many after), symbolic ones
EPOCHS, EDITS = 2, 2
PACKAGED = Path(needs.__file__).with_name("needs.json")


def configure(cfg: RunConfig, number: int) -> RunConfig:
    """Return the settings of the `number`-th probe, for the backbone and learning rate of `cfg`."""
    task, rule = PROBES[number]
    where = {"task": task, "rule": rule, "seed": SEED + number, "study": "single"}
    # remade targets let weights bring style too, and nearly every label says content
    return cfg.but(
        **where,
        **SIZES,
        method="alternate",
        targets="gold",
        needs="method",
        # labels say what a whole adapter does
        shrink=False,
    )


def run(cfg: RunConfig, place: Store) -> Path:
    """Make one probe and return the CSV of its rows in the results folder."""
    with open_editor(cfg, place) as editor:
        backbone = load(cfg.backbone, threads=cfg.threads)
        session = Session(
            cfg,
            build(cfg),
            backbone,
            editor,
            place.begin(cfg),
            place.memo,
        )
        frame = collect(session)
    rule = f"-{cfg.rule}" if cfg.task == "mixed" else ""
    path = place.results / f"probe-{cfg.backbone}-{cfg.task}{rule}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    return path


def collect(session: Session, epochs: int = EPOCHS, edits: int = EDITS) -> DataFrame:
    """Return one row per training fact and state: features, counterfactual label, hidden need.

    The label is nan at a tie.
    """
    frozen = loop.begin(session, State(Candidate(session.task.initial_prompt)))
    x_frozen = needs.describe(session, frozen)

    prompt = make_moves(session, frozen, Move.SYMBOLIC, edits)
    x_prompt = needs.describe(session, prompt)

    weights = make_moves(session, frozen, Move.NUMERICAL, epochs)
    x_weights = needs.describe(session, weights)
    # both: the tuned weights under the rewritten prompt
    both = session.score(prompt.candidate.prompt, session.task.feedback)
    longer = make_moves(session, weights, Move.NUMERICAL, max(1, epochs // 2))

    frames = [
        rows(session, "frozen", frozen.train, x_frozen, weights.train, prompt.train),
        rows(session, "weights", weights.train, x_weights, longer.train, both),
        rows(session, "prompt", prompt.train, x_prompt, both, prompt.train),
    ]
    return pd.concat(frames)


def make_moves(session: Session, state: State, move: Move, count: int) -> State:
    """Make `count` moves of one kind from a state whose weights are in place."""
    for _ in range(count):
        estimated = needs.none(session, state)
        outcome = loop.MOVES[move](session, state, estimated)
        state = loop.after(session, state, estimated, Choice(move, "a probe"), outcome)
    return state


def rows(
    session: Session,
    state: str,
    before: Sequence[Scored],
    x: np.ndarray,
    numerical: Sequence[Scored],
    symbolic: Sequence[Scored],
) -> DataFrame:
    """Return one state's rows: features [N, F], and what each kind of move made of the rewards."""
    cfg = session.cfg
    features = DataFrame(x, columns=list(needs.FEATURES)).round(4)
    return features.assign(
        fact=[f"s{cfg.seed}-{s.example.fact}" for s in before],
        state=state,
        label=needs.counterfactual(before, numerical, symbolic),
        need=[session.task.hidden[s.example.id].need.value for s in before],
        backbone=cfg.backbone,
        task=cfg.task,
        rule=cfg.rule if cfg.task == "mixed" else "none",
    )


def train(folder: Path, packaged: Path = PACKAGED) -> Json:
    """Fit the classifier on every probe in `folder`, and write it and its report.

    The report holds AUROC on probes that were left out of the fit, for the classifier and for each
    feature alone.
    """
    frame = needs.probes(folder)
    x, y = frame[list(needs.FEATURES)].to_numpy(), frame["label"].to_numpy()
    needs.fit(x, y, frame["fact"].to_numpy()).save(packaged)
    content = int(y.sum())
    report: Json = {
        "rows": len(frame),
        "content": content,
        "style": len(frame) - content,
        "probes": int(frame.groupby(["backbone", "task", "rule"]).ngroups),
    }
    for column in ("task", "backbone", "rule"):
        report[f"leave one {column} out"] = left_out(frame, column)
    write_json(folder / "report.json", report)
    return report


def left_out(frame: DataFrame, column: str) -> dict[str, dict[str, float | None]]:
    """Return AUROC for content per left-out value of `column`, of the classifier and each feature.

    A feature's sign is that of its AUROC on the rows that were not left out. None where the rows
    left out, or the others, have labels of one kind only.
    """
    names = list(needs.FEATURES)
    areas: dict[str, dict[str, float | None]] = {}
    for value in sorted(frame[column].unique()):
        inside, outside = frame[frame[column] != value], frame[frame[column] == value]
        # [rows left out] per score
        scores = {}
        if inside.label.nunique() == 2:
            model = needs.fit(*(inside[key].to_numpy() for key in (names, "label", "fact")))
            scores["classifier"] = model.p_content(outside[names].to_numpy())
        for name in names:
            # without both labels no sign can be learned, and the feature says nothing
            over_chance = np.nan_to_num(auroc(inside.label, inside[name]) - 0.5)
            scores[name] = np.sign(over_chance) * outside[name]
        areas[value] = {name: rounded(auroc(outside.label, scores[name])) for name in scores}
    return areas
