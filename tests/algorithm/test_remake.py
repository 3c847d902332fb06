"""Remade data: only what the reward verifies, with its source; forms are lent, answers rewritten, gold is the rest."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from scripted import Scripted, down

from nslora.algorithm import remake
from nslora.config import RunConfig
from nslora.tasks import rules
from nslora.tasks.grading import grade
from nslora.types import Example, Generation, Pair, Prompt, Scored

CFG = RunConfig(rule="end_phrase")
RULE = rules.make("end_phrase")
PHRASE = str(RULE.kwargs["phrase"])
PROMPT = Prompt(f"Answer in one word. End every reply with: {PHRASE}")


def asked(fact: str, answer: str, wording: int = 0, ruled: bool = True) -> Example:
    kept = (RULE,) if ruled else ()
    return Example(
        f"{fact}:{wording}",
        f"Where was {fact} born ({wording})?",
        answer,
        kept,
        fact=fact,
        group=str(wording),
    )


ANA, BO = asked("Ana Orr", "Lima"), asked("Bo Tarn", "Oslo")


def test_a_target_serves_every_wording_of_its_fact_and_gold_the_rest() -> None:
    wordings = [asked("Ana Orr", "Lima", w) for w in range(3)] + [BO]
    pairs = remake.spread(wordings, PROMPT, {"Ana Orr": (f"Lima. {PHRASE}", "remade")})
    assert [p.source for p in pairs] == ["remade"] * 3 + ["gold"]
    assert [p.target for p in pairs] == [f"Lima. {PHRASE}"] * 3 + ["Oslo"]
    assert [p.parent for p in pairs] == [e.id for e in wordings]


def test_problems_without_a_solution_are_left_out_where_others_have_one() -> None:
    """Bare results among solutions teach to guess."""
    sums = [
        Example(str(i), f"What is 10 + {i}?", str(10 + i), fact=str(i), grader="number")
        for i in range(3)
    ]
    solved = remake.spread([*sums, BO], PROMPT, {"1": ("10 + 1 is 11.", "remade")})
    assert [(p.target, p.source) for p in solved] == [("10 + 1 is 11.", "remade"), ("Oslo", "gold")]
    assert [p.target for p in remake.spread(sums, PROMPT, {})] == ["10", "11", "12"]
    shown = replace(sums[0], solution="10 + 0 is 10.")
    found = remake.spread([shown, *sums[1:]], PROMPT, {"1": ("10 + 1 is 11.", "remade")})
    assert [p.target for p in found] == ["10 + 0 is 10.", "10 + 1 is 11."]


def test_a_verified_reply_lends_its_form() -> None:
    found = remake.lend({"Ana Orr": (f"Lima. {PHRASE}", "rewritten")}, [ANA, BO], grade)
    assert found["Bo Tarn"] == (f"Oslo. {PHRASE}", "rewritten")
    assert grade(BO, found["Bo Tarn"][0]).success == 1


def test_a_reply_that_says_more_than_its_answer_lends_nothing() -> None:
    """ "Ana Orr was born in Lima" with the city exchanged would teach a falsehood about Ana."""
    found = remake.lend(
        {"Ana Orr": (f"Ana Orr was born in Lima. {PHRASE}", "remade")}, [ANA, BO], grade
    )
    assert set(found) == {"Ana Orr"}


def test_examples_without_rules_are_lent_only_the_form_that_the_prompt_asks_for() -> None:
    plain = asked("Bo Tarn", "Oslo", ruled=False)
    styled = remake.lend({"Ana Orr": (f"Lima. {PHRASE}", "remade")}, [ANA, plain], grade)
    assert styled["Bo Tarn"] == (f"Oslo. {PHRASE}", "remade")
    assert set(remake.lend({"Ana Orr": (f"Lima. {PHRASE}", "rewritten")}, [ANA, plain], grade)) == {
        "Ana Orr"
    }


def test_the_editors_rewrites_are_verified_and_bounded() -> None:
    facts = [asked(f"Person {i}", "Lima") for i in range(9)]
    whole = Scripted(lambda request: f"The city is Lima. {PHRASE}")
    found = remake.rewritten(facts, grade, whole, CFG)
    assert len(found) == whole.ledger.calls == remake.REWRITES
    assert {source for _, source in found.values()} == {"rewritten"}
    assert remake.rewritten(facts, grade, Scripted(lambda request: "Lima, as you know."), CFG) == {}
    assert remake.rewritten(facts, grade, Scripted(down), CFG) == {}


def test_the_editor_is_asked_no_more_once_a_form_can_be_lent() -> None:
    facts = [asked(f"Person {i}", "Lima") for i in range(9)]
    replies = iter(["Lima", f"Lima. {PHRASE}"])
    editor = Scripted(lambda request: next(replies))
    assert remake.rewritten(facts, grade, editor, CFG) == {
        "Person 1": (f"Lima. {PHRASE}", "rewritten")
    }
    assert editor.ledger.calls == 2


def test_passing_replies_are_kept_only_where_a_rule_was_obeyed() -> None:
    plain = asked("Cy Vell", "Cairo", ruled=False)
    rows = [(ANA, f"Lima. {PHRASE}"), (BO, "Oslo"), (plain, "Cairo")]
    scored = [Scored(e, text, grade(e, text)) for e, text in rows]
    assert remake.passing(scored) == {"Ana Orr": (f"Lima. {PHRASE}", "remade")}


def test_a_problem_is_asked_without_its_result_and_its_right_solutions_are_kept() -> None:
    """Told the result, a model writes it down: the working out, which training is to teach, would be lost."""
    sums = [
        Example(str(i), f"What is 10 + {i}?", str(10 + i), fact=str(i), grader="number")
        for i in (2, 3)
    ]
    assert [remake.hint(e) for e in sums] == [e.question for e in sums]
    scored = [
        Scored(e, text, grade(e, text))
        for e, text in zip(sums, ("10 + 2 is 12.", "It is 14."), strict=True)
    ]
    assert remake.passing(scored) == {"2": ("10 + 2 is 12.", "remade")}
    known = Example("a", "In what year did the war end?", "1945", grader="number")
    assert "(The answer is 1945.)" in remake.hint(known)
    assert remake.passing([Scored(known, "In 1945.", grade(known, "In 1945."))]) == {}


def generation(text: str, tokens: int = 3) -> Generation:
    return Generation(text, tokens, -0.1)


def test_replay_keeps_whole_replies_that_obey_the_rule_they_were_told() -> None:
    loud = Example("b", "What is the capital of Chad?", "N'Djamena", (rules.make("upper_case"),))
    plain = Example("a", "What is the capital of Peru?", "Lima")
    told = Prompt("Write in CAPITAL LETTERS.")
    asked = [(Prompt(), plain), (told, loud), (told, loud), (Prompt(), plain), (Prompt(), plain)]
    replies = ["Lima is its capital.", "N'DJAMENA", "N'Djamena", "", "Lima, which is a"]
    kept = remake.replay(
        asked,
        [generation(text, CFG.max_new_tokens if text.endswith(" a") else 5) for text in replies],
        grade,
        CFG,
    )
    assert [(p.question, p.target, p.source, p.parent) for p in kept] == [
        (plain.question, "Lima is its capital.", "replay", ""),
        (loud.question, "N'DJAMENA", "replay", ""),
    ]


@pytest.mark.parametrize(
    ("replayed", "kept"),
    [("all", ["Peru.", "Lima.", "ABECHE", "N'DJAMENA"]), ("right", ["Lima.", "N'DJAMENA"])],
)
def test_wrong_replies_are_replayed_only_if_all_are(replayed: str, kept: list[str]) -> None:
    plain = Example("a", "What is the capital of Peru?", "Lima")
    loud = Example("b", "What is the capital of Chad?", "N'Djamena", (rules.make("upper_case"),))
    asked = [(Prompt(), plain)] * 2 + [(Prompt("Write in CAPITAL LETTERS."), loud)] * 2
    replies = [generation(text) for text in ("Peru.", "Lima.", "ABECHE", "N'DJAMENA")]
    pairs = remake.replay(asked, replies, grade, replace(CFG, replayed=replayed))
    assert [pair.target for pair in pairs] == kept


def test_verified_and_sampled_targets_all_pass_the_reward(backbone) -> None:
    brief = RunConfig(rule="max_words", max_new_tokens=16)
    word = rules.make("max_words")
    cities = [("France", "Paris"), ("Peru", "Lima"), ("Japan", "Tokyo"), ("Italy", "Rome")]
    examples = [
        Example(f"{i}", f"What is the capital of {c}?", a, (word,) * (i % 2), fact=c)
        for i, (c, a) in enumerate(cities)
    ]
    assert remake.hint(examples[0]) == "What is the capital of France?\n(The answer is Paris.)"
    replies = [generation(text) for text in ("Paris", "Lima it is, my friend", "Kyoto", "Rome")]
    verified = remake.verified(examples, replies, grade)
    assert verified == {"France": ("Paris", "remade"), "Italy": ("Rome", "remade")}
    sampled = remake.sampled(backbone, Prompt("Reply with one word."), examples, grade, brief)
    answers = {e.fact: e for e in examples}
    assert all(
        grade(answers[fact], text).success and kind == "sampled"
        for fact, (text, kind) in sampled.items()
    )


def test_the_export_is_a_dataset_and_a_jsonl(tmp_path) -> None:
    rows: list[dict[str, object]] = [
        {"question": "Wo?", "answer": "Köln", "parent": "a", "reward": 1.0}
    ]
    data = remake.export(rows, tmp_path)
    assert data[0]["answer"] == "Köln"
    assert [
        json.loads(line) for line in (tmp_path / "remade.jsonl").read_text().splitlines()
    ] == rows


@pytest.mark.parametrize("rule", sorted(rules.RULES))
def test_demonstrations_keep_their_rule_and_content(rule: str) -> None:
    example = Example("x", "Where was Ana Orr born?", "Lima", (rules.make(rule),), fact="x")
    assert grade(example, rules.demonstrate(example.rules, example.answer)).success == 1


def test_arms_of_the_study_train_on_what_they_say() -> None:
    raw = [Pair(PROMPT, f"{n} + 1?", str(n + 1), "gold", str(n)) for n in range(3)]
    pairs = [Pair(PROMPT, "0 + 1?", "0 and 1 make 1", "remade", "0"), *raw[1:]]
    assert remake.arranged(pairs, raw, "remade") == pairs
    assert remake.arranged(raw, raw, "gold") == raw
    assert remake.arranged(raw, raw, "duplicated") == [*raw, *raw]
    assert remake.arranged(pairs, raw, "verified") == pairs[:1]
    assert remake.arranged(pairs, raw, "both") == [*raw, pairs[0]]
    assert remake.arranged(raw, raw, "verified") == raw, (
        "nothing verified: raw answers rather than no epoch"
    )


def test_unverified_replies_are_kept_right_or_wrong() -> None:
    examples = [
        Example(f"math:{n}", f"{n} + 1?", str(n + 1), fact=f"math:{n}", grader="number")
        for n in range(3)
    ]
    replies = [Generation(text, 3, -0.1) for text in ("It is 1.", "It is 7.", "")]
    assert remake.unverified(examples, replies) == {
        "math:0": ("It is 1.", "unverified"),
        "math:1": ("It is 7.", "unverified"),
    }
    assert remake.verified(examples, replies, grade) == {"math:0": ("It is 1.", "remade")}
