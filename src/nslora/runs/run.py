"""One whole run, from data to its published record."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from nslora.algorithm import monitor
from nslora.algorithm.loop import adapt_phases, best, left
from nslora.algorithm.needs import Needs
from nslora.algorithm.session import Session, State
from nslora.config import RunConfig
from nslora.disk import saving
from nslora.editor.client import Editor
from nslora.editor.ledger import Ledger, Spent
from nslora.model import checkpoints
from nslora.model.backbone import Backbone, load
from nslora.runs import judge, lengths, store
from nslora.runs.limits import CELLS, Limits, Room, Taken
from nslora.runs.preflight import asks_editor, open_editor
from nslora.runs.state import restore, save
from nslora.runs.store import Store
from nslora.tasks import functions
from nslora.tasks.build import Prompted, Task, build
from nslora.types import (
    Candidate,
    Example,
    Json,
    Pair,
    Prompt,
    Scored,
    StepRecord,
    UserError,
    diff,
)

# of the reward, for reports
PARTS = ("content", "content_strict", "style")

# what a session counts
COUNTERS = ("saved_s", "work_s", "train_tokens", "generated_tokens")

# final rows by split
Rows = dict[str, list[Scored]]


@dataclass(frozen=True)
class Timed(StepRecord):
    """A move as a watcher sees it.

    Attributes:
        seconds: that it took, scoring included.
        left_s: seconds until the run ends, about, if it makes all moves that it may.
    """

    seconds: float = 0.0
    left_s: float = 0.0


Watch = Callable[[Timed], None]


def make_run(
    cfg: RunConfig,
    place: Store,
    editor: Editor | None = None,
    backbone: Backbone | None = None,
    watch: Watch = print,
    limits: Limits | None = None,
) -> Path:
    """Make a run unless it is done, and return its record's folder.

    Several runs of one process can share an editor and a backbone. With `limits`, a run that has no
    room for its next move is evaluated as it stands, is not done, and goes on when it is called
    again with more. Raises UserError for wrong input before anything is made.
    """
    checkpoints.check(cfg.backbone)
    if editor is None:
        with open_editor(cfg, place, limits) as own:
            return make_run(cfg, place, own, backbone, watch, limits)
    with place.alone(cfg):
        if place.done(cfg):
            return place.record(cfg)
        _say_damaged(place.record(cfg))
        if asks_editor(cfg):
            # before anything is loaded
            editor.check()
        judge.attach(cfg.grader, editor)
        return _make(cfg, place, editor, backbone, watch, limits or Limits())


def _say_damaged(record: Path) -> None:
    """Name what is wrong with a record that is there and is made anew."""
    if record.is_dir() and (name := store.missing_or_damaged(record)):
        warnings.warn(f"{record / name} is damaged or missing: making it anew", stacklevel=3)


def _make(
    cfg: RunConfig,
    place: Store,
    editor: Editor,
    backbone: Backbone | None,
    watch: Watch,
    limits: Limits,
) -> Path:
    """Make the run, from its last finished move if it was interrupted, and publish its record."""
    started = time.perf_counter()
    scratch = place.scratch(cfg)
    with saving(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    backbone = backbone or load(cfg.backbone, cfg.threads, cfg.dtype)
    task = build(cfg)
    require_lengths(cfg, task, backbone)
    run = Session(cfg, task, backbone, editor, scratch, place.memo)
    replies = CELLS * len(run.task.test) + sum(map(len, run.abilities.values()))
    room = Room(limits, editor.room, replies, len(run.task.dev) + len(run.task.feedback))
    progress = Progress(run, started, watch, room)
    run.affords = room.affords

    try:
        adapt_phases(run, progress, progress.state)
    except Spent as limit:
        # the move that was begun is made again by whoever goes on
        room.stopped = str(limit)
    state = progress.state
    assert state is not None, "the start is scored before anything is asked"
    chosen = best(state.history, cfg)
    candidate = Candidate(chosen.prompt, chosen.adapter)
    run.use(candidate)
    rows = {**state.tested, **final_rows(run, candidate)}
    factorial = weights_by_prompt(run, candidate)
    remade = remade_rows(cfg, run.task.initial_prompt, state.memory.trained)
    graded = {
        split: graded_rows(run, split, scored) for split, scored in (rows | factorial).items()
    }
    store.write_scores(scratch / "scores.csv", map(columns, chain(*graded.values())))
    store.write_jsonl(scratch / "remade.jsonl", remade)
    means = {split: summary(items) for split, items in graded.items()}
    store.write_json(
        scratch / "run.json",
        {
            **about(run),
            "follows": run.follows,
            "schedule": monitor.schedule(state.whole),
            "stopped": room.stopped,
            "final": {split: means[split] for split in rows},
            "factorial": {cell: means[cell] for cell in factorial},
            "best": {
                "step": chosen.step,
                "prompt": asdict(chosen.prompt),
                "prompt_diff": prompt_diff(run.task.initial_prompt, chosen.prompt),
            },
            "editor": asdict(progress.edits),
            "remade": len(remade),
            "cost": cost(run, state.whole, progress),
        },
    )
    return place.publish(cfg, whole=not room.stopped)


def about(run: Session) -> Json:
    """Return the parts of a receipt that say what the run is, and what makes it."""
    cfg, backbone = run.cfg, run.backbone
    return {
        "schema": store.SCHEMA,
        "study": cfg.study,
        "run_id": cfg.run_id,
        "config": cfg.settings,
        "weights": backbone.identity,
        "environment": {
            **store.environment(cfg.threads, backbone.device, backbone.dtype),
            "editor_engine": run.editor.engine,
        },
    }


def require_lengths(cfg: RunConfig, task: Task, backbone: Backbone) -> None:
    """Raise UserError where a row is too long for the backbone, or an answer for the reply limit."""
    if cfg.is_own:
        # where the weights had to be fetched, nothing could count tokens before
        context = getattr(backbone.model.config, "max_position_embeddings", None)
        lengths.require(task.items, cfg, lengths.Measure(backbone.count, context))
        return
    examples = [*task.train, *task.dev, *task.test, *(example for _, example in task.pool)]
    exact = [e.answer for e in examples if task.hidden[e.id].grader == "bigbench"]
    longest = max((len(backbone.encode("", answer)[1]) for answer in exact), default=0)
    if longest > cfg.max_new_tokens:
        raise UserError(
            f"answers of {task.name} have up to {longest} tokens: max_new_tokens = "
            f"{cfg.max_new_tokens} is too few."
        )


class Progress:
    """Records a run's moves as they come, and saves where it stands: an interrupted run goes on.

    steps.jsonl is the same whenever and wherever the run is made. clock.jsonl holds seconds, and
    hidden.jsonl what no method sees: the reward's parts and the needs, for reports. All rows are
    saved with the state: what an interrupted run left of the files is never read.

    Attributes:
        state: where the run stands; None before its start is scored.
        room: is told what each move took.
        rows: lines of these files so far, by their names.
    """

    def __init__(self, run: Session, started: float, watch: Watch, room: Room) -> None:
        """Put the session back to where an interrupted run stood, if there is one.

        `started` is when this process began with the run, by `time.perf_counter()`.
        """
        self.run, self.started, self.watch, self.room = run, started, watch, room
        # what the editor had spent before, and what this run had spent on it in other processes
        self.before_us, self.earlier = replace(run.editor.ledger), Ledger()
        self.rows: dict[str, list[Json]] = {name: [] for name in store.LINES}
        self.state = self._resume()
        self.before = self.state.train if self.state else ()
        self.ended, self.saved = time.perf_counter(), run.saved_s

    @property
    def wall_s(self) -> float:
        """Seconds that the run took so far, in all processes."""
        return time.perf_counter() - self.started

    @property
    def edits(self) -> Ledger:
        """What the run's edits cost so far, in all processes."""
        return self.earlier + (self.run.editor.ledger - self.before_us)

    def __call__(self, state: State, needs: Needs | None) -> None:
        """Record a state, and the needs that were estimated before its move."""
        step, folder = state.history[-1], self.run.scratch
        now = time.perf_counter()
        # memoised replies count as if this run had made them
        seconds = now - self.ended + self.run.saved_s - self.saved
        clock = {"step": step.step, "seconds": seconds}
        rows = (asdict(step), clock, self._hidden(state, needs))
        for name, row in zip(store.LINES, rows, strict=True):
            self.rows[name].append(row)
            store.write_jsonl(folder / name, self.rows[name])
        save(folder / store.STATE, self.run, state, self._spent())
        self.state, self.before = state, state.train
        self._take(step, seconds)
        most = min(self.run.cfg.most_moves - len(state.moves), left(state, self.run.cfg))
        left_s = self.room.until_end_s(max(most, 0))
        self.watch(Timed(**vars(step), seconds=seconds, left_s=left_s))
        self.ended, self.saved = time.perf_counter(), self.run.saved_s

    def _take(self, step: StepRecord, seconds: float) -> None:
        tokens = step.bill.get("editor_tokens", 0.0)
        self.room.taken.append(Taken(step.move, seconds, tokens))

    def _spent(self) -> Json:
        counters = {name: getattr(self.run, name) for name in COUNTERS}
        spent = {"wall_s": self.wall_s, "edits": asdict(self.edits), "counters": counters}
        function = functions.of(self.run.cfg.grader)
        spent |= {"rows": self.rows}
        return spent | {"reward": function.save() if function else {}}

    def _resume(self) -> State | None:
        """Return where the run stood, its rows put back; None if it is to begin."""
        folder = self.run.scratch
        state = None
        if (folder / store.STATE).exists():
            try:
                state, spent = restore(folder / store.STATE, self.run)
            except UserError as error:
                warnings.warn(f"{error} The run begins anew.", stacklevel=2)
        if state is None:
            # what a run left that was killed before its first state was saved
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return None
        self.started -= spent["wall_s"]
        self.earlier = Ledger(**spent["edits"])
        for name, value in spent["counters"].items():
            setattr(self.run, name, value)
        if function := functions.of(self.run.cfg.grader):
            function.restore(spent["reward"])
        # none of it belongs to the next move
        self.run.bill()
        self.rows = spent["rows"]
        for name, rows in self.rows.items():
            store.write_jsonl(folder / name, rows)
        self.room.earlier_s = spent["wall_s"]
        for step, row in zip(state.whole, self.rows["clock.jsonl"], strict=True):
            self._take(step, row["seconds"])
        return state

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


