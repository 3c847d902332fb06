"""Grade replies to own data: named graders, and texts compared so that signs, marks and scripts count.

Case, white space, typographic variants, and the punctuation around a text carry no meaning; all
else does: C is not C++, 1.5 not .5, and a voiced kana not the plain one. Accents of Latin letters
may be left out, but not exchanged.

A grader is written `name` or `name:argument`, as in "labels:yes|no" or "regex:[0-9]{4}".
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from nslora.tasks import functions, rules
from nslora.types import Example, Item, UserError

# prefix of `Hidden.grader` for own data
OWN = "own:"
# the grader of somebody's own function (`functions`)
FUNCTION = "function"
# letters that Unicode does not take apart into a base letter and a mark
LETTERS = {"ø": "o", "ł": "l", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe"}
# typographic variants; invisible characters go
VARIANTS = {
    **dict.fromkeys("\u2018\u2019\u201b\u02bc", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
    **dict.fromkeys("\u00ad\u200b\u200c\u200e\u200f\u2060\ufe0e\ufe0f\ufeff", ""),
    "\u2014": " - ",
    "\u2026": "...",
    "\u0130": "I",
}
PLAIN = str.maketrans(VARIANTS)
UNPARTED = re.compile(r"(?<=[^\W\d_]{2})\.(?=[A-Z][a-z])")
# what a sentence ends with; after a digit "!" is a factorial
ENDS = re.compile(r"(?:(?<!\d)!|[.,;:?\u3002\u3001\uff61\u061f\u060c\u061b\u0964\s])+\Z")
STARTS = re.compile(r"\A[\u00a1\u00bf\s]+")
# what a text is wrapped in
WRAPS = re.compile(
    r"(\*\*|[*_`\"'])(?P<same>.+)\1|\((?P<round>[^()]+)\)|\u300c(?P<kana>.+)\u300d|\u00ab(?P<quote>.+)\u00bb"
)
# scripts without spaces between words, and hangul, whose particles join the noun
UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)
# What makes a text a part of something else, in outlines (see `_outline`): "|" is its edge.
WITHIN_BEFORE = re.compile(
    r"""[a0m]\|[a0m.+-]                # inside a word or a number
    | [a0mu][-+*/&@^_%~\\]\|[a0]       # after a sign that joins: non-toxic, km/h
    | (?:\A|[^.0])\.\|a               # .NET, node.js; not 1.Paris
    | (?:\A|[^.])\.\|0                # .5
    | [-\u00b1$\u20ac\u00a3\u00a5]\|0  # the sign of a number
    | 0[:,]\|0                         # 1,500
    | ([-+*\#])\|\1
    | \u200d\|""",
    re.VERBOSE,
)
WITHIN_AFTER = re.compile(
    r"""[a0m+-]\|[a0m]
    | \|[m\u200d\U0001f3fb-\U0001f3ff]  # a mark, or a modifier of an emoji, belongs to the letter
    | [a0mu]\|[-+*/&@^_%~.\\][a0mu]
    | [a0]\|[-+\#]                      # C++, C#, A-
    | 0\|[%\u00b0$\u20ac\u00a3\u00a5]   # a number with its unit
    | 0\|[:,]0
    | ([-+*\#])\|\1""",
    re.VERBOSE,
)
DENIED = re.compile(r"(?:\bnot|n't) (?:an? |the )?\Z")
NUMBER = re.compile(
    r"(?<![\w.)])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?"
)
# "6 or 7", "6/7", "6,7": no one number
CHOICE = re.compile(r"\d(?:/|,|\s+or\s+)\Z")
ARTICLE = re.compile(r"\A\s*(?:an?|the) (?=\w)", re.IGNORECASE)
FENCE = re.compile(r"\A\s*```\w*\s*(.*?)\s*```\s*\Z", re.DOTALL)
# labels of a set that is found in the data: how many at most, and rows of each on average
MOST_LABELS = 20
ROWS_PER_LABEL = 3
WORDS_OF_LABEL = 5


# ---- texts


def fold(text: str, cased: bool = False) -> str:
    """Return a text without what carries no meaning inside it: case (unless `cased`), blanks, variants."""
    # a blank that is missing between sentences
    text = UNPARTED.sub(". ", "".join(map(_narrow, text)).translate(PLAIN))
    if not cased:
        text = text.casefold()
    return " ".join(unicodedata.normalize("NFC", text).split())


@cache
def _narrow(letter: str) -> str:
    """Return a character of ordinary width: fullwidth Latin and halfwidth kana have others."""
    wide = unicodedata.decomposition(letter).startswith(("<wide>", "<narrow>"))
    return unicodedata.normalize("NFKC", letter) if wide else letter


def bare(text: str) -> str:
    """Return a folded text without quotation marks, emphasis and final punctuation around it."""
    previous = None
    while text != previous:
        previous = text
        text = STARTS.sub("", ENDS.sub("", text)) or text
        if match := WRAPS.fullmatch(text):
            text = next(filter(None, match.groupdict().values()))
    return text


def unaccented(text: str) -> str:
    """Return a folded text without the accents of Latin letters; marks of other scripts stay."""
    return "".join(map(_base, text))


@cache
def _base(letter: str) -> str:
    first = unicodedata.normalize("NFD", letter)[0]
    # a struck equals sign is none
    return first if first.isascii() and first.isalpha() else LETTERS.get(letter, letter)


def same(one: str, other: str) -> bool:
    """Tell whether two folded texts are equal; either may leave the accents of the other out."""
    return one == other or unaccented(one) == other or one == unaccented(other)


def same_question(text: str) -> str:
    """Return what equal questions share: case, blanks and the final punctuation do not count."""
    return bare(fold(text))


def _outline(text: str) -> str:
    """Return the kind of each character: a letter, 0 digit, m mark, u unspaced letter; signs as they are."""
    return "".join(map(_kind, text))


@cache
def _kind(letter: str) -> str:
    category = unicodedata.category(letter)[0]
    if category == "L":
        return "u" if UNSPACED.match(letter) else "a"
    return {"N": "0", "M": "m"}.get(category, letter)


def places(text: str, name: str) -> Iterator[tuple[int, int]]:
    """Yield where `name` stands in `text` by itself, and is not denied; both are folded."""
    outline = _outline(text)
    for match in re.finditer(re.escape(name), text):
        start, end = match.span()
        before = f"{outline[max(0, start - 2) : start]}|{outline[start : start + 1]}"
        after = f"{outline[end - 1 : end]}|{outline[end : end + 2]}"
        part = WITHIN_BEFORE.search(before) or WITHIN_AFTER.search(after)
        if not part and not DENIED.search(text[:start]):
            yield start, end


def mentions(text: str, name: str) -> bool:
    """Tell whether a folded text affirms `name`; either may leave the accents of the other out."""
    pairs = ((text, name), (unaccented(text), name), (text, unaccented(name)))
    return any(any(places(where, what)) for where, what in pairs)


def is_number(text: str) -> bool:
    """Tell whether a text is a number: "-5", "1,234.50", ".5"; "007" is a name."""
    text = fold(text)
    return NUMBER.fullmatch(text) is not None and not re.match(r"[-+]?0\d", text)


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


# ---- JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # a key that comes twice is a hedge
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse)


def json_in(text: str) -> tuple[Any, bool]:
    """Return the one JSON object or array of a text, and whether it is all of the text.

    A code fence around it does not count. Returns (None, False) where there is none, or more.
    """
    text = FENCE.sub(r"\1", text).strip()
    bracket = re.search(r"[{\[]", text)
    if bracket is None:
        return None, False
    try:
        value, end = DECODER.raw_decode(text, bracket.start())
    # thousands of opening brackets exhaust the parser's stack
    except (ValueError, RecursionError):
        return None, False
    rest = text[end:]
    if "{" in rest:
        return None, False
    return value, not bracket.start() and not rest.strip()


def alike(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are equal: 41 and 41.0 are, 1 and true are not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


# ---- graders: (argument, example, reply without its style) -> is it right, and nothing else?

Grades = tuple[bool, bool]


def _is(reply: str, answer: str, cased: bool = False) -> bool:
    one, other = (bare(fold(text, cased)) for text in (reply, answer))
    return one == other if cased else same(one, other)


def _said(example: Example, reply: str, cased: bool = False) -> str:
    """Return what a reply says by itself: values of a JSON object, the question's echo left out."""
    text = fold(rules.json_values(reply), cased)
    return text.replace(fold(example.question, cased), " ")


def _exact(argument: str, example: Example, reply: str) -> Grades:
    right = _is(reply, example.answer, argument == "case")
    return right, right


def _contains(argument: str, example: Example, reply: str) -> Grades:
    cased = argument == "case"
    text, answer = _said(example, reply, cased), bare(fold(example.answer, cased))
    named = any(places(text, answer)) if cased else mentions(text, answer)
    alone = _is(ARTICLE.sub("", reply), ARTICLE.sub("", example.answer), cased)
    return named or alone, alone


def _number(argument: str, example: Example, reply: str) -> Grades:
    text, answer = fold(rules.json_values(reply)), fold(example.answer)
    numbers = list(NUMBER.finditer(text))
    # an answer that is no number has no value
    if not numbers or not NUMBER.fullmatch(answer):
        return False, False
    last = numbers[-1]
    hedged = CHOICE.search(text[: last.start()])
    right = _value(last[0]) == _value(answer)
    return right and not hedged, NUMBER.fullmatch(bare(fold(reply))) is not None


def _labels(argument: str, example: Example, reply: str) -> Grades:
    known = argument.split("|")
    differ_in_case = len(set(map(fold, known))) < len(known)
    answer = fold(example.answer, differ_in_case)
    alone = [label for label in known if _is(reply, label, differ_in_case)]
    if alone:
        right = fold(alone[0], differ_in_case) == answer
        return right, right

    # "a" is a label and an article
    cased = differ_in_case or min(map(len, known)) == 1
    text, named = _said(example, reply, cased), set()
    # the longest first: a shorter one may be its part
    for label in sorted(known, key=len, reverse=True):
        for start, end in list(places(text, fold(label, cased))):
            named.add(fold(label, differ_in_case))
            text = f"{text[:start]}{' ' * (end - start)}{text[end:]}"
    return named == {answer}, False


def _regex(argument: str, example: Example, reply: str) -> Grades:
    reply = reply.strip()
    return re.search(argument, reply) is not None, re.fullmatch(argument, reply) is not None


def _json(argument: str, example: Example, reply: str) -> Grades:
    (gold, _), (value, alone) = json_in(example.answer), json_in(reply)
    return value is not None and alike(gold, value), alone


def _json_schema(argument: str, example: Example, reply: str) -> Grades:
    value, alone = json_in(reply)
    return value is not None and _validator(argument).is_valid(value), alone


@cache
def _validator(schema: str) -> Any:
    # takes a second to import
    from jsonschema.validators import validator_for

    parsed = json.loads(schema)
    kind: Any = validator_for(parsed)
    # patterns are checked too
    kind.check_schema(parsed, format_checker=kind.FORMAT_CHECKER)
    return kind(parsed)


GRADERS: dict[str, Callable[[str, Example, str], Grades]] = {
    "exact": _exact,
    "contains": _contains,
    "number": _number,
    "labels": _labels,
    "regex": _regex,
    "json": _json,
    "json-schema": _json_schema,
}
# that take answers of different case or accents for equal
FORGIVING = (("exact", ""), ("contains", ""))
# whose content is JSON: the rule of that name asks for nothing more
OF_JSON = ("json", "json-schema")
ARGUMENTS = {
    "exact": ("", "case"),
    "contains": ("", "case"),
    "number": ("",),
    "json": ("",),
}


def of(item: Item) -> tuple[str, str]:
    """Return name and argument of an item's grader."""
    name, _, argument = item.hidden.grader.removeprefix(OWN).partition(":")
    return name, argument


def grade(item: Item, reply: str) -> Grades:
    """Tell whether a reply, its style taken away, is right, and whether it is nothing else."""
    name, argument = of(item)
    right, alone = GRADERS[name](argument, item.example, reply)
    return right, right and alone


def fault(item: Item, reply: str) -> str:
    """Return what is wrong with the form of a reply, where the grader asks for a form; else ""."""
    name, argument = of(item)
    if name == "labels":
        return f"The reply must name exactly one of {argument.replace('|', ', ')}"
    if name == "regex":
        return f"The reply has not the form {argument!r}"
    if name == "json-schema":
        value, _ = json_in(reply)
        if value is None:
            return "The reply holds no one JSON object"
        reasons = [error.message for error in _validator(argument).iter_errors(value)]
        return f"The JSON object breaks its schema ({'; '.join(reasons[:1])})"
    return ""


def complete(grader: str) -> str:
    """Return a grader that needs no other file: the schema of `json-schema:<file>` put in its place.

    Raises UserError for an unknown grader or a wrong argument.
    """
    if grader == "auto":
        return grader
    name, _, argument = grader.partition(":")
    if name == FUNCTION:
        functions.find(argument)
        return grader
    if name not in GRADERS:
        raise UserError(f"unknown grader {name!r}; choose from auto, {', '.join(GRADERS)}.")
    if name in ARGUMENTS and argument not in ARGUMENTS[name]:
        raise UserError(f"grader {name} takes no argument {argument!r}.")
    if name == "regex":
        _check_pattern(argument)
    if name == "json-schema":
        return f"{name}:{_schema(argument)}"
    return grader


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"grader regex: {pattern!r} is no pattern ({error}).") from None
    if not pattern:
        raise UserError("grader regex takes a pattern, as in regex:[0-9]{4}.")


def _schema(argument: str) -> str:
    """Return the checked schema of an argument, which is JSON or a file of it, in one line."""
    from jsonschema import SchemaError

    try:
        text = argument if argument.startswith("{") else Path(argument).read_text("utf-8")
        schema = json.dumps(json.loads(text), ensure_ascii=False, sort_keys=True)
        _validator(schema)
    except OSError as error:
        raise UserError(
            f"grader json-schema: cannot read {argument!r} ({error.strerror})."
        ) from None
    except SchemaError as error:
        raise UserError(f"grader json-schema: {error.message.rstrip('.')}.") from None
    except ValueError as error:
        raise UserError(f"grader json-schema: {argument!r} is not JSON ({error}).") from None
    # nothing is fetched while replies are graded, and nothing is missing then
    for reference in re.findall(r'"\$(?:dynamicR|r)ef": "([^"]*)"', schema):
        if not _resolves(reference, json.loads(schema)):
            raise UserError(f"grader json-schema: $ref {reference!r} is not in the schema.")
    return schema


def _resolves(reference: str, schema: Any) -> bool:
    """Tell whether a reference such as "#/$defs/name" is to a part of the schema."""
    start, *names = reference.split("/")
    for name in names:
        schema = schema.get(name) if isinstance(schema, dict) else None
    return start == "#" and schema is not None


# ---- which grader fits


def is_json(text: str) -> bool:
    """Tell whether an answer is a JSON object or array."""
    return json_in(text)[1]


def label_set(answers: list[str]) -> list[str]:
    """Return the labels that recurring answers are of, the most frequent first; [] if they are none."""
    spellings: dict[str, list[str]] = {}
    for answer in answers:
        spellings.setdefault(fold(answer), []).append(answer)
    labels = sorted(spellings.values(), key=len, reverse=True)
    few = 2 <= len(labels) <= MOST_LABELS and len(answers) >= ROWS_PER_LABEL * len(labels)
    short = all(len(label.split()) <= WORDS_OF_LABEL and "|" not in label for label in spellings)
    return [label[0] for label in labels] if few and short else []


def choose(answers: list[str]) -> Callable[[str], str]:
    """Return answer -> its grader, as fits the answers of a file.

    JSON answers are compared as JSON, numbers as numbers; where the others recur they are labels;
    else a reply must contain the answer.
    """
    labels = label_set([a for a in answers if not is_json(a) and not is_number(a)])

    def of(answer: str) -> str:
        if is_json(answer):
            return "json"
        if is_number(answer):
            return "number"
        return f"labels:{'|'.join(labels)}" if labels else "contains"

    return of
