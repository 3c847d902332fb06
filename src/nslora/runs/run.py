"""One whole run, from data to its published record."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from nslora.algorithm import evaluate, remake
from nslora.algorithm.loop import Scores, Watch, through_phases
from nslora.algorithm.session import Session
from nslora.config import RunConfig
from nslora.editor.client import Editor
from nslora.model import checkpoints
from nslora.model.backbone import Backbone, load
from nslora.runs import store
from nslora.runs.store import Store
from nslora.tasks import build
from nslora.types import Candidate, Pair, Prompt, Scored, StepRecord, diff


def make_run(
    cfg: RunConfig,
    place: Store,
    editor: Editor | None = None,
    backbone: Backbone | None = None,
    watch: Watch = print,
) -> Path:
    """One whole run, from data to its published record; a run that is done is not done again.

    Several runs of one process can share an editor and a backbone. Returns the record's folder.
    """
    checkpoints.check(cfg.backbone)
    if editor is None:
        with open_editor(cfg, place) as own:
            return make_run(cfg, place, own, backbone, watch)
    with place.alone(cfg):
        return (
            place.record(cfg)
            if place.done(cfg)
            else _adapt_and_publish(cfg, place, editor, backbone, watch)
        )


def _adapt_and_publish(
    cfg: RunConfig, place: Store, editor: Editor, backbone: Backbone | None, watch: Watch
) -> Path:
    """The run itself, from its beginning."""
    task = build.build(cfg)
    started = time.perf_counter()
    before = replace(editor.ledger)
    scratch = place.begin(cfg)
    backbone = backbone or load(cfg.backbone, threads=cfg.threads)
    session = Session(cfg, task, backbone, editor, scratch, place.memo)
    reference = frozen_reference(session)

    def log(step: StepRecord) -> None:
        store.append_step(scratch / "steps.jsonl", step)
        watch(step)

    history, chosen, trained, splits = through_phases(session, log)
    splits |= final_scores(session, Candidate(chosen.prompt, chosen.adapter), reference)
    store.write_scores(scratch / "scores.csv", splits)
    rows = remade_rows(cfg, task.start, trained)
    remake.export(rows, scratch)
    store.write_json(
        scratch / "run.json",
        {
            "run_id": cfg.run_id,
            "config": asdict(cfg),
            "weights": session.backbone.identity,
            "environment": store.environment(
                cfg.threads, session.backbone.device, session.backbone.dtype
            ),
            "start": {"dev": history[0].dev},
            "final": {name: evaluate.summary(scored) for name, scored in splits.items()},
            "best": {
                "step": chosen.step,
                "prompt": asdict(chosen.prompt),
                "prompt_diff": [list(part) for part in diff(task.start.both, chosen.prompt.both)],
            },
            "editor": asdict(editor.ledger - before),
            "remade": len(rows),
            "cost": totals(session, history, time.perf_counter() - started),
        },
    )
    return place.publish(cfg, ("run.json", "steps.jsonl", "scores.csv", "remade.jsonl"))


def open_editor(cfg: RunConfig, place: Store) -> Editor:
    """The run's external LLM, replaying from and recording to the results; mode from NSLORA_EDITOR_MODE (auto)."""
    mode = os.environ.get("NSLORA_EDITOR_MODE", "auto")
    return Editor(
        cfg.editor_model, cfg.editor_url, mode, place.results / "recordings", threads=cfg.threads
    )


def frozen_reference(session: Session) -> dict[str, set[str]]:
    """Ids of the locality and promptability items that the frozen backbone gets right: what can be forgotten."""
    locality, obedience = held(session, session.task.start)
    return {
        "locality": {s.example.id for s in locality if s.reward.content == 1},
        "promptability": {s.example.id for s in obedience if s.reward.style == 1},
    }


def held(session: Session, prompt: Prompt) -> tuple[list[Scored], list[Scored]]:
    """Replies of the weights as they are to known questions: under `prompt`, and under prompts that tell another rule.

    Both in one batch.
    """
    locality = session.task.examples("locality")
    asked = [(prompt, e) for e in locality] + list(session.task.promptability)
    prompts, examples = zip(*asked, strict=True)
    scored = session.score_each(prompts, examples)
    return scored[: len(locality)], scored[len(locality) :]


def final_scores(session: Session, candidate: Candidate, reference: dict[str, set[str]]) -> Scores:
    """The candidate on test, once, and on what the frozen backbone could do: locality and promptability."""
    session.use(candidate)
    task = session.task
    locality, obedience = held(
        session, candidate.prompt
    )  # all of them: other batches would give other bits
    splits = {
        "test": session.score(candidate.prompt, task.examples("test")),
        "locality": [s for s in locality if s.example.id in reference["locality"]],
        "promptability": [s for s in obedience if s.example.id in reference["promptability"]],
    }
    return {name: scored for name, scored in splits.items() if scored}


def remade_rows(cfg: RunConfig, start: Prompt, pairs: Sequence[Pair]) -> list[dict[str, object]]:
    """Verified pairs with their provenance, each once: the reusable data a run leaves behind."""
    rows = {}
    for p in pairs:
        if p.source in ("remade", "rewritten"):
            changed = [list(part) for part in diff(start.both, (p.made or p.prompt).both)]
            rows[p.parent, p.target] = {
                "question": p.question,
                "answer": p.target,
                "system": p.prompt.system,
                "template": p.prompt.question,
                "parent": p.parent,
                "source": p.source,
                "prompt_diff": changed,
                "backbone": cfg.backbone,
                "reward": 1.0,
                "run": cfg.run_id,
            }
    return list(rows.values())


def totals(session: Session, history: Sequence[StepRecord], wall: float) -> dict[str, float]:
    """What the run cost: seconds in all and in moves, tokens trained on and generated, peak memory in MB.

    Replies of the frozen weights that an earlier run has made count as if this run had made them; `saved_s` of the
    seconds are theirs. `work_s` are those in which the model computed or the editor was asked.
    """
    return {
        "wall_s": wall + session.saved_s,
        "saved_s": session.saved_s,
        "work_s": session.work_s,
        "moves_s": sum(step.cost["seconds"] for step in history),
        "train_tokens": sum(step.cost.get("train_tokens", 0.0) for step in history),
        "generated_tokens": float(session.generated_tokens),
        "peak_mb": store.peak_megabytes(),
    }
