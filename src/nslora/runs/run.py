"""One whole run, from data to its published record."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np

from nslora.algorithm.loop import adapt_phases
from nslora.algorithm.needs import Needs
from nslora.algorithm.session import Session, State
from nslora.config import RunConfig
from nslora.editor.client import Editor
from nslora.model import checkpoints
from nslora.model.backbone import Backbone, load
from nslora.runs import store
from nslora.runs.store import Store
from nslora.tasks.build import Prompted, build
from nslora.types import Candidate, Example, Json, Move, Pair, Prompt, Scored, StepRecord, diff

# of the reward, for reports
PARTS = ("content", "content_strict", "style")

# final rows by split
Rows = dict[str, list[Scored]]
Watch = Callable[[StepRecord], None]


def make_run(
    cfg: RunConfig,
    place: Store,
    editor: Editor | None = None,
    backbone: Backbone | None = None,
    watch: Watch = print,
) -> Path:
    """Make a run unless it is done, and return its record's folder.

    Several runs of one process can share an editor and a backbone. Raises UserError for wrong input
    before anything is made.
    """
    checkpoints.check(cfg.backbone)
    if editor is None:
        with open_editor(cfg, place) as own:
            return make_run(cfg, place, own, backbone, watch)
    with place.alone(cfg):
        if place.done(cfg):
            return place.record(cfg)
        return _make(cfg, place, editor, backbone, watch)


def open_editor(cfg: RunConfig, place: Store) -> Editor:
    """Open the run's external LLM, replaying from and recording to the results folder.

    NSLORA_EDITOR_MODE says how (default: auto).
    """
    mode = os.environ.get("NSLORA_EDITOR_MODE", "auto")
    recordings = place.results / "recordings"
    return Editor(
        cfg.editor_model,
        cfg.editor_url,
        mode,
        recordings,
        threads=cfg.threads,
        engine=cfg.editor_engine,
    )


def _make(
    cfg: RunConfig, place: Store, editor: Editor, backbone: Backbone | None, watch: Watch
) -> Path:
    """Make the run from its beginning, and publish its record."""
    started, ledger = time.perf_counter(), replace(editor.ledger)
    scratch = place.begin(cfg)
    backbone = backbone or load(cfg.backbone, threads=cfg.threads)
    run = Session(cfg, build(cfg), backbone, editor, scratch, place.memo)
    abilities = frozen_abilities(run)

    history, chosen, memory, rows = adapt_phases(run, Recorder(run, watch))
    candidate = Candidate(chosen.prompt, chosen.adapter)
    rows = rows | final_rows(run, candidate, abilities)
    factorial = weights_by_prompt(run, candidate)
    graded = {
        split: graded_rows(run, split, scored) for split, scored in (rows | factorial).items()
    }
    means = {split: summary(items) for split, items in graded.items()}
    remade = remade_rows(cfg, run.task.initial_prompt, memory.trained)

    store.write_scores(scratch / "scores.csv", chain(*graded.values()))
    (scratch / "remade.jsonl").touch()
    for row in remade:
        store.append_json(scratch / "remade.jsonl", row)
    store.write_json(
        scratch / "run.json",
        {
            "schema": store.SCHEMA,
            "study": cfg.study,
            "run_id": cfg.run_id,
            "config": cfg.settings,
            "weights": backbone.identity,
            "environment": {
                **store.environment(cfg.threads, backbone.device, backbone.dtype),
                "editor_engine": editor.engine,
            },
            "schedule": schedule(history),
            "final": {split: means[split] for split in rows},
            "factorial": {cell: means[cell] for cell in factorial},
            "best": {
                "step": chosen.step,
                "prompt": asdict(chosen.prompt),
                "prompt_diff": prompt_diff(run.task.initial_prompt, chosen.prompt),
            },
            "editor": asdict(editor.ledger - ledger),
            "remade": len(remade),
            "cost": cost(run, history, scratch, time.perf_counter() - started),
        },
    )
    return place.publish(cfg)


class Recorder:
    """Writes a run's steps as they come, and beside them what they took and what was hidden.

    steps.jsonl is the same whenever and wherever the run is made. clock.jsonl holds seconds, and
    hidden.jsonl what no method sees: the reward's parts and the needs, for reports.
    """

    def __init__(self, run: Session, watch: Watch) -> None:
        self.run, self.watch = run, watch
        self.before: Sequence[Scored] = ()
        self.ended, self.saved = time.perf_counter(), run.saved_s

    def __call__(self, state: State, needs: Needs | None) -> None:
        """Record a state, and the needs that were estimated before its move."""
        step, folder = state.history[-1], self.run.scratch
        now = time.perf_counter()
        # memoised replies count as if this run had made them
        seconds = now - self.ended + self.run.saved_s - self.saved
        self.ended, self.saved = now, self.run.saved_s
        store.append_json(folder / "steps.jsonl", asdict(step))
        store.append_json(folder / "clock.jsonl", {"step": step.step, "seconds": seconds})
        store.append_json(folder / "hidden.jsonl", self._hidden(state, needs))
        self.before = state.train
        self.watch(step)

    def _hidden(self, state: State, needs: Needs | None) -> Json:
        dev = summary(graded_rows(self.run, "dev", state.dev))
        rows = []
        if needs is not None and needs.p_content is not None:
            for s, p_content in zip(self.before, needs.p_content, strict=True):
                need = self.run.task.hidden[s.example.id].need.value
                rows.append([s.example.id, need, s.reward.success, round(float(p_content), 4)])
        parts = {part: dev[part] for part in PARTS}
        return {"step": state.history[-1].step, "dev": parts, "needs": rows}


# ---- what a run is tested on


def frozen_abilities(run: Session) -> dict[str, list[Example]]:
    """Return the locality and promptability questions that the frozen weights get right.

    They are what can be forgotten.
    """
    task = run.task
    scored = retention(run, task.initial_prompt, list(task.locality), task.promptability)
    obeyed = [s for s in scored["promptability"] if task.obeys(s.example, s.output)]
    return {
        "locality": [s.example for s in scored["locality"] if s.reward.success],
        "promptability": [s.example for s in obeyed],
    }


def retention(
    run: Session, prompt: Prompt, locality: list[Example], promptability: Prompted
) -> Rows:
    """Return replies to known questions under `prompt`, and under prompts that tell another rule.

    Both in one batch, by the weights as they are.
    """
    prompts = [prompt] * len(locality) + [p for p, _ in promptability]
    examples = locality + [example for _, example in promptability]
    # locality, then promptability
    scored = run.score_each(prompts, examples)
    return {"locality": scored[: len(locality)], "promptability": scored[len(locality) :]}


def final_rows(run: Session, candidate: Candidate, abilities: Mapping[str, list[Example]]) -> Rows:
    """Score the candidate on test, once, and on what the frozen weights could do."""
    run.use(candidate)
    # what the frozen weights could not do cannot be forgotten
    obeyed = set(abilities["promptability"])
    promptability = tuple(pair for pair in run.task.promptability if pair[1] in obeyed)
    rows = {
        "test": run.score(candidate.prompt, run.task.test),
        **retention(run, candidate.prompt, abilities["locality"], promptability),
    }
    return {split: scored for split, scored in rows.items() if scored}


def weights_by_prompt(run: Session, candidate: Candidate) -> Rows:
    """Score {frozen, tuned} weights x {initial, final} prompt on test: what each part brings."""
    cells: Rows = {}
    for weights, adapter in (("tuned", candidate.adapter), ("frozen", None)):
        # adapters are loaded once for both prompts
        run.use(Candidate(candidate.prompt, adapter))
        prompts = {"initial": run.task.initial_prompt, "final": candidate.prompt}
        for name, prompt in prompts.items():
            cells[f"{weights}+{name}"] = run.score(prompt, run.task.test)
    return cells


# ---- what the record holds


def graded_rows(run: Session, split: str, scored: Sequence[Scored]) -> list[Json]:
    """Return a row of scores.csv per reply, graded by the task that the split is of.

    The splits test-1, test-2, ... are of earlier phases.
    """
    _, _, phase = split.partition("test-")
    task = build(run.cfg, int(phase) - 1) if phase else run.task
    rows = []
    for s in scored:
        example, reward = s.example, task.reward(s.example, s.output)
        row = {
            "split": split,
            "id": example.id,
            "fact": example.fact,
            "need": task.hidden[example.id].need.value,
            "question": example.question,
            "answer": example.answer,
            "success": reward.success,
            "value": reward.value,
            **reward.parts,
            "output": s.output,
        }
        rows.append(row)
    return rows


def summary(rows: Sequence[Json]) -> dict[str, float]:
    """Return means over graded rows, the reward's parts included, and the number of rows."""
    means = {
        key: float(np.mean([row[key] for row in rows])) for key in ("success", "value", *PARTS)
    }
    return means | {"n": len(rows)}


