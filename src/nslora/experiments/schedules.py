"""Schedule trees: every schedule of numerical and symbolic moves of an instance, each move made once.

An instance is a task, a backbone and a seed. Runs are deterministic, and schedules that start alike
share their first moves, so all schedules form a tree: a node is a schedule so far, such as "NS", its
children add one move. An edit that was rejected leaves the next numerical move as it would have been
without it, so that move is not made again either. Whatever a router would decide can then be looked
up without a model (`study.schedules`). A tree's nodes are published one by one, and a tree that was
interrupted goes on from its finished nodes.

    results/schedules/<instance>/instance.json    what the instance is, and what computed it
    results/schedules/<instance>/nodes.jsonl      one line per node, the root first
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import cast

from filelock import FileLock, Timeout

from nslora.algorithm import loop
from nslora.algorithm.needs import ESTIMATORS
from nslora.algorithm.router import Choice
from nslora.algorithm.session import Session, State
from nslora.config import RunConfig
from nslora.disk import SEAL, saving, sealed, unsealed
from nslora.editor.client import Editor
from nslora.experiments.grid import Profile
from nslora.model.backbone import Backbone, load
from nslora.runs import run as runs
from nslora.runs.state import restore, save
from nslora.runs.store import (
    STATE,
    Store,
    code,
    environment,
    processor,
    read_json,
    write_json,
    write_jsonl,
)
from nslora.study.schedules import trees
from nslora.tasks.build import build
from nslora.types import LETTERS, Candidate, Json, UserError

# whose estimates a router may ask for; "hidden" is the oracle's
NEEDS = ("asked", "recall", "classifier", "hidden")

Node = Json
Say = Callable[[str], None]


def left(profile: Profile, say: Say = print) -> list[RunConfig]:
    """Return the instances of a profile whose trees are not finished."""
    return [
        cfg
        for cfg in profile.schedules
        if not finished(read_nodes(profile.trees / cfg.run_id, say), "", cfg.moves)
    ]


def grow_all(profile: Profile, say: Say = print) -> list[str]:
    """Grow the trees of a profile that are not finished, one by one; return which could not be grown, having said why.

    Trees that another process grows are left to it: two commands share the work.
    """
    failed = []
    for cfg in profile.schedules:
        work = profile.work / "schedules" / cfg.run_id
        with saving(work):
            work.mkdir(parents=True, exist_ok=True)
            (work / "lock").touch()
        try:
            with FileLock(work / "lock", timeout=0):
                grow(cfg, profile.trees / cfg.run_id, profile.store, work, say)
        except Timeout:
            say(f"{cfg.run_id}: grows in another process")
        except UserError as problem:
            # the others may do
            say(f"{cfg.run_id}: {problem}")
            failed.append(cfg.run_id)
    return failed


def grow(
    cfg: RunConfig,
    folder: Path,
    place: Store,
    work: Path,
    say: Say = print,
    editor: Editor | None = None,
    backbone: Backbone | None = None,
) -> None:
    """Make the nodes of an instance's tree that are not finished; of depth `cfg.moves`.

    `folder` gets the records, `work` holds states and adapters while they are needed.
    """
    nodes = read_nodes(folder, say)
    if finished(nodes, "", cfg.moves):
        return
    if editor is None:
        with runs.open_editor(cfg, place) as own:
            # before anything is loaded
            own.check()
            return grow(cfg, folder, place, work, say, own, backbone)
    backbone = backbone or load(cfg.backbone, threads=cfg.threads)
    task = build(cfg)
    runs.require_lengths(cfg, task, backbone)
    session = Session(cfg, task, backbone, editor, work, place.memo)
    tree = Tree(session, folder, work, nodes)
    tree.begin()
    # in alphabetical order every node comes after its parent, and before its parent's siblings
    for schedule in sorted(below("", cfg.moves)):
        if tree.wants(schedule):
            tree.make(schedule)
            say(tree.line(schedule))
            tree.prune()


def below(schedule: str, depth: int) -> set[str]:
    """Return a schedule and all that go on from it, up to `depth` moves."""
    return {schedule + end for end in trees.schedules(depth - len(schedule))}


def without_edits(schedule: str) -> set[str]:
    """Return what is left of a schedule without any, some, or all of its symbolic moves."""
    choices = [("", letter) if letter == "S" else (letter,) for letter in schedule]
    return {"".join(letters) for letters in product(*choices)}


def finished(nodes: dict[str, Node], schedule: str, depth: int) -> bool:
    """Tell whether a node and all below it are there."""
    return nodes.keys() >= below(schedule, depth)


def read_nodes(folder: Path, say: Say = print) -> dict[str, Node]:
    """Return the nodes of a tree by schedule; none where there is no file.

    A damaged node is named and left out, to be made anew.
    """
    path = folder / "nodes.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    # trees of before have no checksums at all
    strict = any(f'"{SEAL}"'.encode() in line for line in lines)
    nodes: dict[str, Node] = {}
    for number, line in enumerate(lines, start=1):
        try:
            node = json.loads(line) if line else None
            node = unsealed(node) if node and strict else node
        except ValueError as problem:
            say(f"{path}, line {number} is damaged ({problem}): making its node anew")
            continue
        if node:
            nodes[node["schedule"]] = node
    return nodes


@dataclass
class Tree:
    """The tree of one instance, as far as it has grown.

    Attributes:
        nodes: finished nodes by schedule.
    """

    session: Session
    folder: Path
    work: Path
    nodes: dict[str, Node]

    @property
    def depth(self) -> int:
        """The number of moves of a whole schedule."""
        return self.session.cfg.moves

    def begin(self) -> None:
        """Publish what the instance is.

        Raises UserError if other code has made the nodes that are there.
        """
        path = self.folder / "instance.json"
        if self.nodes:
            try:
                about = read_json(path)
                maker = (unsealed(about) if SEAL in about else about)["environment"]["code"]
            except (OSError, ValueError, KeyError, TypeError) as problem:
                raise UserError(
                    f"{path} is damaged ({problem}): delete {self.folder} to grow the tree anew."
                ) from None
            if maker != code():
                raise UserError(f"the tree {self.folder} is of other code: finish it with that.")
        write_json(path, sealed(instance(self.session)))

    def wants(self, schedule: str) -> bool:
        """Tell whether a node is to be made: for itself, or for nodes below it that need its state."""
        if finished(self.nodes, schedule, self.depth):
            return False
        return schedule not in self.nodes or not self._state(schedule).exists()

    def make(self, schedule: str) -> None:
        """Make one move from the parent's state, or share what is the same, and publish the node."""
        if twin := self._twin(schedule):
            if len(schedule) < self.depth:
                self._share(schedule, twin)
            # its time, too: it is what the move costs
            self.nodes[schedule] = self.nodes[twin] | {"schedule": schedule}
        else:
            self._compute(schedule)
        rows = [sealed(self.nodes[key]) for key in by_length(self.nodes)]
        write_jsonl(self.folder / "nodes.jsonl", rows)

    def prune(self) -> None:
        """Remove the states that no missing node starts from, or may share."""
        missing = below("", self.depth) - self.nodes.keys()
        needed = {schedule[:n] for schedule in missing for n in range(len(schedule))}
        inner = {schedule for schedule in missing if len(schedule) < self.depth}
        needed = needed.union(*map(without_edits, inner))
        for schedule in self.nodes.keys() - needed:
            shutil.rmtree(self._place(schedule), ignore_errors=True)

    def line(self, schedule: str) -> str:
        """Say how a node did."""
        node, count = self.nodes[schedule], 2 ** (self.depth + 1) - 1
        scores = f"dev {node['dev']['success']:.2f}, test {node['test']['success']:.2f}"
        name = schedule or "start"
        twin = self._twin(schedule)
        took = f"as {twin}" if twin else f"in {node['seconds']:.0f} s"
        return f"{self.session.cfg.run_id} [{len(self.nodes)}/{count}] {name}: {scores} {took}"

    def _twin(self, schedule: str) -> str:
        """Return the finished node that a numerical move comes to without the rejected edits before it, or "".

        Only those since the last accepted one count. And only where every training example is learned: what else is
        chosen depends on the edits that were tried.
        """
        if not schedule.endswith("N") or self.session.cfg.row.inputs != "all":
            return ""
        # edits draw by their number: what comes before an accepted one is part of it
        firm = max(
            (n for n in range(len(schedule)) if self.nodes[schedule[:n]]["accepted"]), default=0
        )
        twin = schedule[:firm] + schedule[firm:].replace("S", "")
        usable = len(schedule) == self.depth or self._state(twin).exists()
        return twin if twin != schedule and twin in self.nodes and usable else ""

    def _share(self, schedule: str, twin: str) -> None:
        """Save the state of a node with the weights of its twin, and with a history of its own."""
        run, parent = self.session, schedule[:-1]
        run.scratch = self._place(parent.rstrip("S"))
        before, _ = restore(self._state(parent), run)
        seen = run.replies[""]
        run.scratch = self._place(twin)
        state, _ = restore(self._state(twin), run)

        # checkpoints are named after the number of the move
        step = len(before.history)
        adapter = f"adapter-{step:02d}"
        shutil.rmtree(self._place(schedule), ignore_errors=True)
        shutil.copytree(run.scratch / run.adapter, self._place(schedule) / adapter)
        run.recall({"": seen | run.replies[""], adapter: run.replies[run.adapter]})
        run.adapter = adapter
        record = replace(state.history[-1], step=step, adapter=adapter)
        state = replace(
            state,
            candidate=replace(state.candidate, adapter=adapter),
            history=(*before.history, record),
        )
        save(self._state(schedule), run, state)

    def _compute(self, schedule: str) -> None:
        """Make a move, save its state, and note its node."""
        run = self.session
        started, saved = time.perf_counter(), run.saved_s
        state = self._move(schedule) if schedule else self._begin()
        # memoised replies count as if they had been made now
        seconds = time.perf_counter() - started + run.saved_s - saved
        save(self._state(schedule), run, state)
        parent = self.nodes[schedule[:-1]] if schedule else None
        self.nodes[schedule] = self._node(schedule, state, seconds, parent)

    def _place(self, schedule: str) -> Path:
        return self.work / f"node-{schedule}"

    def _state(self, schedule: str) -> Path:
        return self._place(schedule) / STATE

    def _begin(self) -> State:
        run = self.session
        run.use(Candidate(run.task.initial_prompt))
        # by these the frozen weights know what they know: in another batch the same weights may say it otherwise
        run.recall({"": run.replies.get("", {})})
        return loop.begin(run, State(Candidate(run.task.initial_prompt)))

    def _move(self, schedule: str) -> State:
        run, parent = self.session, schedule[:-1]
        # the weights in place are those of the last numerical move
        run.scratch = self._place(parent.rstrip("S"))
        state, _ = restore(self._state(parent), run)
        # what was spent before belongs to other nodes
        run.bill()
        run.scratch = self._place(schedule)
        # what a killed process left
        shutil.rmtree(run.scratch, ignore_errors=True)
        run.scratch.mkdir(parents=True)
        needs = ESTIMATORS[run.cfg.row.needs](run, state)
        move = LETTERS[schedule[-1]]
        outcome = loop.MOVES[move](run, state, needs)
        return loop.after(run, state, needs, Choice(move, "by the tree"), outcome)

    def _node(self, schedule: str, state: State, seconds: float, parent: Node | None) -> Node:
        """Return a node's record; a move that changed nothing shares its parent's scores."""
        run, step = self.session, state.history[-1]
        edits = cast("list[Json] | None", step.evidence.get("edits"))
        accepted = None if edits is None else any(edit["accepted"] for edit in edits)
        if parent is not None and accepted is False:
            measured = {key: parent[key] for key in ("test", "test_items", *run.abilities)}
        else:
            measured = measure(run, state)
        nll = run.nll(state.candidate.prompt, run.task.dev)
        estimates = {name: ESTIMATORS[name](run, state).demand for name in NEEDS}
        return {
            "schedule": schedule,
            "dev": step.dev,
            "train": step.train,
            **measured,
            "signal": asdict(step.signal),
            "dev_nll": sum(nll) / len(nll),
            "needs": estimates,
            "evidence": step.evidence,
            "accepted": accepted,
            "bill": step.bill,
            "seconds": round(seconds, 2),
            "prompt": asdict(step.prompt),
            # a tree may be finished on another machine than it was begun on
            "processor": processor(),
            "dtype": run.backbone.dtype,
        }


