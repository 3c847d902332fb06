"""The symbolic move: what the editor is shown, how edits are compared, the gate, and what is logged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from histories import needs
from scripted import PHRASE, down, kind, lowercase, tagged

from nslora.algorithm import loop, symbolic
from nslora.algorithm.monitor import mean_value
from nslora.algorithm.needs import Needs
from nslora.algorithm.session import Session, State
from nslora.editor.client import Request
from nslora.types import Candidate, Edit, Example, Move, Prompt, Reward, Scored


def begun(run: Session) -> State:
    return loop.begin(run, State(Candidate(run.task.initial_prompt)))


def unknown(state: State) -> Needs:
    """Return needs where nobody can tell: every failing example is for the prompt."""
    return Needs(np.array([s.reward.success < 1 for s in state.train]))


# ---- what a prompt may hold


@pytest.mark.parametrize(("grader", "problem"), [("labels", ""), ("contains", "leak")])
def test_a_prompt_may_list_labels_and_no_other_answers(
    opened, tmp_path: Path, grader: str, problem: str
) -> None:
    rows = [
        {"question": f"Mood {n}?", "answer": ("good", "bad", "mixed")[n % 3]} for n in range(15)
    ]
    data = tmp_path / "moods.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    listing = "Reply good, bad or mixed."

    def reply(request: Request) -> str:
        texts = {"question": tagged("{question}"), "system": tagged(listing)}
        return texts.get(kind(request), "It should name a mood.")

    run = opened(reply, task=f"own:{data}", grader=grader)
    state = begun(run)
    edits = symbolic.textgrad_edits(run, state, unknown(state))
    assert [edit.problem for edit in edits] == [problem]
    assert (edits[0].prompt.system == listing) is not bool(problem)


# ---- comparing edits


class Obedient:
    """A session whose replies keep a form on the share of questions that the system prompt names."""

    def __init__(self) -> None:
        self.replies = self.batches = 0

    def asks_form(self, example: Example) -> bool:
        return True

    def score_each(self, prompts: list[Prompt], examples: list[Example]) -> list[Scored]:
        self.replies += len(examples)
        self.batches += 1
        kept = [float(p.system) > int(e.id) / 40 for p, e in zip(prompts, examples, strict=True)]
        rows = zip(examples, kept, strict=True)
        return [Scored(e, "", Reward(1.0 if keep else 0.5)) for e, keep in rows]


@pytest.mark.parametrize("seed", range(5))
def test_halving_finds_the_edit_that_all_of_dev_would_choose_with_fewer_replies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [Example(str(i), "Capital of Peru?", "Lima") for i in rng.permutation(40)]
    dev = [Scored(e, "Lima.", Reward(0.5)) for e in examples]
    shares = rng.permutation([0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.95])
    edits = [Edit(Prompt(str(share))) for share in shares]
    session = Obedient()
    best, values = symbolic.successive_halving(cast(Session, session), edits, dev)
    spent = session.replies
    assert session.batches == len(symbolic.RUNGS)
    full = {id(e): mean_value(session.score_each([e.prompt] * 40, examples)) for e in edits}
    assert best is max(edits, key=lambda e: full[id(e)])
    assert set(values) == set(full)
    assert spent < (session.replies - spent) / 3


def test_one_edit_needs_no_comparison_and_none_gives_none() -> None:
    session = cast(Session, SimpleNamespace(score_each=None))
    only = Edit(Prompt("Be brief."))
    assert symbolic.successive_halving(session, [only], []) == (only, {})
    assert symbolic.successive_halving(session, [], []) == (None, {})


def test_edits_are_compared_where_a_form_is_asked_for_then_where_rewards_are_low(
    opened, monkeypatch
) -> None:
    run = opened(items=3, rule="end_phrase")
    dev = begun(run).dev
    compared: list[list[Example]] = []

    def spy(prompts: Any, examples: list[Example]) -> list[Scored]:
        compared.append(examples)
        return [Scored(e, "", Reward(0.0)) for e in examples]

    monkeypatch.setattr(run, "score_each", spy)
    symbolic.successive_halving(run, [Edit(Prompt("a")), Edit(Prompt("b"))], dev)
    first = compared[0][: symbolic.RUNGS[0]]
    # of nine, three ask for no form: the rung of six has none of them
    assert len(dev) == 9 and all(run.asks_form(e) for e in first)
    order = [s.reward.value for e in first for s in dev if s.example is e]
    assert order == sorted(order)


def test_the_most_graded_replies_of_a_move_are_gepas_budget(opened, monkeypatch) -> None:
    run = opened(items=4, candidates=3)
    state = begun(run)
    graded = 0
    score_each = run.score_each

    def count(prompts: Any, examples: Any) -> Any:
        nonlocal graded
        graded += len(examples)
        return score_each(prompts, examples)

    monkeypatch.setattr(run, "score_each", count)
    outcome = symbolic.symbolic(run, state, unknown(state))
    assert len(outcome.evidence["edits"]) == 3 * 3
    # and train, which is scored once the move is made
    assert graded + len(run.task.feedback) == symbolic.metric_calls(run.cfg, run.task)


# ---- the gate


def test_the_gate_keeps_the_old_prompt_where_dev_reward_gains_little(opened, monkeypatch) -> None:
    run = opened(gain_eps=0.02)
    dev = begun(run).dev
    value = mean_value(dev)

    def score(change: float) -> None:
        rows = [replace(s, reward=Reward(s.reward.value + change)) for s in dev]
        monkeypatch.setattr(run, "score", lambda prompt, examples: rows)

    for change, passes in ((-0.1, False), (0.0, False), (0.001 * value, False), (0.1, True)):
        score(change)
        assert symbolic.passes_gate(run, Prompt("New."), dev) is passes
    score(-0.1)
    run.cfg = run.cfg.but(gate=False)
    assert symbolic.passes_gate(run, Prompt("New."), dev)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        # one item alone may be chance, whatever rounding says
        *(([0.5, *[0.0] * (n - 1)], False) for n in (6, 8, 12, 36, 54)),
        ([0.5, 0.5, 0, 0, 0, 0, 0, 0], True),
        ([0.5, 0.5, -0.5, 0, 0, 0, 0, 0], False),
        ([0.5, 0.5, 0.5, 0.5, -0.5, 0, 0, 0], True),
        # nothing tells about the chance of a single item
        ([0.5], True),
    ],
)
def test_the_gate_wants_more_than_one_standard_error(
    opened, monkeypatch, changes: list[float], passes: bool
) -> None:
    run = opened(gain_eps=0.02)
    example = begun(run).dev[0]
    dev = [replace(example, reward=Reward(0.25)) for _ in changes]
    rows = [replace(example, reward=Reward(0.25 + change)) for change in changes]
    monkeypatch.setattr(run, "score", lambda prompt, examples: rows)
    assert symbolic.passes_gate(run, Prompt("New."), dev) is passes


def test_an_accepted_edit_is_the_new_prompt_and_the_weights_stay(opened) -> None:
    run = opened(gate=False)
    state = begun(run)
    state = replace(state, candidate=replace(state.candidate, adapter="adapter-07"))
    outcome = symbolic.symbolic(run, state, unknown(state))
    (accepted,) = [edit for edit in outcome.evidence["edits"] if edit["accepted"]]
    new = Prompt(accepted["system"], accepted["question"])
    assert outcome.candidate == Candidate(new, "adapter-07")
    assert new != run.task.initial_prompt
    assert outcome.memory is state.memory
    kept = "".join(token for op, token in accepted["diff"] if op != "-")
    assert kept == new.both


def test_an_editor_that_is_down_leaves_the_prompt_and_names_the_problem(opened) -> None:
    run = opened(reply=down)
    state = begun(run)
    outcome = symbolic.symbolic(run, state, unknown(state))
    assert outcome.candidate == state.candidate
    assert {edit["problem"] for edit in outcome.evidence["edits"]} == {"editor"}
    assert not any(edit["accepted"] for edit in outcome.evidence["edits"])


def test_where_nothing_fails_the_editor_is_not_asked(opened) -> None:
    run = opened()
    state = begun(run)
    passing = Needs(np.zeros(len(state.train), bool))
    outcome = symbolic.symbolic(run, state, passing)
    assert outcome.evidence == {"edits": []} and outcome.candidate == state.candidate
    assert run.editor.ledger.calls == 0


# ---- what the editor is shown


def test_failures_that_only_lack_form_are_shown_first(opened) -> None:
    run = opened(items=4)
    task = run.task
    rows = []
    for i, example in enumerate(task.feedback):
        # bare answers lack the form only; every other reply is wrong as well
        reply = example.answer if i % 2 else "No idea"
        rows.append(Scored(example, reply, run.reward(example, reply)))
    state = replace(begun(run), train=rows)
    shown = symbolic.failures_to_show(run, state, unknown(state), nth=1)
    assert {s.example.id for s in shown} == {s.example.id for s in rows if s.reward.success < 1}
    only_form = [run.asks_form(s.example) and s.output != "No idea" for s in shown]
    assert only_form == sorted(only_form, reverse=True) and any(only_form)
    # those that ask for no form come last
    asks = [run.asks_form(s.example) for s in shown]
    assert asks == sorted(asks, reverse=True) and not all(asks)
    assert shown == symbolic.failures_to_show(run, state, unknown(state), nth=1)
    assert shown != symbolic.failures_to_show(run, state, unknown(state), nth=2)


def test_only_examples_for_the_prompt_are_shown(opened) -> None:
    run = opened()
    state = begun(run)
    half = needs(0.5, 0.5, len(state.train))
    shown = {s.example.id for s in symbolic.failures_to_show(run, state, half, 1)}
    assert shown == {s.example.id for s in state.train[len(state.train) // 2 :]}


@pytest.mark.parametrize("control", ["none", "shuffled", "random"])
def test_controls_take_the_critics_message_out_of_an_edit(opened, control: str) -> None:
    seen: list[str] = []

    def reply(request: Request) -> str:
        seen.append(request.user)
        return tagged("{question} Every reply must end politely.")

    run = opened(reply=reply, control=control, task="style", rule="end_phrase")
    state = begun(run)
    outcome = symbolic.symbolic(run, state, unknown(state))
    critic = any(PHRASE in text for text in seen)
    edits = outcome.evidence["edits"]
    written = any("must end politely" in str(edit["question"]) for edit in edits)
    assert (critic, written) == {
        "none": (True, True),
        "shuffled": (False, True),
        "random": (True, False),
    }[control]


def test_requests_of_one_step_repeat_themselves_and_other_steps_ask_otherwise(opened) -> None:
    asked: list[Request] = []

    def reply(request: Request) -> str:
        asked.append(request)
        return lowercase(request)

    run = opened(reply=reply)
    state = begun(run)
    requests = []
    edited = replace(state.history[0], step=1, move=str(Move.SYMBOLIC))
    later = replace(state, history=(*state.history, edited))
    for moment in (state, state, later):
        asked.clear()
        symbolic.textgrad_edits(run, moment, unknown(moment))
        requests.append([request for request in asked if kind(request) != "gradient"])
    assert requests[0] == requests[1]
    assert not {r.seed for r in requests[0]} & {r.seed for r in requests[2]}