def final_rows(run: Session, candidate: Candidate) -> Rows:
    """Score a candidate, whose weights are in place, on test and on what the frozen ones could do."""
    # what the frozen weights could not do cannot be forgotten
    obeyed = set(run.abilities["promptability"])
    promptability = tuple(pair for pair in run.task.promptability if pair[1] in obeyed)
    rows = {
        "test": run.score(candidate.prompt, run.task.test),
        **retention(run, candidate.prompt, run.abilities["locality"], promptability),
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
            # parts of a function's own come first, lest they take a column's place
            **reward.parts,
            "split": split,
            "id": example.id,
            "fact": example.fact,
            "need": task.hidden[example.id].need.value,
            "question": example.question,
            "answer": example.answer,
            "success": reward.success,
            "value": reward.value,
            "output": s.output,
        }
        rows.append(row)
    return rows


def columns(row: Json) -> Json:
    """Return what scores.csv holds of a graded row: no parts of somebody's own function."""
    return {key: row[key] for key in store.COLUMNS if key in row}


def summary(rows: Sequence[Json]) -> dict[str, float]:
    """Return means over graded rows, the reward's parts included, and the number of rows."""
    # a function of somebody's own may have parts of its own
    shared = set.intersection(*map(set, rows)) if rows else set()
    own = sorted(shared - set(store.COLUMNS))
    keys = ("success", "value", *PARTS, *own)
    means = {key: float(np.mean([row[key] for row in rows])) for key in keys}
    return means | {"n": len(rows)}


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


def cost(run: Session, history: Sequence[StepRecord], progress: Progress) -> dict[str, float]:
    """Return what the run cost: seconds in all and in moves, tokens, peak memory in MB.

    Replies of the frozen weights that an earlier run has made count as if this run had made them;
    `saved_s` of the seconds are theirs.
    """
    function = functions.of(run.cfg.grader)
    seconds = {row["step"]: row["seconds"] for row in progress.rows["clock.jsonl"]}
    return {
        "wall_s": progress.wall_s + run.saved_s,
        "saved_s": run.saved_s,
        "work_s": run.work_s,
        # the start is scored, not made
        "moves_s": sum(seconds[step.step] for step in history if step.move != "start"),
        "train_tokens": float(run.train_tokens),
        "generated_tokens": float(run.generated_tokens),
        **(function.costs if function else {}),
        "peak_mb": store.peak_megabytes(),
    }
