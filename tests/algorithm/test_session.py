"""What one run holds open: no reply is computed twice, none outlives its weights, and all is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nslora.algorithm import loop
from nslora.algorithm.monitor import summary
from nslora.algorithm.needs import Needs, none
from nslora.algorithm.router import Choice
from nslora.algorithm.session import Bill, Session, State
from nslora.editor.client import Request
from nslora.types import Candidate, Example, Move, Prompt, Reward, Scored


def count_calls(monkeypatch, backbone) -> list[int]:
    """The number of texts of each call of the backbone from now on."""
    calls: list[int] = []
    real = type(backbone).generate

    def counted(self, texts, *args, **kwargs):
        calls.append(len(texts))
        return real(self, texts, *args, **kwargs)

    monkeypatch.setattr(type(backbone), "generate", counted)
    return calls


def fresh_memo() -> Callable[[str, Callable[[], Any]], Any]:
    """Return an empty memory for replies of the frozen weights."""
    kept: dict[str, Any] = {}

    def memo(key: str, compute: Callable[[], Any]) -> Any:
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    return memo


def make_move(run: Session, state: State, move: Move) -> State:
    estimated: Needs = none(run, state)
    outcome = loop.MOVES[move](run, state, estimated)
    return loop.after(run, state, estimated, Choice(move, "a test"), outcome)


# ---- the reward


def test_the_reward_is_a_number_and_a_critique_unless_parts_may_be_seen(opened) -> None:
    run = opened()
    example = run.task.train[0]
    reward = run.reward(example, "no idea")
    assert reward.parts == {} and 0 <= reward.value < 1 and example.answer in reward.critique
    assert opened(reward="parts").reward(example, "no idea").parts["content"] == 0


def test_a_form_is_asked_for_where_the_bare_answer_fails(opened) -> None:
    run = opened(rule="end_phrase")
    for example in run.task.feedback:
        hidden = run.task.hidden[example.id]
        assert run.asks_form(example) is bool(hidden.rules)


def test_another_task_asks_about_its_gold_answers_anew(opened) -> None:
    """In a stream the same question may come again with another rule."""
    first, second = opened(task="style"), opened(task="style", rule="no_comma")
    example = first.task.train[0]
    assert first.asks_form(example)
    first.enter(second.task)
    assert not first.asks_form(example)


# ---- replies


def test_replies_of_the_frozen_weights_are_made_once_for_all_runs(
    opened, tiny, monkeypatch
) -> None:
    memo = fresh_memo()
    first = opened(memo=memo)
    start, dev = first.task.initial_prompt, first.task.dev
    made = first.score(start, dev)
    calls = count_calls(monkeypatch, tiny)
    assert first.score(start, dev) == made
    second = opened(memo=memo)
    assert second.score(start, dev) == made
    assert calls == []
    texts = [tiny.text(start, e.question) for e in dev]
    drawn = first.sample(texts, "a test", 1.5)
    assert [reply.text for reply in drawn] != [s.output for s in made]
    assert second.sample(texts, "a test", 1.5) == drawn and calls == [len(dev)]
    # made once, counted twice
    assert first.saved_s == 0 < second.saved_s
    tokens = sum(reply.tokens for reply in [*made, *drawn])
    assert first.generated_tokens == second.generated_tokens == tokens
    assert second.score(Prompt("Reply with one word."), dev)
    assert calls == [len(dev)] * 2


def test_a_memo_is_not_taken_for_another_length_of_replies(opened) -> None:
    memo = fresh_memo()
    lengths = []
    for most in (2, 5):
        run = opened(memo=memo, max_new_tokens=most)
        rows = run.score(run.task.initial_prompt, run.task.dev)
        lengths.append(max(row.tokens for row in rows))
    assert lengths == [2, 5]


def test_sets_scored_in_one_batch_are_told_apart(opened, tiny, monkeypatch) -> None:
    run = opened(memo=fresh_memo())
    calls = count_calls(monkeypatch, tiny)
    dev, train = run.score_dev_and_train(run.task.initial_prompt)
    assert [s.example for s in dev] == list(run.task.dev)
    assert [s.example for s in train] == list(run.task.feedback)
    assert calls == [len(dev) + len(train)]


def test_only_texts_without_a_reply_are_answered(opened, tiny, monkeypatch) -> None:
    run = opened(memo=fresh_memo())
    start, dev = run.task.initial_prompt, run.task.dev
    few = run.score(start, dev[:2])
    calls = count_calls(monkeypatch, tiny)
    both, _ = run.score_dev_and_train(start)
    assert both[:2] == few
    every = {e.question for e in (*run.task.dev, *run.task.feedback)}
    assert calls == [len(every) - 2]
    texts = [tiny.text(start, e.question) for e in dev]
    replies = run.generate([texts[-1], texts[1], texts[-1]])
    assert [r.text for r in replies] == [both[i].output for i in (-1, 1, -1)]


def test_each_prompt_is_scored_on_its_own_example(opened) -> None:
    run = opened()
    prompts = [Prompt("One."), Prompt("Two.")]
    together = run.score_each(prompts, run.task.dev[:2])
    alone = [run.score(p, [e])[0] for p, e in zip(prompts, run.task.dev[:2], strict=True)]
    assert together == alone


def test_replies_follow_the_weights_in_place(opened, tiny, monkeypatch) -> None:
    run = opened(targets="gold")
    dev, start = run.task.dev, Candidate(run.task.initial_prompt)
    frozen, frozen_nll = run.score(start.prompt, dev), run.nll(start.prompt, dev)
    state = make_move(run, loop.begin(run, State(start)), Move.NUMERICAL)
    after, after_nll = run.score(start.prompt, dev), run.nll(start.prompt, dev)
    assert [s.output for s in after] != [s.output for s in frozen]
    assert not np.allclose(after_nll, frozen_nll)
    texts = [tiny.text(start.prompt, e.question) for e in dev]
    assert [r.text for r in run.frozen(texts)] == [s.output for s in frozen]
    calls = count_calls(monkeypatch, tiny)
    run.use(start)
    assert run.score(start.prompt, dev) == frozen
    run.use(state.candidate)
    assert run.score(start.prompt, dev) == after
    assert run.nll(start.prompt, dev) == after_nll
    assert calls == []


# ---- sampling


@pytest.mark.parametrize("tuned", [False, True])
def test_sampling_draws_other_numbers_for_another_purpose_only(opened, tuned: bool) -> None:
    """The first edition seeded every call by the run's seed alone.

    So the attempts at an unsolved problem were the same draws at every later move, as long as
    weights and prompt were the same, and were not counted where they were rejection samples.
    """
    run = opened(targets="gold")
    if tuned:
        state = loop.begin(run, State(Candidate(run.task.initial_prompt)))
        make_move(run, state, Move.NUMERICAL)
    texts = [run.backbone.text(run.task.initial_prompt, e.question) for e in run.task.dev]
    spent = run.generated_tokens
    second_move = run.sample(texts, "targets 2", 1.5)
    third_move = run.sample(texts, "targets 3", 1.5)
    assert [r.text for r in second_move] != [r.text for r in third_move]
    assert run.sample(texts, "targets 2", 1.5) == second_move
    # every draw is counted, repeated or not
    tokens = sum(reply.tokens for reply in (*second_move, *third_move, *second_move))
    assert run.generated_tokens == spent + tokens


def test_moves_of_one_run_draw_their_attempts_anew(opened, monkeypatch) -> None:
    """A wrong reply is attempted again with other draws, at a later move under equal weights."""
    run = opened(task="math", method="fixed:SNN", targets="remade")
    purposes: list[str] = []
    sample = run.sample

    def spy(texts, purpose: str, temperature: float):
        purposes.append(purpose)
        return sample(texts, purpose, temperature)

    monkeypatch.setattr(run, "sample", spy)
    loop.adapt_phases(run, lambda state, needs: None)
    # by the number of the numerical move
    assert purposes == ["targets 1", "targets 2"]


def test_draws_of_one_text_are_not_merged(opened, tiny) -> None:
    run = opened()
    text = tiny.text(run.task.initial_prompt, run.task.dev[0].question)
    drawn = run.sample([text] * 4, "a test", 1.5)
    assert len({reply.text for reply in drawn}) > 1


# ---- weights


def digest(path: Path) -> dict[str, str]:
    files = sorted(path.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_going_back_to_a_checkpoint_and_making_a_move_again_is_making_it_straight(opened) -> None:
    """Adapter, optimizer and random numbers are put back: resuming and trees of schedules need it."""
    run = opened(targets="gold")
    state = loop.begin(run, State(Candidate(run.task.initial_prompt)))
    first = make_move(run, state, Move.NUMERICAL)
    second = make_move(run, first, Move.NUMERICAL)
    third = make_move(run, second, Move.NUMERICAL)
    straight = digest(run.scratch / "adapter-03")
    assert "optimizer.safetensors" in straight and "adapter_model.safetensors" in straight

    # another session goes on from the checkpoint, as after a restart
    other = opened(targets="gold")
    other.use(second.candidate)
    again = make_move(other, second, Move.NUMERICAL)
    assert digest(other.scratch / "adapter-03") == straight
    steps = [asdict(state.history[-1]) for state in (again, third)]
    for step in steps:
        # what was kept of the first session's replies is made anew
        step["bill"].pop("generated_tokens")
    assert steps[0] == steps[1]
    assert again.dev == third.dev


def test_using_frozen_weights_starts_training_from_the_beginning(opened) -> None:
    run = opened(targets="gold")
    start = loop.begin(run, State(Candidate(run.task.initial_prompt)))
    first = make_move(run, start, Move.NUMERICAL)
    before = digest(run.scratch / "adapter-01")
    run.use(start.candidate)
    assert run.adapter == ""
    again = make_move(run, start, Move.NUMERICAL)
    assert digest(run.scratch / "adapter-01") == before
    assert again.history[-1].evidence == first.history[-1].evidence


# ---- what it costs


def test_bills_add_up_field_by_field() -> None:
    a, b = Bill(1, 2, 3, 4), Bill(10, 20, 30, 40)
    assert a + b == Bill(11, 22, 33, 44)
    assert b - a == Bill(9, 18, 27, 36)


def test_a_bill_is_of_what_was_spent_since_the_last_one(opened) -> None:
    run = opened(memo=fresh_memo())
    run.score(run.task.initial_prompt, run.task.dev)
    first = run.bill()
    assert first == run.spent and first.generated_tokens > 0
    assert run.bill() == Bill()


def test_what_an_editor_has_spent_for_other_runs_is_not_this_runs(opened, memo) -> None:
    other = opened(seed=2)
    other.editor.complete_all([Request("", "Rewritten answer: Answer: x\n", 1)])
    run = Session(other.cfg, other.task, other.backbone, other.editor, other.scratch, memo)
    assert asdict(run.spent) == asdict(run.bill())
    assert run.spent.editor_calls == run.spent.editor_tokens == 0
    run.editor.complete_all([Request("", "Rewritten answer: Answer: x\n", 2)])
    # two more, which were sent again
    run.editor.ledger.retries += 2
    assert run.spent.editor_calls == run.bill().editor_calls == 3
    assert other.spent.editor_calls == 4


def test_work_counts_memoised_replies_as_made(opened) -> None:
    memo = fresh_memo()
    runs = [opened(memo=memo) for _ in range(2)]
    for run in runs:
        run.score(run.task.initial_prompt, run.task.dev)
    assert runs[1].saved_s > 0
    assert runs[1].work_s >= runs[1].saved_s
    assert runs[0].work_s > 0


def test_a_summary_is_means_and_a_count() -> None:
    example = Example("x", "Where?", "Lima")
    rows = [Scored(example, "", Reward(value)) for value in (1.0, 0.5, 0.0)]
    assert summary(rows) == {"success": pytest.approx(1 / 3), "value": 0.5, "n": 3}
