"""What weights train on: target policies, remade data and replay.

A refined prompt makes the model answer in a new form. Once the reward has verified such a reply it
is training data, also for weights alone: `remade` is the policy of every method that may use it. A
reply is obtained with the gold answer as a hint (the rationalization of STaR, Zelikman et al.,
2022) and trained on without it; a problem that can be worked out is first asked as it is. Where no
reply passes, a verified reply to another question lends its form, and at last the editor rewrites
the answer itself. Gold is the rest, where it is worth more than what the candidate says already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from nslora.algorithm.editor_prompts import ANSWER, ANSWER_TOKENS
from nslora.algorithm.session import Session, State, Targets
from nslora.algorithm.textgrad_compat import quote, unescape
from nslora.editor.client import EditorError, Request
from nslora.tasks.grading import is_problem
from nslora.types import (
    CONTROL,
    Example,
    Generation,
    Move,
    Pair,
    Prompt,
    Scored,
)

REWRITES = 6  # answers that the editor rewrites per move at most, until one has a form for the rest
TEMPERATURE = 0.8  # of sampled replies
SAMPLES = 2  # sampled replies per question in rejection sampling
# sampled solutions per problem that the greedy reply does not solve
ATTEMPTS = 4
# words beside the answer in a reply that lends its form, at most
LENT_WORDS = 12
# targets that are shortened to a form at most: a judge may be paid for by the reply
LENDERS = 3
# a full stop after a digit may be that of a numbered list
SENTENCE_END = re.compile(r"(?<!\d)[.!?](?=\s|$)")
# a sentence or a line, with the blanks after it
SENTENCE = re.compile(r"\S.*?(?:(?<!\d)[.!?](?=\s|$)|(?=\n)|$)\s*")
HINT = "{question}\n(The answer is {answer}.)"


# ---- policies: (run, state, chosen facts) -> targets per fact; a fact without one trains on gold


def gold(run: Session, state: State, chosen: frozenset[str]) -> Targets:
    """Train on the given answers alone."""
    return {}


def demonstrated(run: Session, state: State, chosen: frozenset[str]) -> Targets:
    """Train on answers written in the hidden style: the upper reference."""
    examples = [s.example for s in state.train if s.example.fact in chosen]
    return {e.fact: (run.task.demonstrate(e), "demonstrated") for e in examples}


def sampled(run: Session, state: State, chosen: frozenset[str]) -> Targets:
    """Train on own verified replies (rejection sampling) where the bare answer is not enough."""
    targets = {**still_verified(run, state), **passing(run, state)}
    wanting = [
        s.example
        for s in state.train
        if s.example.fact in chosen
        and s.example.fact not in targets
        and gains_by_reply(run, s)
    ]
    return targets | sample_verified(run, state, wanting, SAMPLES, "sampled")


def remade(run: Session, state: State, chosen: frozenset[str]) -> Targets:
    """Train on every verified text that can be had, from the cheapest to the dearest.

    A text that the reward has verified stays a target for the rest of the run: else the form is
    unlearned as soon as no example fails any more.
    """
    targets = {**passing(run, state), **still_verified(run, state)}
    rows = [
        s
        for s in state.train
        if s.example.fact in chosen and s.example.fact not in targets
    ]
    examples = [s.example for s in rows]

    # replies under a refined prompt, in its form
    refined = state.candidate.prompt != run.task.initial_prompt
    if examples and (refined or run.cfg.row.targets in ARMS):
        targets |= hinted(run, state.candidate.prompt, examples)
    targets = lend(run, targets, examples)

    # solutions to problems that the greedy reply does not solve
    unsolved = [
        s.example
        for s in rows
        if is_problem(s.example) and s.reward.success < 1
    ]
    unsolved = [example for example in unsolved if example.fact not in targets]
    targets |= sample_verified(run, state, unsolved, ATTEMPTS, "remade")

    # answers that the editor rewrites, where the bare one fails the reward
    missing = [
        e for e in examples if e.fact not in targets and run.asks_form(e)
    ]
    targets |= rewritten(run, state, missing)
    return lend(run, targets, examples)


def unverified(run: Session, state: State, chosen: frozenset[str]) -> Targets:
    """Train on replies to hinted questions, right or wrong: the control of verification."""
    examples = [s.example for s in state.train if s.example.fact in chosen]
    texts = [
        run.backbone.text(state.candidate.prompt, hint(e)) for e in examples
    ]
    replies = zip(examples, run.frozen(texts), strict=True)
    return {
        e.fact: (reply.text, "unverified") for e, reply in replies if reply.text
    }


POLICIES: Mapping[str, Callable[[Session, State, frozenset[str]], Targets]] = {
    "gold": gold,
    "sampled": sampled,
    "remade": remade,
    "demonstrated": demonstrated,
    # arms of the study of remade data
    "duplicated": gold,
    "verified": remade,
    "both": remade,
    "unverified": unverified,
}


def _remade_alone(pairs: list[Pair], raw: list[Pair]) -> list[Pair]:
    """The remade pairs; without any, the raw ones."""
    return [pair for pair in pairs if pair.source != "gold"] or raw


def _raw_and_remade(pairs: list[Pair], raw: list[Pair]) -> list[Pair]:
    return raw + [pair for pair in pairs if pair.source != "gold"]


# which pairs an arm trains on, of those with targets and the raw ones
ARMS: Mapping[str, Callable[[list[Pair], list[Pair]], list[Pair]]] = {
    "duplicated": lambda pairs, raw: raw + raw,
    "verified": _remade_alone,
    "both": _raw_and_remade,
    "unverified": _remade_alone,
}


# ---- where targets come from


def gains_by_reply(run: Session, scored: Scored) -> bool:
    """Tell whether a verified reply says more than the bare answer: a form, or a working."""
    return run.asks_form(scored.example) or is_problem(scored.example)


def still_verified(run: Session, state: State) -> Targets:
    """Return the remembered targets that the reward still verifies; a new phase may ask otherwise."""
    # any wording of a fact does: the reward does not depend on it
    examples = {e.fact: e for e in run.task.train}
    return {
        fact: (text, source)
        for fact, (text, source) in state.memory.targets.items()
        if fact in examples and run.reward(examples[fact], text).success
    }


def passing(run: Session, state: State) -> Targets:
    """Return the candidate's own replies that the reward verifies, where they say more than gold."""
    return {
        s.example.fact: (s.output, "remade")
        for s in state.train
        if s.reward.success and gains_by_reply(run, s)
    }


