"""Training data for the need classifier: try both moves on a probe set and see which raised each reward more.

Three states are probed, since inputs are classified all along a run: the frozen start, after weights only, and after
prompts only. Probe runs use seeds of their own, so no experiment's invented facts are seen; rules and the pool of known
questions are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from nslora.algorithm import moves, needs
from nslora.algorithm.session import Session
from nslora.config import RunConfig
from nslora.model.backbone import load
from nslora.runs.run import open_editor
from nslora.runs.store import Store, write_json
from nslora.study import stats
from nslora.tasks import build
from nslora.types import Candidate, Prompt, Scored

SEED, RULES = (
    1000,
    ("end_phrase", "bullet", "json"),
)  # of probe runs: experiments use seeds below 1000
PACKAGED = Path(needs.__file__).with_name("needs.json")


def configure(cfg: RunConfig, number: int) -> RunConfig:
    """The `number`-th probe run for the settings of an experiment: more edits, and two threads, since it runs alone."""
    changes = {
        "seed": SEED + number,
        "rule": RULES[number % len(RULES)],
        "candidates": 4,
        "threads": 2,
    }
    return replace(cfg, task="mixed", method="alternate", **changes)


def run(cfg: RunConfig, place: Store) -> Path:
    """Make one probe run with the settings that `configure` gave; returns the CSV of its rows in the results folder."""
    with open_editor(cfg, place) as editor:
        backbone = load(cfg.backbone, threads=cfg.threads)
        session = Session(cfg, build.build(cfg), backbone, editor, place.begin(cfg), place.memo)
        frame = collect(session)
    path = place.results / f"probe-{cfg.backbone}-{cfg.rule}.csv"
    frame.to_csv(path, index=False)
    return path


def collect(session: Session, epochs: int = 2, edits: int = 5) -> pd.DataFrame:
    """One row per training fact and state: features, counterfactual label (nan at a tie), hidden need."""
    task, start = session.task, Candidate(session.task.start)
    feedback = task.examples("feedback")
    frozen = session.score(start.prompt, feedback)
    frozen_x = describe(session, start.prompt, frozen)

    prompted, by_prompt, dev = start, frozen, session.score(start.prompt, task.examples("dev"))
    for step in range(1, edits + 1):
        failing = [s for s in by_prompt if s.reward.success < 1]
        prompted, dev, _ = moves.symbolic(session, prompted, failing, dev, step)
        by_prompt = session.score(prompted.prompt, feedback)
    by_prompt_x = describe(session, prompted.prompt, by_prompt)

    facts = {e.fact for e in feedback}
    for step in range(1, epochs + 1):
        moves.numerical(session, start, facts, frozen, False, step)
    by_weights = session.score(start.prompt, feedback)
    by_weights_x = describe(session, start.prompt, by_weights)
    by_both = session.score(prompted.prompt, feedback)
    for step in range(epochs + 1, epochs + 1 + epochs // 2):
        moves.numerical(session, start, facts, by_weights, False, step)
    longer = session.score(start.prompt, feedback)

    return pd.concat(
        [
            rows(session.cfg, "frozen", frozen, frozen_x, by_weights, by_prompt),
            rows(session.cfg, "weights", by_weights, by_weights_x, longer, by_both),
            rows(session.cfg, "prompt", by_prompt, by_prompt_x, by_both, by_prompt),
        ]
    )


def describe(session: Session, prompt: Prompt, scored: Sequence[Scored]) -> np.ndarray:
    """Features [N, F] of the candidate that the session holds now."""
    examples = [s.example for s in scored]
    return needs.features(
        scored, session.nll(prompt, examples), session.nll(session.task.start, examples)
    )


def rows(
    cfg: RunConfig,
    state: str,
    before: Sequence[Scored],
    x: np.ndarray,
    numerical: Sequence[Scored],
    symbolic: Sequence[Scored],
) -> pd.DataFrame:
    """One state's rows."""
    frame = pd.DataFrame(x, columns=list(needs.FEATURES)).round(4)
    frame.insert(0, "fact", [f"s{cfg.seed}-{s.example.fact}" for s in before])
    frame.insert(1, "state", state)
    frame["label"] = needs.counterfactual(before, numerical, symbolic)
    frame["need"] = [s.example.need.value for s in before]
    frame["backbone"], frame["rule"] = cfg.backbone, cfg.rule
    return frame


def train(folder: Path, packaged: Path = PACKAGED) -> dict[str, object]:
    """Fit the classifier on every probe CSV in `folder`; write it and its cross-validated report; return the report."""
    frame = needs.probes(folder)
    x, y = frame[list(needs.FEATURES)].to_numpy(), frame["label"].to_numpy()
    groups = frame["fact"].to_numpy()
    needs.fit(x, y, groups).save(packaged)
    held_out = needs.out_of_fold(x, y, groups)
    report = {
        "rows": len(frame),
        "content": int(y.sum()),
        "style": int((1 - y).sum()),
        "label_auroc_cross_validated": stats.auroc(y, held_out),
    }
    write_json(folder / "report.json", report)
    return report
