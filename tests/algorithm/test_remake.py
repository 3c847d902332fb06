"""Targets: only what the reward verifies, with its source; forms are lent, answers rewritten, gold is the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from histories import step
from scripted import Scripted, bare_answer, down

from nslora.algorithm import remake
from nslora.algorithm.session import Memory, Session, State, Targets
from nslora.config import METHODS, RunConfig
from nslora.editor.client import Request
from nslora.tasks import rules
from nslora.tasks.grading import grade
from nslora.types import (
    Candidate,
    Example,
    Generation,
    Hidden,
    Item,
    Need,
    Pair,
    Prompt,
    Reward,
    Rule,
    Scored,
)

RULE = rules.make("end_phrase")
PHRASE = str(RULE.kwargs["phrase"])
INITIAL = Prompt()
REFINED = Prompt(f"Answer in one word. End every reply with: {PHRASE}")


def fact(name: str, answer: str, wording: int = 0) -> Example:
    return Example(f"{name}:{wording}", f"Where was {name} born ({wording})?", answer, name)


def problem(n: int, solution: str = "") -> Example:
    """A problem that is worked out: 10 + n."""
    return Example(f"sum {n}", f"What is 10 + {n}?", str(10 + n), f"sum {n}", solution)


ANA, BO = fact("Ana Orr", "Lima"), fact("Bo Tarn", "Oslo")
SUMS = [problem(n) for n in range(3)]


class World:
    """Stands for a session: a reward over some examples, scripted replies and a scripted editor.

    Args:
        asked: examples whose replies must end with the phrase; problems are graded by their number.
        frozen, sampled: reply to an input, of the frozen model and of the one in place.
    """

    def __init__(
        self,
        examples: list[Example],
        asked: tuple[Example, ...] = (ANA, BO),
        policy: str = "remade",
        frozen=lambda text: "",
        sampled=lambda text: "",
        editor=down,
    ) -> None:
        self.asked_facts = {e.fact for e in asked}
        self.cfg = RunConfig(method="alternate", targets=cast(Any, policy))
        self.editor = Scripted(editor)
        self.backbone = SimpleNamespace(text=lambda p, q: f"{p.system}|{q}")
        self.task = SimpleNamespace(
            train=tuple(examples), initial_prompt=INITIAL, obeys=lambda e, text: True
        )
        self.frozen_replies, self.sampled_replies = frozen, sampled
        self.sampled_texts: list[str] = []
        self.purposes: list[str] = []

    def rules_of(self, example: Example) -> tuple[Rule, ...]:
        return (RULE,) if example.fact in self.asked_facts else ()

    def reward(self, example: Example, text: str) -> Reward:
        grader = "number" if example.fact.startswith("sum") else "contains"
        return grade(Item(example, Hidden(self.rules_of(example), grader=grader)), text)

    def gold_reward(self, example: Example) -> Reward:
        return self.reward(example, example.answer)

    def asks_form(self, example: Example) -> bool:
        return self.gold_reward(example).success < 1

    def frozen(self, texts: list[str]) -> list[Generation]:
        return [Generation(self.frozen_replies(text), 3, -0.1) for text in texts]

    def sample(self, texts: list[str], purpose: str, temperature: float) -> list[Generation]:
        self.sampled_texts += texts
        self.purposes.append(purpose)
        return [Generation(self.sampled_replies(text), 3, -0.1) for text in texts]

    def timed(self, compute):
        return compute()

    def score(self, *replies: tuple[Example, str]) -> list[Scored]:
        return [Scored(e, text, self.reward(e, text)) for e, text in replies]


def targets(
    world: World,
    *replies: tuple[Example, str],
    prompt: Prompt = INITIAL,
    remembered: Targets | None = None,
) -> Targets:
    """Return a policy's targets after these replies of the candidate, all facts being chosen."""
    train = world.score(*replies)
    memory = Memory(targets=remembered or {})
    state = State(Candidate(prompt), train=train, history=(step(4, "symbolic"),), memory=memory)
    chosen = frozenset(e.fact for e, _ in replies)
    return remake.POLICIES[world.cfg.row.targets](cast(Session, world), state, chosen)