def hint(example: Example) -> str:
    """Return the question with its answer as a hint; a problem as it is.

    Told its result, a model leaves the working out.
    """
    if is_problem(example):
        return example.question
    return HINT.format(question=example.question, answer=example.answer)


def hinted(
    run: Session, prompt: Prompt, examples: Sequence[Example]
) -> Targets:
    """Return the frozen model's replies to hinted questions that the reward verifies."""
    # the frozen weights: tuned ones may have forgotten how to obey
    texts = [run.backbone.text(prompt, hint(e)) for e in examples]
    targets = {}
    for example, reply in zip(examples, run.frozen(texts), strict=True):
        if reply.text and run.reward(example, reply.text).success:
            targets[example.fact] = (reply.text, "remade")
    return targets


def sample_verified(
    run: Session,
    state: State,
    examples: Sequence[Example],
    draws: int,
    source: str,
) -> Targets:
    """Return, per fact, the first of `draws` sampled replies that the reward verifies."""
    asked = [example for example in examples for _ in range(draws)]
    if not asked:
        return {}
    texts = [
        run.backbone.text(state.candidate.prompt, e.question) for e in asked
    ]
    # by the move: later moves draw other numbers
    purpose = f"targets {state.nth(Move.NUMERICAL)}"
    targets: dict[str, tuple[str, str]] = {}
    for example, reply in zip(
        asked, run.sample(texts, purpose, TEMPERATURE), strict=True
    ):
        if reply.text and run.reward(example, reply.text).success:
            targets.setdefault(example.fact, (reply.text, source))
    return targets


