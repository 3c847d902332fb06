"""Sides of a benchmark that make moves: the editor's part of one, a whole one, trees of them, and adaptations."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nslora.algorithm import loop
from nslora.algorithm.needs import ESTIMATORS
from nslora.algorithm.session import Session, State
from nslora.algorithm.symbolic import symbolic
from nslora.algorithm.textgrad_compat import ask_gradients, ask_proposals, masked
from nslora.bench.sides import Side, Spec, open_side, served, server, server_peak
from nslora.config import RunConfig
from nslora.editor import engine
from nslora.editor.client import Editor
from nslora.editor.completion import Dialect
from nslora.editor.ledger import Ledger
from nslora.editor.replay import Request
from nslora.experiments import schedules
from nslora.model.backbone import Backbone
from nslora.runs.run import make_run
from nslora.runs.store import Store, read_jsonl
from nslora.tasks.build import build
from nslora.types import Candidate, Example, Json, Prompt, Scored

# fails where an answer is asked for; the bare answer fails where a form is
UNHELPFUL = "I do not know."
GREETING = Request("", "Say hello.", 0, 0.0, 8)
# what a path of a tree and the run of its schedule have in common
KEPT = ("dev", "train", "signal", "evidence", "bill", "prompt")

# a schedule's record by schedule, and how many moves it took to make all
Nodes = tuple[dict[str, Json], int]
Maker = Callable[[RunConfig, Store, Editor, Backbone], Nodes]


def settings(spec: Spec, **more: Any) -> RunConfig:
    """Return the settings of a run of `items` items, as small as they are many."""
    items = spec["items"]
    return RunConfig(
        backbone=spec["backbone"],
        items=items,
        test_items=items,
        candidates=spec["candidates"],
        # the usual 128 would be most of so small a run
        replay_pool=2 * items,
        threads=spec["threads"],
        **more,
    )


def open_editor(spec: Spec, **more: Any) -> Editor:
    """Return the editor of a spec on its `engine`."""
    return Editor(spec["editor"], threads=spec["threads"], engine=spec["engine"], **more)


# ---- the editor's part of a symbolic move


def ask(editor: Any, candidates: int, seed: int) -> list[str]:
    """Ask for the gradients of a move, then for its edits; return the problem of each edit ("": it is usable).

    The failing replies are fixed, and edits follow from fixed gradients: every editor is asked the same.
    """
    cfg = RunConfig(items=4, test_items=4)
    task = build(cfg)
    rows = [
        Scored(example, reply, task.reward(example, reply))
        for example in task.train
        for reply in (example.answer, UNHELPFUL)
    ]
    # one per critique, as in a move
    failing = {masked(row): row for row in rows if not row.reward.success}
    shown = list(failing.items())[: cfg.feedback]
    ask_gradients(task.initial_prompt, shown, editor, seed)
    orders = [f"The prompt must tell the model: {words}" for words, _ in shown]
    feedback = {"system": orders, "question": orders}
    proposals = ask_proposals(task.initial_prompt, feedback, editor, candidates, seed)
    return [problem for parts in proposals for _, problem in parts.values()]


def start(editor: Editor) -> float:
    """Start an editor's server; return the seconds until it has greeted."""
    begun = time.perf_counter()
    editor.complete(GREETING)
    return time.perf_counter() - begun


def spent(editor: Editor, before: Ledger) -> Json:
    """Return tokens since `before`; raises RuntimeError where a reply was lost, for that takes no time."""
    used = editor.ledger - before
    if used.lost:
        raise RuntimeError(f"{used.lost} replies were lost: {used.error}")
    return {"tokens_in": used.tokens_in, "tokens_out": used.tokens_out, **server_peak()}


def usable(problems: Sequence[str]) -> Json:
    """Return the share of edits without a problem."""
    return {"usable": problems.count("") / len(problems)}


def calls(spec: Spec) -> Side:
    """Make all calls of the editor that a symbolic move makes, each time with another seed."""
    editor = open_editor(spec, mode="live")
    about = {"engine": editor.engine, "start_s": start(editor)}
    process, seeds = server(), count()

    def repeat() -> Json:
        before = replace(editor.ledger)
        problems = ask(editor, spec["candidates"], next(seeds))
        if server() != process:
            raise RuntimeError("the editor's server stopped while it waited for its turn")
        return {"work": 1, **about, **usable(problems), **spent(editor, before)}

    spec |= served(editor.engine)
    return repeat


class Batches:
    """An editor in this process, on our engine: greedy, brief; `texts` are its replies so far."""

    def __init__(self, backbone: Backbone, new_tokens: int, alone: bool) -> None:
        self.backbone = backbone
        self.new_tokens = new_tokens
        self.alone = alone
        self.texts: list[str] = []

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """Answer requests in one batch, or `alone`."""
        greedy = {"temperature": 0.0, "max_tokens": self.new_tokens}
        bodies = [Dialect().body("", replace(request, **greedy)) for request in requests]
        batches = [[body] for body in bodies] if self.alone else [bodies]
        replies = [reply for batch in batches for reply in engine.answer(self.backbone, batch)]
        texts = [reply["choices"][0]["message"]["content"] for reply in replies]
        self.texts += texts
        return texts


def batches(spec: Spec) -> Side:
    """Answer the requests of a move in its two batches, or one by one (`alone`)."""
    backbone = open_side(spec)

    def repeat(alone: bool = False) -> Json:
        editor = Batches(backbone, spec["new_tokens"], alone)
        ask(editor, spec["candidates"], 0)
        return {"work": len(editor.texts), "texts": editor.texts}

    return repeat