def in_form(request: Request) -> str:
    """An editor that writes the answer and the phrase."""
    return f"{bare_answer(request)}. {PHRASE}"


def names(text: str) -> str:
    """A frozen model that knows where both were born, and obeys a prompt that tells the phrase."""
    city = "Lima" if "Ana" in text else "Oslo"
    return f"{city}. {PHRASE}" if PHRASE in text else city


# ---- policies


def test_the_settings_name_every_policy() -> None:
    names = get_args(RunConfig.model_fields["targets"].annotation)
    assert set(names) == {"method", *remake.POLICIES}
    assert {method.targets for method in METHODS.values()} <= set(remake.POLICIES)
    assert set(remake.ARMS) < set(remake.POLICIES)


def test_gold_asks_nobody() -> None:
    for policy in ("gold", "duplicated"):
        world = World([ANA, BO], policy=policy, editor=in_form, frozen=names, sampled=names)
        assert targets(world, (ANA, "?"), (BO, "?"), prompt=REFINED) == {}
        assert world.editor.ledger.calls == 0 and world.sampled_texts == []


def test_own_verified_replies_come_first() -> None:
    world = World([ANA, BO], editor=in_form)
    made = targets(world, (ANA, f"It is Lima. {PHRASE}"), (BO, "?"))
    assert made["Ana Orr"] == (f"It is Lima. {PHRASE}", "remade")
    # the form that it brought is lent before the editor is asked
    assert made["Bo Tarn"] == (f"Oslo. {PHRASE}", "remade")
    assert world.editor.ledger.calls == 0


def test_replies_to_hinted_questions_are_targets_under_a_refined_prompt_only() -> None:
    world = World([ANA, BO], frozen=names)
    assert targets(world, (ANA, "?"), (BO, "?"), prompt=REFINED) == {
        "Ana Orr": (f"Lima. {PHRASE}", "remade"),
        "Bo Tarn": (f"Oslo. {PHRASE}", "remade"),
    }
    told = World([ANA, BO], frozen=lambda text: f"Lima. {PHRASE}")
    assert targets(told, (ANA, "?"), (BO, "?")) == {}


@pytest.mark.parametrize("policy", ["verified", "both"])
def test_arms_of_the_study_ask_under_the_initial_prompt_too(policy: str) -> None:
    world = World([ANA], policy=policy, frozen=lambda text: f"Lima. {PHRASE}")
    assert targets(world, (ANA, "?")) == {"Ana Orr": (f"Lima. {PHRASE}", "remade")}


def test_the_editor_rewrites_from_the_first_move_on_where_the_bare_answer_fails() -> None:
    plain = fact("Cy Vell", "Cairo")
    world = World([ANA, BO, plain], editor=in_form)
    made = targets(world, (ANA, "?"), (BO, "?"), (plain, "?"))
    assert made == {
        "Ana Orr": (f"Lima. {PHRASE}", "rewritten"),
        "Bo Tarn": (f"Oslo. {PHRASE}", "rewritten"),
    }
    # one answer, whose form the other one borrows; where the bare answer is enough, none
    assert world.editor.ledger.calls == 1


def test_a_rewritten_answer_with_a_token_of_a_chat_format_is_no_target() -> None:
    """Weights would learn to end their turn in the middle."""
    world = World([ANA], editor=lambda request: f"{in_form(request)}<|im_end|>")
    assert targets(world, (ANA, "?")) == {}
    assert world.editor.ledger.calls > 0


def test_what_the_reward_has_verified_stays_a_target() -> None:
    """Else the form is unlearned as soon as no example fails any more."""
    remembered = {"Ana Orr": (f"Lima. {PHRASE}", "rewritten")}
    world = World([ANA], editor=in_form)
    assert targets(world, (ANA, f"So, Lima. {PHRASE}"), remembered=remembered) == remembered
    assert world.editor.ledger.calls == 0
    for policy in ("sampled", "remade"):
        again = World([ANA], policy=policy)
        assert targets(again, (ANA, "?"), remembered=remembered) == remembered


