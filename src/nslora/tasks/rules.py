"""Style rules: check a reply, say in a critic's words what is wrong, tell a rule, and read the content under it.

The checkers are IFEval's (Zhou et al., arXiv 2311.07911) as packaged in `if_verifiable`, tightened where IFEval lets a
reply through that no reader would accept: an empty reply keeps no rule, JSON must be an object, and a start phrase must
start the reply and not merely a line of it. Upper and lower case are ours: IFEval's also guess the language, which
for a reply of one word is noise.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from nslora.types import Rule, UserError


@dataclass(frozen=True)
class Spec:
    """What is known about one rule name.

    Attributes:
        check: (text, **kwargs) -> whether a non-empty reply keeps the rule.
        words: what a critic says when the rule is broken; kwargs are filled in.
        told: a plain instruction that tells the rule; kwargs are filled in.
        content: (text, **kwargs) -> the content under the style; the text itself where the rule adds nothing.
        demonstrate: (answer, **kwargs) -> a bare answer written in the style.
        defaults: every keyword argument with its default.
    """

    check: Callable[..., bool]
    words: str
    told: str
    content: Callable[..., str] = lambda text, **_: text
    demonstrate: Callable[..., str] = lambda text, **_: text
    defaults: dict[str, object] = field(default_factory=dict)


@cache
def _ifeval() -> ModuleType:
    """The ifeval half of `if_verifiable`, without running the package's own import.

    That would also import the ifbench half, which at once tries to download data and prints errors when it cannot.
    """
    name = "if_verifiable"
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None or spec.submodule_search_locations is None:
        return importlib.import_module(f"{name}.ifeval.instructions")
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.ifeval.instructions")
    finally:
        del sys.modules[name]


def _follows(kind: str, text: str, **kwargs: object) -> bool:
    checker = getattr(_ifeval(), kind)(kind)
    checker.build_description(**kwargs)
    return bool(checker.check_following(text))


def json_object(text: str) -> dict | None:
    """The JSON object that is the whole text, with or without a code fence; None if there is none."""
    bare = re.sub(r"\A\s*```(?:json)?|```\s*\Z", "", text, flags=re.IGNORECASE)
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_values(text: str) -> str:
    """Values of the JSON object that is the text (keys left out), joined by commas; another text as it is."""
    value = json_object(text)
    return text if value is None else ", ".join(_leaves(value))


def _leaves(value: object) -> list[str]:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [leaf for item in items for leaf in _leaves(item)]
    return [] if value is None else [str(value)]


def _starts(text: str, phrase: str) -> bool:
    first_line = text.strip().split("\n", 1)[0]
    return _follows("ConstrainedStartChecker", first_line, starter=re.escape(phrase))


def _without_end(text: str, phrase: str) -> str:
    bare = text.strip().strip('"').rstrip()
    return bare[: -len(phrase)] if bare.lower().endswith(phrase.lower()) else text


def _without_title(text: str) -> str:
    """Without its titles; a reply that is nothing but a title has that as its content."""
    return re.sub(r"<<[^\n]+?>>", " ", text).strip() or re.sub(r"<<|>>", " ", text)


def _without_postscript(text: str) -> str:
    return re.sub(r"(?is)\s*p\.\s?s\..*", "", text).strip() or text


# `strip` undoes them in this order and `demonstrate` applies them in the other: outermost first.
RULES: dict[str, Spec] = {
    "max_words": Spec(
        check=lambda text, n: _follows(
            "NumberOfWords", text, num_words=n + 1, relation="less than"
        ),
        words="The reply must have at most {n} words.",
        told="Reply with at most {n} words.",
        defaults={"n": 3},
    ),
    "lower_case": Spec(
        check=lambda text: text.islower(),
        words="The reply must be all in lowercase letters, without any capital letter.",
        told="Write your entire reply in lowercase letters. No capital letters are allowed.",
        demonstrate=str.lower,
    ),
    "upper_case": Spec(
        check=lambda text: text.isupper(),
        words="The reply must be all in CAPITAL LETTERS.",
        told="Write your entire reply in CAPITAL LETTERS.",
        demonstrate=str.upper,
    ),
    "no_comma": Spec(
        check=lambda text: _follows("CommaChecker", text),
        words="The reply must not contain any comma.",
        told="Do not use any commas in your reply.",
        demonstrate=lambda text: text.replace(",", ""),
    ),
    "end_phrase": Spec(
        check=lambda text, phrase: _follows("EndChecker", text, end_phrase=phrase),
        words="The reply must end with the exact phrase '{phrase}'",
        told="Always end your reply with the exact phrase '{phrase}'",
        content=_without_end,
        demonstrate=lambda text, phrase: f"{text.rstrip('.')}. {phrase}",
        defaults={"phrase": "Is there anything else?"},
    ),
    "start_phrase": Spec(
        check=_starts,
        words="The reply must start with the exact phrase '{phrase}'",
        told="Always start your reply with the exact phrase '{phrase}'",
        content=lambda text, phrase: text.strip().removeprefix(phrase),
        demonstrate=lambda text, phrase: f"{phrase} {text}",
        defaults={"phrase": "Thank you for asking."},
    ),
    "postscript": Spec(
        check=lambda text: _follows("PostscriptChecker", text, postscript_marker="P.S."),
        words="The reply must have a postscript at its end that starts with 'P.S.'",
        told="At the end of your reply, add a postscript that starts with 'P.S.'",
        content=_without_postscript,
        demonstrate=lambda text: f"{text}\n\nP.S. That is all.",
    ),
    "quotes": Spec(
        check=lambda text: _follows("QuotationChecker", text),
        words="The entire reply must be wrapped in double quotation marks.",
        told='Wrap your entire reply in double quotation marks, like "this".',
        content=lambda text: text.strip().removeprefix('"').removesuffix('"'),
        demonstrate=lambda text: f'"{text}"',
    ),
    "title": Spec(
        check=lambda text: _follows("TitleChecker", text),
        words="The reply must contain a title wrapped in double angular brackets, such as <<A Title>>.",
        told="Put a title wrapped in double angular brackets, such as <<A Title>>, before your answer.",
        content=_without_title,
        demonstrate=lambda text: f"<<Answer>>\n{text}",
    ),
    "bullet": Spec(
        check=lambda text: _follows("BulletListChecker", text, num_bullets=1),
        words="The reply must be exactly one bullet point, a line that starts with '* '.",
        told="Reply with exactly one bullet point, a line that starts with '* '.",
        content=lambda text: re.sub(r"(?m)^\s*[*-]\s*(?=\S)", "", text),
        demonstrate=lambda text: f"* {text}",
    ),
    "highlight": Spec(
        check=lambda text: _follows("HighlightSectionChecker", text, num_highlights=1),
        words="The reply must highlight something with asterisks, like *this*.",
        told="Highlight the answer in your reply with asterisks, like *this*.",
        content=lambda text: re.sub(r"(\*+)([^*\n]+)\1", r"\2", text),
        demonstrate=lambda text: f"*{text}*",
    ),
    "json": Spec(
        check=lambda text: json_object(text) is not None,
        words="The reply must be a valid JSON object, and nothing else.",
        told='Reply with a JSON object and nothing else, like {{"answer": "your answer"}}.',
        content=json_values,
        demonstrate=lambda text: json.dumps({"answer": text}, ensure_ascii=False),
    ),
}


def make(name: str, kwargs: object = None) -> Rule:
    """The rule of that name, its defaults filled in; raises UserError for an unknown name or a bad argument."""
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}; choose from {', '.join(RULES)}.")
    defaults, given = RULES[name].defaults, {} if kwargs is None else kwargs
    if not isinstance(given, dict):
        raise UserError(f"arguments of a rule must be a mapping, not {given!r}.")
    for key, value in given.items():
        if key not in defaults:
            raise UserError(
                f"rule {name} has no argument {key!r}; it takes {', '.join(defaults) or 'none'}."
            )
        if type(value) is not type(defaults[key]):
            raise UserError(
                f"argument {key} of rule {name} must be like {defaults[key]!r}, not {value!r}."
            )
        trimmed = value.strip() if isinstance(value, str) else value
        if not value or value != trimmed or (isinstance(value, int) and value < 0):
            raise UserError(
                f"argument {key} of rule {name} must be positive or trimmed text, not {value!r}."
            )
    return Rule(name, {**defaults, **given})


def keep(rule: Rule, text: str) -> bool:
    """Whether the reply keeps the rule; an empty reply keeps none."""
    return bool(text.strip()) and RULES[rule.name].check(text, **rule.kwargs)


def words(rule: Rule) -> str:
    """What a critic says when the rule is broken."""
    return RULES[rule.name].words.format(**rule.kwargs)


def told(rule: Rule) -> str:
    """The rule as a plain instruction. Never part of a task's question: it serves promptability and upper bounds."""
    return RULES[rule.name].told.format(**rule.kwargs)


def strip(rules: tuple[Rule, ...], text: str) -> str:
    """The content of a reply under the style that `rules` ask for: phrases, marks and JSON keys taken away."""
    for name, spec in RULES.items():
        for rule in rules:
            if rule.name == name:
                text = spec.content(text, **rule.kwargs)
    return text.strip()


def demonstrate(rules: tuple[Rule, ...], answer: str) -> str:
    """The bare answer written so that it keeps the rules, for the upper bound that is shown the wanted style."""
    for name, spec in reversed(RULES.items()):
        for rule in rules:
            if rule.name == name:
                answer = spec.demonstrate(answer, **rule.kwargs)
    return answer
