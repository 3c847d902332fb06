"""The two moves: what they train on and write, and that successive halving decides as scoring every edit would."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from scripted import Scripted

from nslora.algorithm import evaluate, moves, remake
from nslora.algorithm.session import Session
from nslora.config import RunConfig
from nslora.editor.client import Request
from nslora.runs.run import remade_rows
from nslora.tasks.grading import grade
from nslora.tasks.rules import make
from nslora.types import Candidate, Edit, Example, Generation, Need, Prompt, Scored

PHRASE = str(make("end_phrase").kwargs["phrase"])


def test_baking_trains_under_the_start_prompt_what_the_refined_one_brought(
    opened, monkeypatch
) -> None:
    session = opened()
    session.cfg = replace(session.cfg, method="alternate", targets="verified", bake=True)
    refined = Prompt(f"End every reply with: {PHRASE}")
    said = lambda texts, _=0.0: [Generation(f"Lima. {PHRASE}", 5, -0.1) for _ in texts]  # noqa: E731
    monkeypatch.setattr(session, "frozen", said)
    monkeypatch.setattr(
        "nslora.algorithm.remake.verified",
        lambda examples, *_: {e.fact: ("kept", "remade") for e in examples},
    )
    train = session.score(session.task.start, session.task.examples("feedback"))
    facts = {s.example.fact for s in train}
    baked, _, pairs = moves.numerical(session, Candidate(refined), facts, train, False, 1)
    assert baked.prompt == session.task.start and baked.adapter
    assert {(p.prompt, p.made, p.target) for p in pairs} == {(session.task.start, refined, "kept")}
    session.cfg = replace(session.cfg, bake=False)
    kept, _, pairs = moves.numerical(session, Candidate(refined), facts, train, False, 2)
    assert kept.prompt == refined and {(p.prompt, p.made) for p in pairs} == {(refined, None)}
    (row,) = remade_rows(session.cfg, session.task.start, [replace(pairs[0], made=refined)])
    assert ["+", "End"] in cast(list, row["prompt_diff"])


def test_only_problems_that_no_greedy_reply_solves_are_attempted_anew(opened, monkeypatch) -> None:
    session = opened()
    session.cfg = replace(session.cfg, method="alternate", targets="verified")
    sums = [
        Example(str(i), f"What is 10 + {i}?", str(10 + i), fact=str(i), grader="number")
        for i in range(3)
    ]
    scored = [
        Scored(e, said, grade(e, said))
        for e, said in zip(sums, ("10", "It is 1.", "It is 2."), strict=True)
    ]
    asked = []

    def reply(texts: list[str], temperature: float = 0.0) -> list[Generation]:
        asked.append((texts, temperature))
        said = [s.output for s in scored] if not temperature else ["11 is it."] * len(texts)
        return [Generation(text, 5, -0.1) for text in said]

    monkeypatch.setattr(session, "frozen", reply)
    found = moves.choose_targets(session, session.task.start, scored, False)
    assert found == {"0": ("10", "remade"), "1": ("11 is it.", "remade")}
    (greedy, _), (again, temperature) = asked
    assert temperature > 0 and again == [
        text for text in greedy[1:] for _ in range(remake.ATTEMPTS)
    ]


def test_a_move_of_several_passes_counts_all_of_them_and_trains_further(opened) -> None:
    session = opened()
    train = session.score(session.task.start, session.task.examples("feedback"))
    facts = {s.example.fact for s in train}
    _, once, _ = moves.numerical(session, Candidate(session.task.start), facts, train, False, 1)
    session.use(Candidate(session.task.start))
    session.cfg = replace(session.cfg, epochs=3)
    _, thrice, _ = moves.numerical(session, Candidate(session.task.start), facts, train, False, 1)
    assert thrice.tokens == 3 * once.tokens and thrice.loss < once.loss


class Obedient:
    """A session whose replies keep the end phrase on the share of questions that the system prompt names."""

    def __init__(self) -> None:
        self.replies = self.batches = 0

    def score_each(self, prompts: list[Prompt], examples: list[Example]) -> list[Scored]:
        self.replies += len(examples)
        self.batches += 1
        kept = [float(p.system) > int(e.id) / 40 for p, e in zip(prompts, examples, strict=True)]
        texts = [f"Lima. {PHRASE}" if keep else "Lima." for keep in kept]
        return [Scored(e, text, grade(e, text)) for e, text in zip(examples, texts, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_halving_finds_the_edit_that_all_of_dev_would_choose_with_fewer_replies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [
        Example(str(i), "Capital of Peru?", "Lima", (make("end_phrase"),))
        for i in rng.permutation(40)
    ]
    dev = [Scored(e, "Lima.", grade(e, "Lima.")) for e in examples]
    shares = rng.permutation([0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.95])
    edits = [Edit(Prompt(str(share))) for share in shares]
    session = Obedient()
    best, values = moves.halve(cast(Session, session), edits, dev)
    spent = session.replies
    assert session.batches == len(moves.RUNGS)
    full = {
        id(e): evaluate.summary(session.score_each([e.prompt] * 40, examples))["value"]
        for e in edits
    }
    assert best is max(edits, key=lambda e: full[id(e)])
    assert set(values) == set(full)
    assert spent < (session.replies - spent) / 3


def test_one_edit_needs_no_comparison_and_none_gives_none() -> None:
    session = cast(Session, SimpleNamespace(score_each=None))
    only = Edit(Prompt("Be brief."))
    assert moves.halve(session, [only], []) == (only, {})
    assert moves.halve(session, [], []) == (None, {})


@pytest.mark.parametrize("control", ["none", "shuffled", "random"])
def test_controls_take_the_critics_message_out_of_an_edit(opened, control: str) -> None:
    seen: list[str] = []

    def reply(request: Request) -> str:
        seen.append(request.user)
        return "<IMPROVED_VARIABLE>{question} Every reply must end politely.</IMPROVED_VARIABLE>"

    session = opened()
    session.cfg, session.editor = replace(session.cfg, control=control), Scripted(reply)
    dev = session.score(session.task.start, session.task.examples("dev"))
    _, _, edits = moves.symbolic(session, Candidate(session.task.start), dev, dev, 1)
    critic = any(PHRASE in text for text in seen)
    written = any("must end politely" in str(edit["question"]) for edit in edits)
    assert (critic, written) == {
        "none": (True, True),
        "shuffled": (False, True),
        "random": (True, False),
    }[control]
    assert any(str(edit["question"]).startswith("{question} ") for edit in edits)


def test_replay_under_a_rewritten_prompt_has_the_content_known_before_in_the_new_form() -> None:
    """Asked for JSON, a small model names wrong capitals: replaying those would teach them."""
    cities = {"France": "Paris", "Peru": "Lima", "Chad": "N'Djamena", "Cuba": "Havana"}
    asked = [
        Example(f"replay:{land}", f"The capital of {land}?", city, (), Need.CONTENT, land, land)
        for land, city in cities.items()
    ]
    start, rewritten = Prompt("You help."), Prompt("Every reply must be JSON.")
    said = {
        f"You help. {asked[0].question}": "It is Paris.",
        f"You help. {asked[1].question}": "Lima, of course.",
        f"You help. {asked[2].question}": "It is Abuja.",  # not known before: nothing to keep
        f"You help. {asked[3].question}": "Havana.",
        f"Every reply must be JSON. {remake.hint(asked[0])}": '{"answer": "Paris"}',
        f"Every reply must be JSON. {remake.hint(asked[1])}": '{"answer": "Quito"}',  # wrong, hint or not
        f"Every reply must be JSON. {remake.hint(asked[3])}": '{"answer": "Havana"}',
    }

    def frozen(texts: list[str]) -> list[Generation]:
        return [Generation(said[text], 5, -0.1) for text in texts]

    session = cast(
        Any,
        SimpleNamespace(
            cfg=RunConfig(),
            task=SimpleNamespace(start=start, replay=[(start, e) for e in asked]),
            frozen=frozen,
            backbone=SimpleNamespace(text=lambda prompt, question: f"{prompt.system} {question}"),
        ),
    )
    pairs = moves.known(session, rewritten, asked, 3)
    assert {p.question: p.target for p in pairs} == {
        asked[0].question: '{"answer": "Paris"}',
        asked[3].question: '{"answer": "Havana"}',
    }
    assert {(p.prompt, p.source) for p in pairs} == {(rewritten, "replay")}
    assert len(moves.known(session, rewritten, asked, 1)) <= 1
    assert moves.replay(session, rewritten, 2, np.random.default_rng(0)) in ([pairs[0]], [pairs[1]])
