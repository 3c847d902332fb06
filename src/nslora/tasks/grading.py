"""From a reply to its reward in parts: content (lenient and strict), style, and what a critic would say.

A reply earns content only by giving the answer: a list of guesses or an echo of the question earns none, and of a
JSON object only the values are read. Both grades look at the content under the style (`rules.strip`), so keeping a
rule never costs content.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from functools import cache

from nslora.tasks import rules, world
from nslora.types import Example, Item, Reward

LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe"})
UNSPACED = re.compile(
    r"([\u3040-\u30ff\u3400-\u9fff])"
)  # kana and han: every sign counts as a word
NUMBER = re.compile(r"(?<![\w.)])[-\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
OTHERS = 1  # other names of the answer's kind that a reply may mention ("Canberra, not Sydney")
ITEMS = 4  # short items in a row that make a reply a list, where the answer's kind is not known


def normalise(text: str) -> str:
    """Words in lower case without diacritics and punctuation, one space between: "São  Paulo." -> "sao paulo"."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    bare = (
        "".join(c for c in decomposed if not unicodedata.combining(c)).casefold().translate(LETTERS)
    )
    return " ".join(re.sub(r"[\W_]+", " ", UNSPACED.sub(r" \1 ", bare)).split())


def _mentions(text: str, name: str) -> bool:
    """Whether normalised `name` stands in normalised `text` as whole words, and not only as "not <name>"."""
    return f" {name} " in f" {text} ".replace(f" not {name} ", " ")


@cache
def _kind(answer: str) -> frozenset[str]:
    """Normalised other names of the kinds that normalised `answer` is of; empty for an answer of no known kind."""
    kinds = [{normalise(name) for name in pool} for pool in world.pools()]
    return frozenset().union(*(kind for kind in kinds if answer in kind)) - {answer}


def lists_answers(reply: str, example: Example) -> bool:
    """Whether the reply guesses: several names of the answer's kind, or a row of short items."""
    answer, question, text = (
        normalise(example.answer),
        normalise(example.question),
        normalise(reply),
    )
    given = {name for name in _kind(answer) if _mentions(text, name)}
    whole = {
        name
        for name in given
        if not any(name != other and _mentions(other, name) for other in given)
    }
    others = [
        name for name in whole if not _mentions(question, name) and not _mentions(answer, name)
    ]
    items = [normalise(item) for item in re.split(r"[,;/|\n]|\bor\b|\band\b", reply)]
    row = {
        item for item in items if item and len(item.split()) <= 3 and not _mentions(item, answer)
    }
    allowed = ITEMS + len(re.split(r"[,;/|\n]|\bor\b|\band\b", example.answer)) - 1
    return len(others) > OTHERS or len(row) >= allowed


def number(text: str) -> Decimal | None:
    """The last number of a text, "1,234.50" and "-5" included; None if there is none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def is_problem(example: Example) -> bool:
    """Tell whether the answer is to be worked out: a number asked for by a question that gives numbers."""
    numeric = NUMBER.fullmatch(example.answer.strip()) is not None
    return numeric and NUMBER.search(example.question) is not None


def _bare(text: str) -> str:
    return re.sub(r"^(?:a|an|the) (?=\w)", "", normalise(text))


def _content(item: Item, output: str) -> tuple[float, float]:
    """Return the (lenient, strict) grades of the content, each 0.0 or 1.0."""
    example = item.example
    # what is read for content is the reply without its style, and of JSON the values only
    bare = rules.strip(item.hidden.rules, output)
    read = rules.json_values(bare)
    if item.hidden.grader == "number":
        right = number(read) is not None and number(read) == number(example.answer)
        alone = NUMBER.fullmatch(bare.strip().rstrip(".")) is not None
        return float(right), float(right and alone)
    # a reply that repeats the question has not thereby named the answer
    reply = normalise(read).replace(normalise(example.question), " ")
    right = _mentions(reply, normalise(example.answer)) and not lists_answers(read, example)
    return float(right), float(right and _bare(bare) == _bare(example.answer))


def _content_critique(item: Item, output: str) -> str:
    """Return what a critic says about wrong content; it names the right answer."""
    example = item.example
    right = f"the right answer is '{example.answer}'."
    if not output.strip():
        return f"The reply is empty; {right}"
    names = item.hidden.grader != "number"
    if names and lists_answers(rules.json_values(output), example):
        return f"The reply must give one answer, not a list; {right}"
    steps = " It has to be worked out step by step." if is_problem(example) else ""
    return f"The answer is wrong; {right}{steps}"


def grade(item: Item, output: str) -> Reward:
    """Return the reward of a reply: the mean of its content and style parts, and a critique.

    The parts are `content` (lenient), `content_strict` (the answer and nothing else once style is
    stripped) and `style` (share of the rules kept; 1 without rules). The critique quotes the rules
    that are broken. About wrong content it names the right answer, so the editor may be shown it
    for training items only.
    """
    lenient, strict = _content(item, output)
    asked = item.hidden.rules
    broken = [rule for rule in asked if not rules.keep(rule, output)]
    style = 1 - len(broken) / len(asked) if asked else 1.0
    remarks = [rules.words(rule) for rule in broken]
    if not lenient:
        remarks.insert(0, _content_critique(item, output))
    parts = {"content": lenient, "content_strict": strict, "style": style}
    return Reward((lenient + style) / 2, " ".join(remarks), parts)
