"""What adaptation must not cost: questions that measure forgetting and obedience, and replay.

Templates are in one of three sets that share none: about countries (the style task), of replay, and
of retention. Locality and promptability are the same for every task and seed.
"""

from collections.abc import Collection

import numpy as np

from nslora.tasks import rules, trivia
from nslora.types import SLOT, Item, Prompt, Rule

# rules of promptability, never in replay: obedience to them is not trained
RULES = ("max_words", "end_phrase", "bullet")
# start phrases of replay
OPENINGS = ("Gladly:", "My answer is this:", "Dear reader,", "As far as I know,")
# questions and answers of no task, which show a rule
SHOWN = (
    ("What is the brightest star in the night sky called?", "Sirius"),
    ("Who composed Carmen?", "Bizet"),
)

# questions, each under a prompt of its own
Prompted = list[tuple[Prompt, Item]]


def locality() -> list[Item]:
    """Return questions that a small model can answer: what can be forgotten."""
    # every other question of each template; promptability has the others
    lists = [questions[::2] for questions in trivia.questions(trivia.RETENTION)]
    return [question.item("locality") for question in trivia.in_turn(lists)]


def promptability(prompt: Prompt, asked: Collection[str]) -> Prompted:
    """Return other questions, each under `prompt` and a rule that the task does not ask for.

    `asked` holds the names of the task's own rules. The question's template states the rule and
    shows it: the smallest backbones follow hardly any rule that is only stated.
    """
    lists = [questions[1::2] for questions in trivia.questions(trivia.RETENTION)]
    choice = [rules.make(name) for name in RULES if name not in asked]
    # own data may ask for all of them: then there is nothing to measure
    if not choice:
        return []
    pairs: Prompted = []
    for i, question in enumerate(trivia.in_turn(lists)):
        # each round of templates starts one rule further, so that each template meets every rule
        nth_round, template = divmod(i, len(lists))
        rule = choice[(nth_round + template) % len(choice)]
        pairs.append((_instructed(prompt, rule), question.item("promptability", (rule,))))
    return pairs


def _instructed(prompt: Prompt, rule: Rule) -> Prompt:
    """Return `prompt` with a template that states the rule and shows it twice."""
    parts = [rules.instruction(rule)]
    for question, answer in SHOWN:
        parts.append(f"Q: {question}\nA: {rules.demonstrate((rule,), answer)}")
    parts.append(f"Q: {SLOT}\nA:")
    return Prompt(prompt.system, "\n\n".join(parts))


def replay(prompt: Prompt, asked: Collection[str], most: int) -> Prompted:
    """Return at most `most` questions twice: under `prompt`, and under an instruction in its place.

    The instruction states a rule that neither the task (`asked`, by name) nor promptability asks
    for. The same for every seed, so that the frozen model's replies are made once.
    """
    questions = trivia.in_turn(trivia.questions(trivia.REPLAY))[:most]
    plain: Prompted = [(prompt, question.item("replay")) for question in questions]

    avoid = {*asked, *RULES}
    choice = [rules.make(name) for name in rules.RULES if name not in avoid]
    if "start_phrase" not in avoid:
        choice += [rules.make("start_phrase", {"phrase": phrase}) for phrase in OPENINGS]
    # drawn, because in turn each template would meet one rule only
    draws = np.random.default_rng(0).integers(len(choice), size=len(questions))
    instructed: Prompted = [
        (Prompt(rules.instruction(rule)), question.item("instructed", (rule,)))
        for question, rule in zip(questions, [choice[draw] for draw in draws], strict=True)
    ]
    return plain + instructed
