"""Remade data: what a refined prompt makes the model answer, once the reward has verified it, becomes training data.

A reply is obtained with the gold answer as a hint (the rationalization of STaR, Zelikman et al., 2022) and kept
without it; a problem that can be worked out is asked as it is, as STaR does first. Where no reply passes, a verified
reply to another question lends its form, and at last the editor rewrites the answer itself. Only pairs that the reward
verifies are called remade.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import datasets

from nslora.algorithm.evaluate import Grade
from nslora.algorithm.textgrad_compat import rewrite_answer
from nslora.config import RunConfig
from nslora.editor.client import Editor, EditorError
from nslora.model.backbone import Backbone
from nslora.tasks.grading import is_problem
from nslora.types import Example, Generation, Pair, Prompt, Scored

REWRITES = 6  # answers the editor rewrites per move at most, until one has a form for the rest
SAMPLES, TEMPERATURE = (
    2,
    0.8,
)  # rejection sampling: replies per question of the purely numerical baseline,
ATTEMPTS = 4  # and at a problem that the model's greedy reply does not solve
HINT = "{question}\n(The answer is {answer}.)"


def gold(examples: Sequence[Example], prompt: Prompt) -> list[Pair]:
    """The given answers, bare (or the worked solutions, where the task has them)."""
    return [Pair(prompt, e.question, e.gold, "gold", e.id) for e in examples]


def spread(
    examples: Sequence[Example], prompt: Prompt, targets: dict[str, tuple[str, str]]
) -> list[Pair]:
    """Training pairs for every wording of a fact from one (target, source) per fact; bare gold where there is none.

    A problem with a bare result is left out where others have a target: results among solutions teach to guess.
    """
    solved = any(is_problem(e) and e.fact in targets for e in examples)
    guesses = {e.fact for e in examples if solved and is_problem(e) and not e.solution} - set(
        targets
    )
    pairs = []
    for e in examples:
        if e.fact not in guesses:
            target, source = targets.get(e.fact, (e.gold, "gold"))
            pairs.append(Pair(prompt, e.question, target, source, e.id))
    return pairs


def arranged(pairs: Sequence[Pair], raw: Sequence[Pair], targets: str) -> list[Pair]:
    """The pairs of an arm of the study, from those with remade targets (gold where there are none) and the raw ones.

    An arm without any remade target trains on raw answers.
    """
    remade = [p for p in pairs if p.source != "gold"]
    if targets == "duplicated":
        return [*raw, *raw]
    if targets == "both":
        return [*raw, *remade]
    return remade if remade and targets in ("verified", "unverified") else list(pairs)


def hint(example: Example) -> str:
    """The question with its answer as a hint; a problem, as it is: told its result, a model leaves the working out."""
    return (
        example.question
        if is_problem(example)
        else HINT.format(question=example.question, answer=example.answer)
    )


def verified(
    examples: Sequence[Example], replies: Sequence[Generation], grade: Grade
) -> dict[str, tuple[str, str]]:
    """Per fact, the (last) reply to it that the reward verifies, where there is one."""
    return {
        e.fact: (reply.text, "remade")
        for e, reply in zip(examples, replies, strict=True)
        if reply.text and grade(e, reply.text).success
    }


def unverified(
    examples: Sequence[Example], replies: Sequence[Generation]
) -> dict[str, tuple[str, str]]:
    """Per fact, the reply to the hinted question, right or wrong: the control of `verified`."""
    return {
        e.fact: (r.text, "unverified") for e, r in zip(examples, replies, strict=True) if r.text
    }


def lend(
    targets: dict[str, tuple[str, str]], examples: Sequence[Example], grade: Grade
) -> dict[str, tuple[str, str]]:
    """Give examples without a target the form of one that has: its reply with the answer exchanged, verified.

    Only a reply that is its bare answer in a style (strict content 1) and names that answer once can lend its form.
    A form that the prompt asks for is lent to every example, one that only the critic asks for to those with rules.
    """
    forms = []
    for e in examples:
        reply, source = targets.get(e.fact, ("", ""))
        if e.rules and lendable(e, reply, grade):
            forms.append((reply, e.answer, source))
    found = dict(targets)
    for e in examples:
        for reply, answer, source in forms:
            target = reply.replace(answer, e.answer)
            fits = e.rules or source == "remade"
            if e.fact not in found and fits and grade(e, target).success:
                found[e.fact] = (target, source)
    return found


def lendable(example: Example, reply: str, grade: Grade) -> bool:
    """Whether a reply is its bare answer in a style (strict content 1), and names that answer once."""
    return reply.count(example.answer) == 1 and grade(example, reply).content_strict == 1.0


def rewritten(
    examples: Sequence[Example], grade: Grade, editor: Editor, cfg: RunConfig
) -> dict[str, tuple[str, str]]:
    """Per fact, the bare answer as the editor rewrites it to satisfy the critic's words, where verified.

    The editor is asked until one answer has a form that can be lent to the others, REWRITES times at most.
    """
    found: dict[str, tuple[str, str]] = {}
    for i, e in enumerate(examples[:REWRITES]):
        try:
            target = rewrite_answer(e, grade(e, e.answer).words, editor, seed=cfg.seed * 1000 + i)
        except EditorError:
            continue
        if target and grade(e, target).success:
            found[e.fact] = (target, "rewritten")
            if lendable(e, target, grade):
                break
    return found


def sampled(
    backbone: Backbone, prompt: Prompt, examples: Sequence[Example], grade: Grade, cfg: RunConfig
) -> dict[str, tuple[str, str]]:
    """Per fact, an own sampled reply that passes the reward (rejection sampling), where there is one."""
    texts = [backbone.text(prompt, e.question) for e in examples]
    found: dict[str, tuple[str, str]] = {}
    for draw in range(SAMPLES):
        replies = backbone.generate(
            texts, cfg.max_new_tokens, TEMPERATURE, seed=cfg.seed * 100 + draw
        )
        for e, reply in zip(examples, replies, strict=True):
            if grade(e, reply.text).success:
                found.setdefault(e.fact, (reply.text, "sampled"))
    return found


def passing(scored: Sequence[Scored]) -> dict[str, tuple[str, str]]:
    """Per fact, the current candidate's own reply that obeys a rule or solves a problem, where the reward verifies it.

    Other replies that pass hold no more than the answer that is given anyway.
    """
    more = [s for s in scored if s.example.rules or is_problem(s.example)]
    return {s.example.fact: (s.output, "remade") for s in more if s.reward.success}


def replay(
    asked: Sequence[tuple[Prompt, Example]],
    replies: Sequence[Generation],
    grade: Grade,
    cfg: RunConfig,
) -> list[Pair]:
    """The frozen model's own replies as training pairs, where they are whole and keep the rule that their prompt tells.

    The others would teach to ignore prompts. With `replayed = "right"` those with wrong content are left out too: they
    would teach a wrong way of answering, such as to repeat the country that is asked about as its capital.
    """
    part = "success" if cfg.replayed == "right" else "style"
    return [
        Pair(prompt, e.question, reply.text, "replay")
        for (prompt, e), reply in zip(asked, replies, strict=True)
        if reply.text
        and reply.tokens < cfg.max_new_tokens
        and getattr(grade(e, reply.text), part) == 1
    ]


def export(rows: Sequence[dict[str, object]], folder: Path) -> datasets.Dataset:
    """Write verified pairs with their provenance as `remade.jsonl`, and return them as a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
    (folder / "remade.jsonl").write_text(text, encoding="utf-8")
    return datasets.Dataset.from_list([dict(row) for row in rows])