def lend(
    run: Session, targets: Targets, examples: Sequence[Example]
) -> Targets:
    """Give examples without a target the form of one that has: its text with the answer exchanged.

    A form that the prompt brought is lent to every example, one that the editor wrote only where a
    form is asked for. Each text is verified.
    """
    if all(e.fact in targets for e in examples):
        return targets
    verified = [
        (*targets[e.fact], e)
        for e in {e.fact: e for e in run.task.train}.values()
        if e.fact in targets and run.asks_form(e)
    ]
    # those first that fit other answers as they are
    verified.sort(key=lambda lender: not lends_form(lender[2], lender[0]))
    # shortened all the same: what they add may be true of their own answer alone
    forms = [
        (form, source, e)
        for text, source, e in verified[:LENDERS]
        for form in (shortened(run, e, text), text)
        if lends_form(e, form)
    ]
    lent = dict(targets)
    for e in examples:
        for text, source, lender in forms:
            # the answer exchanged, the form kept
            target = text.replace(lender.answer, e.answer)
            fits = source == "remade" or run.asks_form(e)
            if e.fact not in lent and fits and run.reward(e, target).success:
                lent[e.fact] = (target, source)
    return lent


def shortened(run: Session, example: Example, text: str) -> str:
    """Return a verified text with no more than its reward needs.

    Its sentences are left out one by one where the reward still verifies the rest, and the one that
    names the answer becomes the answer alone: "It is Lima, in Peru. By the sea. Bye!" with a rule
    about its end becomes "Lima. Bye!". What is left fits other answers as well. A judge, which is
    paid by the reply, is not asked about it: the text stays whole.
    """
    if run.cfg.judge:
        return text
    parts = SENTENCE.findall(text)
    for i, part in enumerate(parts):
        sentence = part.rstrip()
        bare = example.answer + sentence[-1:] * sentence.endswith((".", "!"))
        bare += part[len(sentence) :]
        for brief in ("", bare):
            shorter = "".join([*parts[:i], brief, *parts[i + 1 :]]).strip()
            # a reward may be about the form alone
            whole = example.answer in shorter and len(brief) < len(part)
            if whole and run.reward(example, shorter).success:
                parts[i] = brief
                break
    return "".join(parts).strip()


def lends_form(example: Example, text: str) -> bool:
    """Tell whether a text would fit another answer: it names its own once, and not the question.

    "Lima. Bye." fits every answer, "Lima is the capital of Peru. Bye." does not.
    """
    if text.count(example.answer) != 1:
        return False
    rest = re.findall(r"\w{4,}", text.replace(example.answer, " ").lower())
    question = set(re.findall(r"\w{4,}", example.question.lower()))
    return len(rest) <= LENT_WORDS and not question & set(rest)


def rewritten(
    run: Session, state: State, examples: Sequence[Example]
) -> Targets:
    """Return answers that the editor rewrote to do what the critique of the bare ones asks.

    Verified, and asked for until one has a form that can be lent to the rest.
    """
    # other seeds at every move: what failed once may succeed
    rng = run.cfg.rng(f"rewrite-{state.nth(Move.NUMERICAL)}")
    seeds = rng.integers(2**31, size=REWRITES)
    targets: dict[str, tuple[str, str]] = {}
    for example, seed in zip(examples, seeds, strict=False):
        text = rewrite_answer(run, example, int(seed))
        # a small editor often writes what the critic asks for, and leaves the answer out
        answer = example.answer
        tried = [text, f"{answer}. {text}", f"{text} {answer}"] if text else []
        tried = tried[:1] if run.cfg.judge else tried
        passed = (t for t in tried if run.reward(example, t).success)
        if whole := next(passed, None):
            # what else it says of the answer may be false
            target = shortened(run, example, whole)
            targets[example.fact] = (target, "rewritten")
            if lends_form(example, target):
                break
    return targets


