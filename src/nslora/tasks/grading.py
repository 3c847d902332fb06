"""Grade replies: the reward in parts (content, lenient and strict; style), and a critique in words.

A reply earns content only by giving the answer: a list of guesses or an echo of the question earns
none, and of a JSON object only the values are read. Both grades look at the content under the style
(`rules.strip`), so following a rule never costs content.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from functools import cache

from nslora.tasks import functions, graders, rules, world
from nslora.types import Example, Item, Reward

# a table for `str.translate`
LETTERS = str.maketrans(graders.LETTERS)
# kana and han are written without spaces: every sign counts as a word
UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u9fff])")
# "-5", "1,234.50", with a hyphen or a minus sign; in "3-5" the hyphen is none
NUMBER = re.compile(r"(?<![\w.)])[-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
SEPARATOR = re.compile(r"[,;/|\n]|\bor\b|\band\b")
# other names of the answer's kind that a reply may mention ("Canberra, not Sydney")
OTHERS = 1
# short items in a row that make a reply a list, where the answer's kind is not known
ITEMS = 4


def normalise(text: str) -> str:
    """Return the words in lower case without diacritics and punctuation: "São  Paulo." -> "sao paulo"."""
    # a letter with a diacritic becomes the letter and a combining mark, and the mark goes
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(c for c in decomposed if not unicodedata.combining(c))
    # decomposing can bring capitals back, as in a letter-like symbol
    bare = bare.casefold().translate(LETTERS)
    spaced = UNSPACED.sub(r" \1 ", bare)
    return " ".join(re.sub(r"[\W_]+", " ", spaced).split())


def _mentions(text: str, name: str) -> bool:
    """Tell whether `name` stands in `text` as whole words, and not only as "not <name>".

    Both are normalised.
    """
    affirmed = f" {text} ".replace(f" not {name} ", " ")
    return f" {name} " in affirmed


@cache
def _kinds() -> tuple[frozenset[str], ...]:
    """Return the pools of names of one kind each, normalised."""
    return tuple(frozenset(map(normalise, pool)) for pool in world.pools())


@cache
def _others_of_kind(answer: str) -> frozenset[str]:
    """Return the other names of every kind that the answer is of; empty where its kind is unknown."""
    kinds = [kind for kind in _kinds() if answer in kind]
    return frozenset().union(*kinds) - {answer}


def lists_answers(reply: str, example: Example) -> bool:
    """Tell whether a reply guesses: several names of the answer's kind, or a row of short items."""
    return _names_several(reply, example) or _is_row(reply, example)


def _names_several(reply: str, example: Example) -> bool:
    text, answer = normalise(reply), normalise(example.answer)
    names = [name for name in _others_of_kind(answer) if _mentions(text, name)]
    # a part of a longer name ("Guinea" in "New Guinea"), of the question or of the answer is no guess
    innocent = f"{normalise(example.question)} | {answer}"
    guesses = [
        name
        for name in names
        if not _mentions(innocent, name)
        and not any(name != longer and _mentions(longer, name) for longer in names)
    ]
    return len(guesses) > OTHERS


def _is_row(reply: str, example: Example) -> bool:
    answer = normalise(example.answer)
    items = {normalise(item) for item in SEPARATOR.split(reply)} - {""}
    short = [item for item in items if len(item.split()) <= 3 and not _mentions(item, answer)]
    # an answer that is a list itself may be given
    extra = len(SEPARATOR.findall(example.answer))
    return len(short) >= ITEMS + extra