def test_remembered_targets_that_a_new_phase_refuses_or_does_not_ask_about_are_dropped() -> None:
    remembered = {"Ana Orr": ("lima", "rewritten"), "Gone": (f"Rome. {PHRASE}", "remade")}
    assert targets(World([ANA]), (ANA, "?"), remembered=remembered) == {}


def test_only_problems_that_no_greedy_reply_solves_are_attempted_anew() -> None:
    world = World(SUMS, asked=(), sampled=lambda text: "11 is it." if "+ 1" in text else "?")
    made = targets(world, (SUMS[0], "10"), (SUMS[1], "It is 1."), (SUMS[2], "It is 2."))
    assert made == {"sum 0": ("10", "remade"), "sum 1": ("11 is it.", "remade")}
    wrong = [f"|{e.question}" for e in SUMS[1:] for _ in range(remake.ATTEMPTS)]
    assert world.sampled_texts == wrong


def test_rejection_sampling_asks_where_a_reply_would_say_more_than_gold() -> None:
    plain = fact("Cy Vell", "Cairo")
    world = World([ANA, plain], policy="sampled", sampled=lambda text: f"Lima. {PHRASE}")
    made = targets(world, (ANA, "?"), (plain, "?"))
    assert made == {"Ana Orr": (f"Lima. {PHRASE}", "sampled")}
    assert len(world.sampled_texts) == remake.SAMPLES
    # a reply that passes needs no sample
    world = World([ANA], policy="sampled")
    assert targets(world, (ANA, f"Lima! {PHRASE}")) == {"Ana Orr": (f"Lima! {PHRASE}", "remade")}
    assert world.sampled_texts == []


def test_sampling_has_a_purpose_of_its_own_at_every_move() -> None:
    world = World([ANA], policy="sampled")
    targets(world, (ANA, "?"))
    assert world.purposes == ["targets 1"]


def test_demonstrations_are_of_the_chosen_facts() -> None:
    world = World([ANA, BO], policy="demonstrated")
    world.task.demonstrate = lambda e: f"{e.answer}. {PHRASE}"
    assert targets(world, (ANA, "?")) == {"Ana Orr": (f"Lima. {PHRASE}", "demonstrated")}


@pytest.mark.parametrize("rule", sorted(rules.RULES))
def test_demonstrations_keep_their_rule_and_content(rule: str) -> None:
    asked = (rules.make(rule),)
    item = Item(ANA, Hidden(asked, Need.BOTH))
    assert grade(item, rules.demonstrate(asked, ANA.answer)).success == 1


def test_unverified_replies_are_kept_right_or_wrong() -> None:
    replies = {"+ 0": "It is 10.", "+ 1": "It is 7."}
    world = World(
        SUMS,
        asked=(),
        policy="unverified",
        frozen=lambda text: next((said for n, said in replies.items() if n in text), ""),
    )
    assert targets(world, *[(e, "?") for e in SUMS]) == {
        "sum 0": ("It is 10.", "unverified"),
        "sum 1": ("It is 7.", "unverified"),
    }


@pytest.mark.parametrize("policy", ["sampled", "remade", "verified", "both"])
def test_every_target_of_a_verified_policy_passes_the_reward(policy: str) -> None:
    """Whatever model and editor say."""
    examples = [ANA, BO, fact("Cy Vell", "Cairo"), *SUMS]
    said = iter(range(10_000))

    def mumble(_: object) -> str:
        n = next(said)
        return ["Lima", f"Lima. {PHRASE}", "12", f"Oslo? {PHRASE}", "", "Cairo it is"][n % 6]

    world = World(examples, policy=policy, frozen=mumble, sampled=mumble, editor=mumble)
    made = targets(world, *[(e, mumble(e)) for e in examples], prompt=REFINED)
    assert made
    by_fact = {e.fact: e for e in examples}
    assert all(world.reward(by_fact[name], text).success for name, (text, _) in made.items())


# ---- where targets come from


def lent(world: World, made: Targets, *examples: Example) -> Targets:
    return remake.lend(cast(Session, world), made, examples)