def rewrite_answer(run: Session, example: Example, seed: int) -> str | None:
    """Return the bare answer as the editor rewrites it; None where the editor fails. Unverified.

    The question stays out of it: shown one, the editor writes a whole sentence, whose form fits no
    other answer.
    """
    critique = quote(run.gold_reward(example).critique)
    user = f"Answer: {quote(example.answer)}\nCritic: {critique}\nRewritten answer:"
    request = Request(
        ANSWER, user, seed, temperature=0.7, max_tokens=ANSWER_TOKENS
    )
    try:
        reply = run.timed(lambda: run.editor.complete(request))
    except EditorError:
        return None
    text = unescape(reply).strip()
    # nothing, or what would end the turn it is trained on
    return None if not text or CONTROL.search(text) else text


# ---- pairs


def gold_pairs(examples: Sequence[Example], prompt: Prompt) -> list[Pair]:
    """Return the given answers, bare (or the worked solutions, where the task has them)."""
    return [Pair(prompt, e.question, e.gold, "gold", e.id) for e in examples]


def spread(
    examples: Sequence[Example], prompt: Prompt, targets: Targets
) -> list[Pair]:
    """Return pairs for every wording of a fact from its target; gold where there is none.

    A problem with a bare result is left out where other problems have a solution: results among
    solutions teach to guess.
    """
    # does any problem have a solution to learn from?
    solved = any(is_problem(e) and e.fact in targets for e in examples)
    pairs = []
    for e in examples:
        guess = is_problem(e) and not e.solution and e.fact not in targets
        if not (solved and guess):
            target, source = targets.get(e.fact, (e.gold, "gold"))
            pairs.append(Pair(prompt, e.question, target, source, e.id))
    return pairs


def taught(
    run: Session, state: State, chosen: frozenset[str], targets: Targets
) -> list[Example]:
    """Return every training wording of the facts that weights learn: the chosen ones, and those with a target.

    Once a form is known, a bare answer that the reward is known to refuse is left out where the
    candidate's reply is worth as much already: it would unlearn the form and teach nothing.
    """
    # where bare answers are worth nothing, any reply is worth as much
    no_better = {
        s.example.fact
        for s in state.train
        if run.asks_form(s.example)
        and s.reward.value >= run.gold_reward(s.example).value > 0
    }
    form_known = targets and POLICIES[run.cfg.row.targets] is remade
    wanted = chosen - no_better if form_known else chosen
    return [e for e in run.task.train if e.fact in wanted or e.fact in targets]


def replay(run: Session, asked: Sequence[tuple[Prompt, Example]]) -> list[Pair]:
    """Return the frozen model's own replies as pairs, in whole sentences.

    Right or wrong, obedient or not: training keeps the frozen model's probabilities on them, which
    are what it knows and how far it obeys.
    """
    texts = [run.backbone.text(prompt, e.question) for prompt, e in asked]
    pairs = []
    for (prompt, example), reply in zip(asked, run.frozen(texts), strict=True):
        if text := whole_sentences(reply, run.cfg.max_new_tokens):
            pairs.append(Pair(prompt, example.question, text, "replay"))
    return pairs


def whole_sentences(reply: Generation, most: int) -> str:
    """Return a reply of `most` tokens, which was cut, up to its last whole sentence; others whole.

    A cut text teaches to run on, and small models run on so often that few would be left without.
    """
    if reply.tokens < most:
        return reply.text
    ends = [found.end() for found in SENTENCE_END.finditer(reply.text)]
    return reply.text[: ends[-1]] if ends else ""
