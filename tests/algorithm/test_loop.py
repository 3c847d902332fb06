"""Whole runs of the loop: what each method does, what is recorded, and what a failing editor costs."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from inspect import getsource
from pathlib import Path
from typing import Any, cast

import pytest
from histories import step
from scripted import down, kind, lowercase

from nslora.algorithm import loop
from nslora.algorithm.monitor import schedule
from nslora.algorithm.needs import Needs
from nslora.algorithm.session import Bill, Session, State
from nslora.config import METHODS, RunConfig
from nslora.runs.run import make_run
from nslora.tasks.build import build
from nslora.types import Move

# a prompt, then weights, in each of three phases
STREAM: dict[str, Any] = {"task": "stream", "method": "alternate", "moves": 2}
PAPER = Path(__file__).parents[2] / "paper" / "main.tex"
HAS_GEPA = importlib.util.find_spec("gepa") is not None


def adapt(run: Session) -> tuple[Sequence[Any], list[State]]:
    """Adapt, and return the history and every state on the way."""
    states: list[State] = []
    last, _ = loop.adapt_phases(run, lambda state, needs: states.append(state))
    return last.whole, states


# what each method's row says: its schedule, and the sources of the pairs that weights train on
ROWS: dict[str, tuple[str, set[str]]] = {
    "frozen": ("", set()),
    "lora": ("NNN", {"gold"}),
    "lora-rft": ("NNN", {"gold"}),  # nothing that a random model samples passes
    "lora-remade": ("NNN", {"gold", "rewritten"}),
    "lora-demonstrated": ("NNN", {"demonstrated"}),
    "textgrad": ("SSS", set()),
    "gepa": ("S", set()),
    "fixed:SN": ("SN", {"gold", "rewritten"}),
    "alternate": ("SNS", {"gold", "rewritten"}),
    "random": ("[NS]{3}", {"gold", "rewritten"}),
    "monitor": ("NNN", {"gold", "rewritten"}),
    # a random model lacks all content, which the classifier sees
    "needs-only": ("NNN", {"gold", "rewritten"}),
    "neurosymbolic": ("NNN", {"gold", "rewritten"}),
    "numerical-first": ("NNN", {"gold", "rewritten"}),
    "oracle": ("NNN", {"gold", "rewritten"}),
}


def test_every_method_is_tried_here() -> None:
    assert {name.partition(":")[0] for name in ROWS} == set(METHODS)


@pytest.mark.parametrize("method", ROWS)
def test_a_method_does_what_its_row_says(opened, method: str) -> None:
    if method == "gepa" and not HAS_GEPA:
        pytest.skip("the package gepa is not installed")
    run = opened(method=method)
    history, _ = adapt(run)
    moves, sources = ROWS[method]
    assert re.fullmatch(moves, schedule(history))
    assert [s.step for s in history] == list(range(len(history)))
    trained = [s.evidence["pairs"] for s in history if s.move == Move.NUMERICAL]
    assert set().union(*trained) - {"replay"} <= sources
    if moves == "NNN":
        assert set().union(*trained) >= sources
    if method in ("frozen", "lora", "lora-rft", "lora-demonstrated"):
        assert run.spent.editor_calls == 0


def test_a_fixed_schedule_stops_at_its_end(opened) -> None:
    history, _ = adapt(opened(method="fixed:S", moves=3))
    assert schedule(history) == "S"


def test_the_budget_is_kept_and_evidence_fits_the_move(opened) -> None:
    history, states = adapt(opened(method="alternate", moves=3))
    assert len(history) == 4
    start, symbolic, numerical, _ = history
    assert start.move == "start" and start.evidence == {} and start.reason == ""
    edits = symbolic.evidence["edits"]
    columns = {"system", "question", "problem", "screen_value", "accepted", "diff"}
    assert set(edits[0]) == columns
    assert set(numerical.evidence) == {"loss", "grad_norm", "scale", "pairs"}
    assert numerical.signal.c2 == numerical.evidence["grad_norm"] and numerical.signal.c1 is None
    assert symbolic.signal.c2 is None and symbolic.signal.gain is not None
    assert [state.history[-1] for state in states] == list(history)
    assert states[2].candidate.adapter == numerical.adapter == "adapter-02"


def test_random_repeats_itself_but_is_no_other_runs_coin(opened) -> None:
    first, _ = adapt(opened(method="random", moves=2))
    again, _ = adapt(opened(method="random", moves=2))
    assert [asdict(s) for s in first] == [asdict(s) for s in again]


def test_a_stream_goes_on_from_the_best_of_each_phase(opened) -> None:
    run = opened(reply=in_the_phases_form, **STREAM)
    states: list[State] = []
    last, chosen = loop.adapt_phases(run, lambda s, needs: states.append(s))
    history, memory, earlier = last.whole, last.memory, last.tested
    assert [s.step for s in history] == list(range(9))
    assert schedule(history) == "SNSNSN"
    # two facts and two known questions, then two facts more
    assert [history[i].dev["n"] for i in (0, 3, 6)] == [4, 6, 6]
    assert {split: len(rows) for split, rows in earlier.items()} == {"test-1": 4, "test-2": 4}
    for phase in (1, 2):
        before = history[3 * phase - 3 : 3 * phase]
        best, start = loop.best(before, run.cfg), history[3 * phase]
        assert (start.prompt, start.adapter) == (best.prompt, best.adapter)
    assert chosen.step >= 6

    # targets that the last phase's rule does not accept are dropped, others are made for it
    second, third = states[5].memory.targets, memory.targets
    examples = {e.fact: e for e in run.task.train}
    assert second and third
    assert not any(run.reward(examples[f], text).success for f, (text, _) in second.items())
    assert all(run.reward(examples[f], text).success for f, (text, _) in third.items())


@pytest.mark.parametrize(
    ("method", "by_phase"), [("lora", [3, 3, 0]), ("fixed:NN", [2, 2, 2]), ("fixed:N", [1, 1, 1])]
)
def test_phases_share_one_budget(opened, method: str, by_phase: list[int]) -> None:
    """Two moves for each of three phases: who spends them first has none left."""
    run = opened(task="stream", method=method, moves=2, rounds=3, targets="gold")
    history, _ = adapt(run)
    starts = [i for i, step in enumerate(history) if step.move == "start"]
    ends = [*starts[1:], len(history)]
    assert [end - start - 1 for start, end in zip(starts, ends, strict=True)] == by_phase


def test_a_phase_starts_without_the_losses_of_the_one_before_it(opened) -> None:
    """They may be of weights that the best candidate does not have, so the first C1 is not known."""
    run = opened(task="stream", method="lora", moves=2, rule="no_comma")
    history, _ = adapt(run)
    c1 = [s.signal.c1 is not None for s in history]
    assert c1 == [False, False, True] * 3


def in_the_phases_form(request) -> str:
    """Return answers in the form that the critic asks for: lower case, then one bullet point."""
    if kind(request) == "answer" and "bullet" in request.user:
        return "* " + request.user.split("Answer: ", 1)[1].split("\n")[0]
    return lowercase(request)


def test_a_verified_target_stays_a_target_for_the_rest_of_the_run(opened) -> None:
    _, states = adapt(opened(method="fixed:NSNN", moves=4))
    targets = [state.memory.targets for state in states]
    assert targets[1]
    for before, after in zip(targets, targets[1:], strict=False):
        assert before.items() <= after.items()


def test_bills_are_of_one_move_each_and_sum_to_the_runs(opened) -> None:
    run = opened(method="alternate")
    history, _ = adapt(run)
    total = sum((Bill(**s.bill) for s in history), Bill())
    assert total == run.spent
    assert all(s.bill["train_tokens"] == 0 for s in history if s.move != Move.NUMERICAL)
    start, symbolic, numerical, last = history
    assert numerical.bill["train_tokens"] == run.train_tokens > 0
    assert symbolic.bill["editor_calls"] > 0 and last.bill["editor_calls"] > 0
    assert start.bill["generated_tokens"] > 0 == start.bill["editor_calls"]


def test_replies_that_an_earlier_run_made_count_as_made(opened) -> None:
    kept: dict[str, Any] = {}

    def memo(key: str, compute):
        kept.setdefault(key, None)
        if kept[key] is None:
            kept[key] = compute()
        return kept[key]

    first, second = opened(memo=memo, method="textgrad"), opened(memo=memo, method="textgrad")
    histories = [adapt(run)[0] for run in (first, second)]
    assert histories[0] == histories[1]
    assert first.spent == second.spent
    assert first.saved_s == 0 < second.saved_s <= second.work_s


def test_a_failing_editor_costs_moves_never_the_run(opened) -> None:
    history, _ = adapt(opened(reply=down, method="alternate"))
    assert schedule(history) == "SNS"
    edits = [edit for s in history for edit in s.evidence.get("edits", [])]
    assert edits and all(edit["problem"] == "editor" for edit in edits)
    assert {s.prompt for s in history} == {history[0].prompt}
    # nor is an answer rewritten: weights train on what is given
    assert set(history[2].evidence["pairs"]) <= {"gold", "replay"}


def test_a_run_that_needs_nothing_stops(opened, monkeypatch) -> None:
    """Where every example passes there is nothing to decide."""

    def satisfied(run: Session, state: State) -> Needs:
        import numpy as np

        return Needs(np.zeros(len(state.train), bool), np.zeros(len(state.train)))

    monkeypatch.setitem(loop.ESTIMATORS, "asked", satisfied)
    history, _ = adapt(opened(method="neurosymbolic"))
    assert len(history) == 1


def test_the_best_step_is_the_earliest_of_the_best_on_dev() -> None:
    steps = [step(0, "start"), step(1, "symbolic", success=0.5), step(2, "symbolic", success=0.5)]
    assert loop.best(steps, RunConfig()) is steps[1]
    better = replace(steps[2], dev={"success": 0.5, "value": 0.6})
    assert loop.best([*steps[:2], better], RunConfig()) is better


def test_the_best_step_can_be_asked_to_have_tuned_weights() -> None:
    start, edit = step(0, "start"), step(1, Move.SYMBOLIC, success=0.5)
    tuned = [
        step(2, Move.NUMERICAL, success=0.25, adapter="adapter-02"),
        step(3, Move.SYMBOLIC, success=0.25, adapter="adapter-02"),
    ]
    only_tuned = RunConfig(returned="tuned")
    assert loop.best([start, edit, *tuned], RunConfig()) is edit
    assert loop.best([start, edit, *tuned], only_tuned) is tuned[0]
    assert loop.best([start, edit], only_tuned) is edit


def test_test_items_are_answered_once_per_weights_and_prompt_and_at_the_end(
    tiny, store, monkeypatch
) -> None:
    from scripted import Scripted
    from tinymodel import config

    cfg = config(method="alternate", rule="lower_case", backbone=tiny.name)
    asked: list[tuple[str, str]] = []
    decode = Session._decode

    def spy(run: Session, texts: list[str], *args: Any) -> Any:
        asked.extend((run.adapter, text) for text in texts)
        return decode(run, texts, *args)

    monkeypatch.setattr(Session, "_decode", spy)
    make_run(cfg, store, Scripted(lowercase), tiny, watch=lambda step: None)
    task = build(cfg)
    test = [i for i, (_, text) in enumerate(asked) if any(e.question in text for e in task.test)]
    dev = [i for i, (_, text) in enumerate(asked) if any(e.question in text for e in task.dev)]
    assert test and min(test) > max(dev)
    assert len({asked[i] for i in test}) == len(test)
    # at most four cells of weights and prompt
    assert len(test) <= 4 * len(task.test)


# ---- the code as Algorithm 1


def margin() -> list[int]:
    """Return the line numbers in the margin of `loop.adapt`."""
    return [int(number) for number in re.findall(r"# -+ (\d+)", getsource(loop.adapt))]


def test_the_margin_counts_the_lines_of_the_algorithm() -> None:
    numbers = margin()
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_margin_has_the_line_numbers_of_the_papers_box() -> None:
    paper = PAPER.read_text(encoding="utf-8")
    box = re.search(r"\\begin\{algorithm\}(.*?)\\end\{algorithm\}", paper, re.DOTALL)
    assert box is not None
    lines = re.findall(r"\\STATE\b", box[1])
    assert margin() == list(range(1, len(lines) + 1))


def test_the_loop_is_short_enough_to_be_read_beside_the_paper() -> None:
    (function,) = ast.parse(getsource(loop.adapt)).body
    assert isinstance(function, ast.FunctionDef) and function.end_lineno is not None
    assert function.end_lineno - function.lineno + 1 <= 40


# ---- a real model


def test_a_real_model_learns_facts_by_the_methods_own_decisions(backbone, memo, tmp_path) -> None:
    """Facts need content, which is seen: weights are tuned until nothing is needed."""
    from scripted import Scripted
    from tinymodel import bare

    cfg = RunConfig(
        task="facts",
        items=2,
        test_items=2,
        moves=4,
        max_new_tokens=8,
        epochs=3,
        lr=2e-3,
        replay=0.0,
        threads=1,
    )
    run = Session(cfg, build(cfg), backbone, Scripted(down), tmp_path, memo)
    try:
        last, chosen = loop.adapt_phases(run, lambda state, needs: None)
        test = run.score(run.task.initial_prompt, run.task.test)
    finally:
        bare(backbone)
    history = last.whole
    start, first = history[:2]
    assert start.dev["success"] == 0
    assert first.move == Move.NUMERICAL and first.demand["content"] == 1.0
    assert {s.move for s in history[1:]} == {Move.NUMERICAL}
    losses = [cast(float, s.evidence["loss"]) for s in history[1:]]
    assert losses == sorted(losses, reverse=True)
    assert chosen.dev["success"] == 1.0 and chosen.adapter is not None
    # the facts are known in wordings that were never trained on
    assert all(s.reward.success for s in test)