def test_a_verified_reply_lends_its_form() -> None:
    made = lent(World([ANA, BO]), {"Ana Orr": (f"Lima. {PHRASE}", "rewritten")}, ANA, BO)
    assert made["Bo Tarn"] == (f"Oslo. {PHRASE}", "rewritten")


def test_a_reply_that_says_more_than_its_answer_lends_only_what_its_reward_needs() -> None:
    """ "Ana Orr was born in Lima" with the city exchanged would teach a falsehood about Ana."""
    reply = (f"Ana Orr was born in Lima. {PHRASE}", "remade")
    # a target before the move, which is not among the examples that want one
    made = lent(World([ANA, BO]), {"Ana Orr": reply}, BO)
    assert made == {"Ana Orr": reply, "Bo Tarn": (f"Oslo. {PHRASE}", "remade")}


def test_a_form_that_cannot_be_freed_of_its_question_is_not_lent() -> None:
    ana = replace(ANA, question="Is there anything else than the town where Ana Orr was born?")
    whole = {"Ana Orr": (f"Lima. {PHRASE}", "remade")}
    assert lent(World([ana, BO], asked=(ana, BO)), whole, BO) == whole


def test_few_targets_are_shortened_to_a_form() -> None:
    """A judge may be paid for by the reply."""
    people = [
        replace(fact(f"Person {n}", "Lima"), question=f"Is there anything else on {n}?")
        for n in range(9)
    ]
    world = World([*people, BO], asked=(*people, BO))
    graded: list[str] = []
    reward = world.reward

    def counted(example: Example, text: str) -> Reward:
        graded.append(text)
        return reward(example, text)

    cast(Any, world).reward = counted
    whole = {e.fact: (f"Lima, it is. {PHRASE}", "remade") for e in people}
    assert lent(world, whole, BO) == whole
    # each has two sentences, and the bare answer of every example is graded
    assert len(graded) <= 4 * remake.LENDERS + len(people) + 1


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (f"Lima. {PHRASE}", f"Lima. {PHRASE}"),
        (f"It is Lima, in Peru. By the sea. {PHRASE}", f"Lima. {PHRASE}"),
        (f"It is Lima\nin Peru\n{PHRASE}", f"Lima\n{PHRASE}"),
        (f"Lima! Lima is large. {PHRASE}", f"Lima. {PHRASE}"),
        (f"So, Lima: {PHRASE}", f"So, Lima: {PHRASE}"),
        (f"It is No. 1. Lima. {PHRASE}", f"Lima. {PHRASE}"),
    ],
)
def test_a_target_is_shortened_to_what_its_reward_needs(text: str, short: str) -> None:
    assert remake.shortened(cast(Session, World([ANA])), ANA, text) == short


def test_a_target_keeps_its_answer_where_the_reward_asks_for_a_form_alone() -> None:
    def polite(example: Example, text: str) -> Reward:
        assert text
        return Reward(float("Thank you!" in text))

    session = cast(Session, SimpleNamespace(reward=polite, cfg=RunConfig()))
    assert remake.shortened(session, ANA, "Lima. So it is. Thank you!") == "Lima. Thank you!"


