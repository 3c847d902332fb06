"""What one run holds open: no reply is computed twice, and none outlives the weights that gave it."""

from __future__ import annotations

import numpy as np

from nslora.algorithm import moves
from nslora.types import Candidate, Prompt


def count_calls(monkeypatch, backbone) -> list[int]:
    """The number of texts of each call of the backbone from now on."""
    calls: list[int] = []
    real = type(backbone).generate

    def counted(self, texts, *args, **kwargs):
        calls.append(len(texts))
        return real(self, texts, *args, **kwargs)

    monkeypatch.setattr(type(backbone), "generate", counted)
    return calls


def test_replies_of_the_frozen_weights_are_made_once_for_all_runs(
    opened, backbone, monkeypatch
) -> None:
    first = opened()
    dev = first.task.examples("dev")
    made = first.score(first.task.start, dev)
    calls = count_calls(monkeypatch, backbone)
    assert first.score(first.task.start, dev) == made
    second = opened()
    assert second.score(second.task.start, dev) == made
    assert calls == []
    texts = [backbone.text(first.task.start, e.question) for e in dev]
    drawn = first.generate(texts, 0.8)
    assert [reply.text for reply in drawn] != [s.output for s in made]
    assert second.generate(texts, 0.8) == drawn and calls == [len(dev)]
    assert first.saved_s == 0 < second.saved_s
    tokens = sum(reply.tokens for reply in [*made, *drawn])
    assert first.generated_tokens == second.generated_tokens == tokens
    assert second.score(Prompt("Reply with one word."), dev)
    assert calls == [len(dev)] * 2


def test_sets_scored_in_one_batch_are_told_apart(opened, backbone, monkeypatch) -> None:
    session = opened()
    parts = [session.task.examples(name) for name in ("dev", "feedback", "test")]
    calls = count_calls(monkeypatch, backbone)
    scored = session.score_parts(session.task.start, *parts)
    assert [[s.example for s in part] for part in scored] == parts
    assert calls == [sum(map(len, parts))]


def test_only_texts_without_a_reply_are_answered_and_draws_are_not_merged(
    opened, backbone, monkeypatch
) -> None:
    session = opened()
    start, (dev, train) = (
        session.task.start,
        (session.task.examples(name) for name in ("dev", "feedback")),
    )
    few = session.score(start, dev[:2])
    calls = count_calls(monkeypatch, backbone)
    both, again = session.score_parts(start, dev, train)
    assert both[:2] == few and [s.example for s in again] == train
    texts = [backbone.text(start, e.question) for e in dev]
    assert [r.text for r in session.generate([texts[-1], texts[1], texts[-1]])] == [
        both[i].output for i in (-1, 1, -1)
    ]
    assert calls == [len({backbone.text(start, e.question) for e in dev + train} - set(texts[:2]))]
    spent = session.generated_tokens
    drawn = session.generate(texts[:1] * 4, 1.5)
    assert len({reply.text for reply in drawn}) > 1 and calls[1:] == [4]
    assert session.generated_tokens == spent + sum(reply.tokens for reply in drawn)


def test_replies_follow_the_weights_in_place(opened, backbone, monkeypatch) -> None:
    session = opened()
    dev, start = session.task.examples("dev"), Candidate(session.task.start)
    frozen, frozen_nll = session.score(start.prompt, dev), session.nll(start.prompt, dev)
    tuned = start
    for step in (1, 2):
        facts = {e.fact for e in session.task.examples("train")}
        tuned, _, _ = moves.numerical(session, tuned, facts, frozen, False, step)
    after, after_nll = session.score(start.prompt, dev), session.nll(start.prompt, dev)
    assert [s.output for s in after] != [s.output for s in frozen]
    assert not np.allclose(after_nll, frozen_nll)
    assert [
        r.text for r in session.frozen([backbone.text(start.prompt, e.question) for e in dev])
    ] == [s.output for s in frozen]
    calls = count_calls(monkeypatch, backbone)
    session.use(start)
    assert session.score(start.prompt, dev) == frozen
    session.use(tuned)
    assert session.score(start.prompt, dev) == after
    assert session.nll(start.prompt, dev) == after_nll
    assert calls == []
