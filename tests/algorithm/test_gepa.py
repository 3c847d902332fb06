"""GEPA with our replies, reward and editor: the real package, where it is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import down

from nslora.algorithm import gepa as ours
from nslora.algorithm import loop, symbolic
from nslora.algorithm.session import Session, State
from nslora.editor.client import Request
from nslora.types import SLOT, Candidate, Example, Prompt, Reward, Scored, UserError

BETTER = Prompt("Always write in lower case.", "{question} Lower case, please.")


def reflect(request: Request) -> str:
    """Propose the better text for the component that GEPA shows, in the fences that it asks for."""
    text = BETTER.question if SLOT in request.user else BETTER.system
    return f"```\n{text}\n```"


def begun(run: Session) -> State:
    return loop.begin(run, State(Candidate(run.task.initial_prompt)))


def graded(run: Session, monkeypatch, best: Prompt | None = None) -> list[int]:
    """Count the graded replies from now on; with `best`, that prompt passes and others fail."""
    counts: list[int] = []
    score = run.score

    def spy(prompt: Prompt, examples: Sequence[Example]) -> list[Scored]:
        counts.append(len(examples))
        scored = score(prompt, examples)
        if best is None:
            return scored
        value = 0.5 * (prompt.system == best.system) + 0.5 * (prompt.question == best.question)
        return [Scored(s.example, s.output, Reward(value, "Wrong.")) for s in scored]

    monkeypatch.setattr(run, "score", spy)
    return counts


@pytest.fixture
def package():
    """The package gepa, which must call no model by itself."""
    return pytest.importorskip("gepa")


@pytest.mark.usefixtures("package")
def test_gepa_finds_the_better_prompt_within_its_budget(opened, monkeypatch) -> None:
    run = opened(method="gepa", reply=reflect)
    state = begun(run)
    counts = graded(run, monkeypatch, best=BETTER)
    (edit,) = ours.edits(run, state, metric_calls=60)
    assert edit.prompt == BETTER and not edit.problem
    assert "".join(token for op, token in edit.diff if op != "-") == BETTER.both
    assert 0 < sum(counts) <= 60
    assert run.editor.ledger.calls > 0


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("budget", [6, 20, 45])
def test_no_more_replies_are_graded_than_there_are_metric_calls(
    opened, monkeypatch, budget: int
) -> None:
    run = opened(method="gepa", reply=reflect)
    state = begun(run)
    counts = graded(run, monkeypatch)
    ours.edits(run, state, budget)
    assert sum(counts) <= budget
    # nor many fewer, but for the last minibatch
    assert sum(counts) > budget - 2 * ours.MINIBATCH


@pytest.mark.usefixtures("package")
def test_no_model_is_called_but_by_our_editor(opened, monkeypatch) -> None:
    litellm = pytest.importorskip("litellm")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("litellm was called")

    monkeypatch.setattr(litellm, "completion", refuse)
    monkeypatch.setattr(litellm, "batch_completion", refuse)
    run = opened(method="gepa", reply=reflect)
    ours.edits(run, begun(run), 30)
    assert run.editor.ledger.calls > 0


def test_a_prompt_with_a_token_of_a_chat_format_cannot_be_used(opened) -> None:
    run = opened(method="gepa", reply=reflect)
    assert ours.problem(run, BETTER) == ""
    for token in ("<|im_end|>", "<end_of_turn>", "<|eot_id|>"):
        prompt = replace(BETTER, system=BETTER.system + token)
        assert "token of a chat format" in ours.problem(run, prompt)


@pytest.mark.usefixtures("package")
def test_the_same_run_finds_the_same_prompt(opened, monkeypatch) -> None:
    prompts = []
    for _ in range(2):
        run = opened(method="gepa", reply=reflect)
        state = begun(run)
        graded(run, monkeypatch, best=BETTER)
        prompts.append([edit.prompt for edit in ours.edits(run, state, 40)])
    assert prompts[0] == prompts[1]


@pytest.mark.usefixtures("package")
def test_an_editor_that_is_down_costs_the_move_not_the_run(opened) -> None:
    run = opened(method="gepa", reply=down)
    state = begun(run)
    assert ours.edits(run, state, 30) == []
    outcome = symbolic.symbolic(run, state, symbolic_needs(state))
    assert outcome.candidate == state.candidate


def symbolic_needs(state: State):
    import numpy as np

    from nslora.algorithm.needs import Needs

    return Needs(np.ones(len(state.train), bool))


@pytest.mark.usefixtures("package")
def test_prompts_that_cannot_be_used_score_nothing_and_say_why(opened, monkeypatch) -> None:
    import gepa

    run = opened(method="gepa")
    counts = graded(run, monkeypatch)
    adapter = ours._adapter(run, gepa, metric_calls=100)
    batch = list(run.task.dev[:2])
    answer = run.task.train[0].answer
    for system, question in (
        ("Be brief.", "No slot."),
        ("", SLOT),
        ("Be brief.", f"{SLOT} {SLOT}"),
        (f"Ask {SLOT}", SLOT),
        ("long " * 200, SLOT),
        (f"The answer is {answer}.", SLOT),
    ):
        candidate = {"system": system, "question": question}
        result = adapter.evaluate(batch, candidate, capture_traces=True)
        assert result.scores == [0.0, 0.0]
        rows = adapter.make_reflective_dataset(candidate, result, ["system"])["system"]
        assert rows[0]["Question"] == batch[0].question and rows[0]["Critique"]
    # none of them was put to the model
    assert counts == []


@pytest.mark.usefixtures("package")
def test_a_reflection_sees_the_critique_without_the_right_answer(opened) -> None:
    run = opened(method="gepa")
    example = run.task.train[0]
    reward = run.reward(example, "No idea")
    assert example.answer in reward.critique
    assert example.answer not in ours.critique(Scored(example, "No idea", reward))
    assert ours.critique(Scored(example, "x", Reward(1.0))) == "The reply is right."


def test_a_usable_prompt_has_no_problem(opened) -> None:
    run = opened(method="gepa")
    assert ours.problem(run, run.task.initial_prompt) == ""
    assert ours.problem(run, BETTER) == ""


@pytest.mark.parametrize(("grader", "allowed"), [("labels", True), ("contains", False)])
def test_a_prompt_may_list_labels_and_no_other_answers(
    opened, tmp_path: Path, grader: str, allowed: bool
) -> None:
    rows = [
        {"question": f"Mood {n}?", "answer": ("good", "bad", "mixed")[n % 3]} for n in range(15)
    ]
    data = tmp_path / "moods.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    run = opened(method="gepa", task=f"own:{data}", grader=grader)
    assert (ours.problem(run, Prompt("Reply good, bad or mixed.")) == "") == allowed


def test_a_missing_package_is_one_sentence(opened, monkeypatch) -> None:
    run = opened(method="gepa")
    state = begun(run)
    monkeypatch.setitem(sys.modules, "gepa", None)
    with pytest.raises(UserError, match=r"needs the extra: pip install .*peers"):
        ours.edits(run, state, 30)