def schedule(history: Sequence[StepRecord]) -> str:
    """Return the moves as N and S; a stream's phases are joined."""
    letters = {Move.NUMERICAL.value: "N", Move.SYMBOLIC.value: "S"}
    return "".join(letters.get(step.move, "") for step in history)


def prompt_diff(initial: Prompt, prompt: Prompt) -> list[list[str]]:
    """Return what changed in both prompt texts, as [op, token]."""
    return [list(part) for part in diff(initial.both, prompt.both)]


def remade_rows(cfg: RunConfig, initial: Prompt, pairs: Sequence[Pair]) -> list[Json]:
    """Return verified pairs with their provenance, each once: the reusable data of a run."""
    verified = [pair for pair in pairs if pair.source in ("remade", "rewritten")]
    # the same pair is trained in many moves
    unique = {(pair.parent, pair.target): pair for pair in verified}
    return [
        {
            "question": pair.question,
            "answer": pair.target,
            "system": pair.prompt.system,
            "template": pair.prompt.question,
            "parent": pair.parent,
            "source": pair.source,
            "prompt_diff": prompt_diff(initial, pair.refined or pair.prompt),
            "backbone": cfg.backbone,
            "reward": 1.0,
            "run": cfg.run_id,
        }
        for pair in unique.values()
    ]


def cost(
    run: Session, history: Sequence[StepRecord], scratch: Path, wall_s: float
) -> dict[str, float]:
    """Return what the run cost: seconds in all and in moves, tokens, peak memory in MB.

    Replies of the frozen weights that an earlier run has made count as if this run had made them;
    `saved_s` of the seconds are theirs.
    """
    clock = store.read_jsonl(scratch / "clock.jsonl")
    seconds = {row["step"]: row["seconds"] for row in clock}
    return {
        "wall_s": wall_s + run.saved_s,
        "saved_s": run.saved_s,
        "work_s": run.work_s,
        # the start is scored, not made
        "moves_s": sum(seconds[step.step] for step in history if step.move != "start"),
        "train_tokens": float(run.train_tokens),
        "generated_tokens": float(run.generated_tokens),
        "peak_mb": store.peak_megabytes(),
    }