# ---- whole moves


def whole(spec: Spec) -> Side:
    """Make a symbolic move: gradients and edits by the editor, their scores by the backbone."""
    backbone = open_side(spec)
    editor = open_editor(spec, mode="live")
    about = {"engine": editor.engine, "start_s": start(editor)}
    cfg = settings(spec)
    scratch = Path(tempfile.mkdtemp())
    # nothing is remembered from one repetition to the next
    run = Session(cfg, build(cfg), backbone, editor, scratch, lambda _, compute: compute())
    state = loop.begin(run, State(Candidate(run.task.initial_prompt)))
    needs = ESTIMATORS[cfg.row.needs](run, state)

    def repeat() -> Json:
        before, generated = replace(editor.ledger), run.generated_tokens
        run.recall({})
        edits = symbolic(run, state, needs).evidence["edits"]
        problems = [edit["problem"] for edit in edits]
        scored = {"generated": run.generated_tokens - generated}
        return {"work": 1, **about, **scored, **usable(problems), **spent(editor, before)}

    return repeat


def tree(spec: Spec) -> Side:
    """Grow the tree of all schedules of `depth` moves."""
    return schedules_by(grow, spec)


def runs(spec: Spec) -> Side:
    """Make a run per schedule of `depth` moves, one after the other, in one folder."""
    return schedules_by(make_each, spec)


def schedules_by(make: Maker, spec: Spec) -> Side:
    """Make all schedules of `depth` moves by `make`, from nothing each time."""
    backbone = open_side(spec)
    folder = Path(tempfile.mkdtemp())
    place = Store(folder / "results", folder / "work")
    editor = open_editor(spec, recordings=place.results / "recordings")
    start(editor)

    def repeat(depth: int = spec["depth"]) -> Json:
        # what was recorded and remembered before would be free now
        shutil.rmtree(folder, ignore_errors=True)
        before = replace(editor.ledger)
        nodes, moves = make(settings(spec, moves=depth), place, editor, backbone)
        names = schedules.by_length(nodes)
        texts = [json.dumps({key: nodes[name][key] for key in KEPT}) for name in names]
        used = editor.ledger - before
        row = {"moves": moves, "calls": used.calls, "replayed": used.replayed}
        about = {"work": len(nodes), "engine": editor.engine, "texts": texts}
        return about | row | server_peak()

    return repeat


def grow(cfg: RunConfig, place: Store, editor: Editor, backbone: Backbone) -> Nodes:
    """Grow a tree."""
    folder, work = place.results / "tree", place.work / "tree"
    schedules.grow(cfg, folder, place, work, lambda _: None, editor, backbone)
    nodes = schedules.read_nodes(folder)
    return nodes, len(nodes) - 1


def make_each(cfg: RunConfig, place: Store, editor: Editor, backbone: Backbone) -> Nodes:
    """Make a run per schedule."""
    nodes, moves = {}, 0
    for kinds in product("NS", repeat=cfg.moves):
        schedule = "".join(kinds)
        # the needs that a tree's moves see
        one = cfg.but(method=f"fixed:{schedule}", needs=cfg.row.needs)
        record = make_run(one, place, editor, backbone, watch=lambda _: None)
        steps = read_jsonl(record / "steps.jsonl")
        moves += len(steps) - 1
        nodes |= {schedule[: step["step"]]: step for step in steps}
    return nodes, moves


# ---- whole adaptations


def adaptation(spec: Spec) -> Side:
    """Adapt to the mixed task by a `method`, from nothing each time; rows tell the `course` of the dev reward."""
    backbone = open_side(spec)
    editor = open_editor(spec, mode="live")
    start(editor)

    def repeat() -> Json:
        cfg = settings(spec, moves=spec["moves"], method=spec["method"], lr=spec["lr"])
        with tempfile.TemporaryDirectory() as folder, watched() as course:
            place = Store(Path(folder) / "results", Path(folder) / "work")
            make_run(cfg, place, editor, backbone, watch=lambda _: None)
        return {"work": 1, "engine": editor.engine, "course": course} | server_peak()

    spec |= {"device": backbone.device, "dtype": backbone.dtype}
    return repeat


@contextmanager
def watched() -> Iterator[list[tuple[float, float, float]]]:
    """Note each time that all of dev was graded: seconds since the first time, tokens spent, and the mean reward.

    Tokens are those trained on, generated, and read and written by the editor.
    """
    course: list[tuple[float, float, float]] = []
    graded, started = Session.score_each, time.perf_counter()

    def score_each(
        run: Session, prompts: Sequence[Prompt], examples: Sequence[Example]
    ) -> list[Scored]:
        nonlocal started
        rows = graded(run, prompts, examples)
        dev = {example.id for example in run.task.dev}
        for prompt in dict.fromkeys(prompts):
            asked = zip(prompts, rows, strict=True)
            values = [
                row.reward.value for one, row in asked if one == prompt and row.example.id in dev
            ]
            if len(values) == len(dev):
                # what comes before the first grading is the same for all methods
                if not course:
                    started = time.perf_counter()
                bill = run.spent
                tokens = bill.train_tokens + bill.generated_tokens + bill.editor_tokens
                course.append((time.perf_counter() - started, tokens, sum(values) / len(dev)))
        return rows

    with patch.object(Session, "score_each", score_each):
        yield course