def test_a_judge_is_not_asked_about_shorter_texts(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("")
    cfg = RunConfig(task=f"own:{tmp_path / 'mine.jsonl'}", judge="is polite")
    session = cast(Session, SimpleNamespace(cfg=cfg, reward=None))
    text = f"It is Lima, in Peru. {PHRASE}"
    assert remake.shortened(session, ANA, text) == text


def test_bare_answers_that_are_worth_nothing_are_taught_all_the_same() -> None:
    """Else one known form would leave out every example that fails."""
    world = World([ANA, BO])
    cast(Any, world).reward = lambda example, text: Reward(float(PHRASE in text))
    rows = [Scored(e, "?", Reward(0.0)) for e in (ANA, BO)]
    state, chosen = State(Candidate(), train=rows), frozenset({"Ana Orr", "Bo Tarn"})
    known = {"Ana Orr": (f"Lima. {PHRASE}", "remade")}
    assert len(remake.taught(cast(Session, world), state, chosen, known)) == 2


def test_other_policies_teach_every_chosen_fact() -> None:
    """The baselines' targets are no reason to leave out what they are given."""
    world = World([ANA, BO], policy="sampled")
    rows = world.score((ANA, f"Rome. {PHRASE}"), (BO, "?"))
    state, chosen = State(Candidate(), train=rows), frozenset({"Ana Orr", "Bo Tarn"})
    known = {"Bo Tarn": (f"Oslo. {PHRASE}", "sampled")}
    assert len(remake.taught(cast(Session, world), state, chosen, known)) == 2


@pytest.mark.parametrize("rule", sorted(rules.RULES))
def test_a_shortened_target_keeps_its_rule_and_content(rule: str) -> None:
    asked = (rules.make(rule),)
    item = Item(ANA, Hidden(asked, Need.BOTH))
    session = SimpleNamespace(reward=lambda example, text: grade(item, text), cfg=RunConfig())
    text = rules.demonstrate(asked, ANA.answer)
    assert grade(item, remake.shortened(cast(Session, session), ANA, text)).success == 1


@pytest.mark.parametrize(
    ("text", "lends"),
    [
        ("Lima. Bye.", True),
        ("Lima, Lima.", False),
        ("lima. bye.", False),
        ("Ana comes from Lima.", True),
        ("She was born in Lima.", False),
        ("Lima " + "word " * 13, False),
    ],
)
def test_a_form_names_its_answer_once_and_nothing_of_its_question(text: str, lends: bool) -> None:
    assert remake.lends_form(ANA, text) is lends


def test_where_no_form_is_asked_for_only_that_of_the_prompt_is_lent() -> None:
    plain = fact("Cy Vell", "Cairo")
    world = World([ANA, plain], asked=(ANA,))
    by_prompt = lent(world, {"Ana Orr": (f"Lima. {PHRASE}", "remade")}, ANA, plain)
    assert by_prompt["Cy Vell"] == (f"Cairo. {PHRASE}", "remade")
    by_editor = lent(world, {"Ana Orr": (f"Lima. {PHRASE}", "rewritten")}, ANA, plain)
    assert set(by_editor) == {"Ana Orr"}


def rewritten(world: World, examples: list[Example]) -> Targets:
    state = State(Candidate(), history=(step(0, "start"),))
    return remake.rewritten(cast(Session, world), state, examples)


def test_the_editors_rewrites_are_verified_and_bounded() -> None:
    # the form has words of the question, so none can be lent
    facts = [
        replace(fact(f"Person {i}", "Lima"), question=f"Is there anything else on {i}?")
        for i in range(9)
    ]

    def world(editor) -> World:
        return World(facts, asked=tuple(facts), editor=editor)

    bound = world(lambda request: f"Lima. {PHRASE}")
    made = rewritten(bound, facts)
    assert len(made) == bound.editor.ledger.calls == remake.REWRITES
    assert {source for _, source in made.values()} == {"rewritten"}
    assert rewritten(world(lambda request: "Lima, as you know."), facts) == {}
    assert rewritten(world(down), facts) == {}


def test_an_editor_that_leaves_the_answer_out_has_it_put_back() -> None:
    world = World([ANA], editor=lambda request: PHRASE)
    assert rewritten(world, [ANA]) == {"Ana Orr": (f"Lima. {PHRASE}", "rewritten")}


def test_what_the_editor_makes_up_about_an_answer_is_left_out() -> None:
    world = World([ANA], editor=lambda request: f"Lima is a river in Ohio. {PHRASE}")
    assert rewritten(world, [ANA]) == {"Ana Orr": (f"Lima. {PHRASE}", "rewritten")}


def test_the_editor_is_asked_no_more_once_a_form_can_be_lent() -> None:
    facts = [fact(f"Person {i}", "Lima") for i in range(9)]
    replies = iter(["Lima", f"Lima. {PHRASE}"])
    world = World(facts, asked=tuple(facts), editor=lambda request: next(replies))
    assert rewritten(world, facts) == {"Person 1": (f"Lima. {PHRASE}", "rewritten")}
    assert world.editor.ledger.calls == 2


def test_the_editor_is_shown_answer_and_critique_but_no_question() -> None:
    """With the question, the editor writes whole sentences, whose form fits no other answer."""
    seen: list[Request] = []

    def reply(request: Request) -> str:
        seen.append(request)
        return ' {"city": "‹Lima›"} \n'

    world = cast(Session, World([ANA], editor=reply))
    assert remake.rewrite_answer(world, ANA, seed=1) == '{"city": "<Lima>"}'
    assert ANA.answer in seen[0].user and PHRASE in seen[0].user
    assert ANA.question not in seen[0].user
    assert remake.rewrite_answer(cast(Session, World([ANA])), ANA, seed=1) is None
    silent = cast(Session, World([ANA], editor=lambda request: "  \n"))
    assert remake.rewrite_answer(silent, ANA, seed=1) is None


def test_passing_replies_are_kept_only_where_they_say_more_than_gold() -> None:
    plain, known = fact("Cy Vell", "Cairo"), Example("w", "When did the war end?", "1945", "w")
    world = World([ANA, BO, plain, known, *SUMS])
    rows = [(ANA, f"Lima. {PHRASE}"), (BO, "Oslo"), (plain, "Cairo"), (known, "In 1945.")]
    state = State(Candidate(), train=world.score(*rows, (SUMS[2], "10 + 2 is 12.")))
    assert remake.passing(cast(Session, world), state) == {
        "Ana Orr": (f"Lima. {PHRASE}", "remade"),
        "sum 2": ("10 + 2 is 12.", "remade"),
    }


def test_a_problem_is_asked_without_its_result() -> None:
    """Told the result, a model writes it down: the working out, which training is to teach, would be lost."""
    assert remake.hint(SUMS[2]) == SUMS[2].question
    assert remake.hint(ANA) == f"{ANA.question}\n(The answer is Lima.)"
    known = Example("w", "When did the war end?", "1945", "w")
    assert "(The answer is 1945.)" in remake.hint(known)


# ---- pairs


def test_a_target_serves_every_wording_of_its_fact_and_gold_the_rest() -> None:
    wordings = [fact("Ana Orr", "Lima", w) for w in range(3)] + [BO]
    pairs = remake.spread(wordings, REFINED, {"Ana Orr": (f"Lima. {PHRASE}", "remade")})
    assert [p.source for p in pairs] == ["remade"] * 3 + ["gold"]
    assert [p.target for p in pairs] == [f"Lima. {PHRASE}"] * 3 + ["Oslo"]
    assert [p.parent for p in pairs] == [e.id for e in wordings]
    assert {p.prompt for p in pairs} == {REFINED}


def test_a_bare_answer_that_would_unlearn_a_known_form_is_not_taught() -> None:
    world = World([ANA, BO, fact("Cy Vell", "Cairo")], asked=(ANA, BO))
    cy = world.task.train[2]
    rows = world.score((ANA, f"Rome. {PHRASE}"), (BO, "?"), (cy, "Cairo"))
    state, chosen = State(Candidate(), train=rows), frozenset({"Ana Orr", "Bo Tarn", "Cy Vell"})

    def taught(targets: Targets) -> list[str]:
        examples = remake.taught(cast(Session, world), state, chosen, targets)
        return [e.fact for e in examples]

    # Ana's reply is worth what the bare answer is, Bo's less; Cy's bare answer passes
    known = {"Dee": (f"Bern. {PHRASE}", "remade")}
    assert taught(known) == ["Bo Tarn", "Cy Vell"]
    # her verified target is taught
    assert taught({"Ana Orr": (f"Lima. {PHRASE}", "remade")}) == ["Ana Orr", "Bo Tarn", "Cy Vell"]
    # as long as no form is known, bare answers are all there is
    assert taught({}) == ["Ana Orr", "Bo Tarn", "Cy Vell"]


def test_problems_without_a_solution_are_left_out_where_others_have_one() -> None:
    """Bare results among solutions teach to guess."""
    solved = remake.spread([*SUMS, BO], REFINED, {"sum 1": ("10 + 1 is 11.", "remade")})
    assert [(p.target, p.source) for p in solved] == [("10 + 1 is 11.", "remade"), ("Oslo", "gold")]
    assert [p.target for p in remake.spread(SUMS, REFINED, {})] == ["10", "11", "12"]
    worked = problem(0, "10 + 0 is 10.")
    pairs = remake.spread([worked, *SUMS[1:]], REFINED, {"sum 1": ("10 + 1 is 11.", "remade")})
    assert [p.target for p in pairs] == ["10 + 0 is 10.", "10 + 1 is 11."]


def test_gold_is_the_worked_solution_where_there_is_one() -> None:
    pairs = remake.gold_pairs([problem(0, "10 + 0 is 10."), ANA], REFINED)
    assert [p.target for p in pairs] == ["10 + 0 is 10.", "Lima"]


def test_arms_of_the_study_train_on_what_they_say() -> None:
    raw = [Pair(REFINED, f"{n} + 1?", str(n + 1), "gold", str(n)) for n in range(3)]
    pairs = [Pair(REFINED, "0 + 1?", "0 and 1 make 1", "remade", "0"), *raw[1:]]
    assert remake.ARMS["duplicated"](pairs, raw) == [*raw, *raw]
    assert remake.ARMS["both"](pairs, raw) == [*raw, pairs[0]]
    for arm in ("verified", "unverified"):
        assert remake.ARMS[arm](pairs, raw) == pairs[:1]
        # nothing remade: raw answers rather than no epoch
        assert remake.ARMS[arm](raw, raw) == raw


def test_replay_keeps_whole_sentences_right_or_wrong() -> None:
    plain = Example("a", "What is the capital of Peru?", "Lima", "a")
    loud = Example("b", "What is the capital of Chad?", "N'Djamena", "b")
    prompt = Prompt("Write in CAPITAL LETTERS.")
    replies = {"Peru": "Quito.", "Chad": "N'Djamena"}
    world = World([], frozen=lambda text: next(r for name, r in replies.items() if name in text))
    asked = [(INITIAL, plain), (prompt, loud)]

    def kept() -> list[tuple[Prompt, str, str]]:
        pairs = remake.replay(cast(Session, world), asked)
        assert {(p.source, p.parent) for p in pairs} <= {("replay", "")}
        return [(p.prompt, p.question, p.target) for p in pairs]

    other = (prompt, loud.question, "N'Djamena")
    assert kept() == [(INITIAL, plain.question, "Quito."), other]
    replies["Peru"] = ""
    assert kept() == [other]
    # replies of the greatest length were cut short: their whole sentences stay
    world.cfg = world.cfg.but(max_new_tokens=3)
    replies["Peru"] = "Lima, which is"
    assert kept() == []
    replies["Peru"] = "Lima. Next to"
    assert kept() == [(INITIAL, plain.question, "Lima.")]


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It is Lima. It lies", "It is Lima."),
        ("Lima! Why? Because", "Lima! Why?"),
        ("It lies 3.5 km from", ""),
        ("1. Lima 2. Cusco 3.", ""),
        ("Lima", ""),
        ("It is Lima.", "It is Lima."),
    ],
)
def test_a_cut_reply_ends_with_its_last_whole_sentence(text: str, whole: str) -> None:
    cut = Generation(text, 5, -1.0)
    assert remake.whole_sentences(cut, 5) == whole
    assert remake.whole_sentences(cut, 6) == text


def test_the_real_policies_run_on_a_real_session(opened) -> None:
    for policy in remake.POLICIES:
        run = opened(targets=policy, method="alternate")
        train = run.score(run.task.initial_prompt, run.task.feedback)
        state = State(
            Candidate(replace(run.task.initial_prompt, system="Lower case.")),
            train=train,
            history=(step(0, "start"),),
        )
        made = remake.POLICIES[policy](run, state, frozenset(s.example.fact for s in train))
        by_fact = {e.fact: e for e in run.task.train}
        assert set(made) <= set(by_fact)
        passed = [run.reward(by_fact[f], text).success for f, (text, _) in made.items()]
        assert policy == "unverified" or all(passed)