def by_length(schedules: Iterable[str]) -> list[str]:
    """Return schedules in the order of their number of moves, then of the alphabet."""
    return sorted(schedules, key=lambda schedule: (len(schedule), schedule))


def measure(run: Session, state: State) -> Node:
    """Score the weights in place on test, and on what the frozen weights could do."""
    rows = runs.final_rows(run, state.candidate)
    means = {
        split: runs.summary(runs.graded_rows(run, split, scored)) for split, scored in rows.items()
    }
    successes = "".join(str(int(s.reward.success)) for s in rows["test"])
    # what was obeyed was the rule, whatever else the reply said
    kept = {"locality": "success", "promptability": "style"}
    return {
        "test": means["test"],
        "test_items": successes,
        **{split: means[split][part] if split in means else None for split, part in kept.items()},
    }


def instance(run: Session) -> Json:
    """Return what an instance is: its settings, its task in numbers, and what computes it."""
    cfg, task = run.cfg, run.task
    needs = [task.hidden[e.id].need.value for e in task.test]
    backbone = run.backbone
    return {
        "schema": trees.SCHEMA,
        "instance": cfg.run_id,
        "split": "tuning" if cfg.is_tuning else "test",
        "depth": cfg.moves,
        "config": cfg.settings,
        # of test items
        "shares": {need: needs.count(need) / len(needs) for need in ("content", "style", "both")},
        # how far the frozen backbone follows prompts
        "follows": run.follows,
        # how many questions retention is measured on
        "abilities": {split: len(examples) for split, examples in run.abilities.items()},
        "facts": [example.fact for example in task.test],
        "weights": backbone.identity,
        "environment": environment(cfg.threads, backbone.device, backbone.dtype)
        | {"editor_engine": run.editor.engine},
    }