def number(text: str) -> Decimal | None:
    """Return the last number of a text, as in "1,234.50" and "-5"; None if there is none."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-"))


def is_problem(example: Example) -> bool:
    """Tell whether the answer is to be worked out: a number asked for by a question with numbers."""
    asked_with_numbers = NUMBER.search(example.question) is not None
    return asked_with_numbers and graders.is_number(example.answer)


def _without_article(text: str) -> str:
    return re.sub(r"^(?:a|an|the) (?=\w)", "", normalise(text))


def _content(item: Item, reply: str) -> tuple[float, float]:
    """Return the (lenient, strict) grades of the content, each 0.0 or 1.0."""
    if item.hidden.grader.startswith(graders.OWN):
        return _own_content(item, reply)
    # content is read in the reply without its style, and in the values only of a JSON object
    bare = rules.strip(item.hidden.rules, reply)
    text = rules.json_values(bare)
    grade_as = _grade_number if item.hidden.grader == "number" else _grade_name
    lenient, alone = grade_as(item.example, text, bare)
    return float(lenient), float(lenient and alone)


def _own_content(item: Item, reply: str) -> tuple[float, float]:
    """Return the (lenient, strict) grades of the content of a reply to own data."""
    asked = item.hidden.rules
    if graders.of(item)[0] in graders.OF_JSON:
        # the content is the JSON object, not its values
        asked = tuple(rule for rule in asked if rule.name != "json")
    bare = rules.strip(asked, reply)
    lenient, strict = graders.grade(item, bare)
    if _by_name(item) and lists_answers(rules.json_values(bare), item.example):
        return 0.0, 0.0
    return float(lenient), float(strict)


def _by_name(item: Item) -> bool:
    """Tell whether a reply is right that names the answer among other words."""
    return graders.of(item)[0] == "contains"


def _grade_number(example: Example, text: str, bare: str) -> tuple[bool, bool]:
    """Tell whether the last number is right, and whether the reply is one number and nothing else."""
    value = number(text)
    right = value is not None and value == number(example.answer)
    return right, NUMBER.fullmatch(bare.strip().rstrip(".")) is not None


def _grade_name(example: Example, text: str, bare: str) -> tuple[bool, bool]:
    """Tell whether the reply names the answer, and whether it is the answer and nothing else."""
    # a reply that repeats the question has not thereby named the answer
    reply = normalise(text).replace(normalise(example.question), " ")
    right = _mentions(reply, normalise(example.answer)) and not lists_answers(text, example)
    return right, _without_article(bare) == _without_article(example.answer)


def _content_critique(item: Item, reply: str) -> str:
    """Return what a critic says about wrong content; it names the right answer."""
    example = item.example
    right = f"the right answer is '{example.answer}'."
    if not reply.strip():
        return f"The reply is empty; {right}"
    own = item.hidden.grader.startswith(graders.OWN)
    if own and (fault := graders.fault(item, reply)):
        return f"{fault}; {right}"
    if _by_name(item) and lists_answers(rules.json_values(reply), example):
        return f"The reply must give one answer, not a list; {right}"
    steps = " It has to be worked out step by step." if is_problem(example) else ""
    return f"The answer is wrong; {right}{steps}"


def grade(item: Item, reply: str) -> Reward:
    """Return the reward of a reply: the mean of its content and style parts, and a critique.

    The parts are `content` (lenient), `content_strict` (the answer and nothing else once style is
    stripped) and `style` (share of the rules followed; 1 without rules). The critique quotes the
    rules that are broken. About wrong content it names the right answer, so the editor may be shown
    it for training items only. Somebody's own function gives the content, and without rules it is
    the reward.
    """
    asked = item.hidden.rules
    broken = [rule for rule in asked if not rules.follows(rule, reply)]
    style = 1 - len(broken) / len(asked) if asked else 1.0

    remarks = [rules.critique(rule) for rule in broken]
    if graders.of(item)[0] == graders.FUNCTION:
        return _by_function(item, reply, style, remarks)
    lenient, strict = _content(item, reply)
    if not lenient:
        remarks.insert(0, _content_critique(item, reply))
    parts = {"content": lenient, "content_strict": strict, "style": style}
    return Reward((lenient + style) / 2, " ".join(remarks), parts)


def _by_function(item: Item, reply: str, style: float, remarks: list[str]) -> Reward:
    """Return the reward of somebody's own function, with the grade of the style where one is asked."""
    _, argument = graders.of(item)
    given = functions.find(argument)(item.example, reply)
    value = (given.value + style) / 2 if item.hidden.rules else given.value
    critique = " ".join(filter(None, [given.critique, *remarks]))
    parts = {"content": given.value, "content_strict": given.value, "style": style}
    return Reward(value, critique, {**parts, **given.parts})
