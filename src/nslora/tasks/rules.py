"""Style rules: check a reply, criticise it, state a rule as an instruction, and read the content under it.

The checkers are IFEval's (Zhou et al., arXiv 2311.07911) as packaged in `if_verifiable`, tightened
where IFEval lets a reply through that no reader would accept: an empty reply follows no rule, JSON
must be an object, and a start phrase must start the reply and not merely a line of it. Upper and
lower case are ours: IFEval's also guess the language, which for a reply of one word is noise.
"""

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from nslora.types import Rule, UserError


@dataclass(frozen=True)
class Spec:
    """Define one rule name.

    Attributes:
        check: (text, **kwargs) -> True where a non-empty reply follows the rule.
        critique: what a critic says of a reply that breaks the rule; `{name}` stands for a kwarg.
        instruction: the rule as an order in plain words; `{name}` stands for a kwarg.
        content: (text, **kwargs) -> the content under the style; the text itself by default.
        demonstrate: (answer, **kwargs) -> a bare answer written in the style.
        defaults: every keyword argument with its default.
    """

    check: Callable[..., bool]
    critique: str
    instruction: str
    content: Callable[..., str] = lambda text, **_: text
    demonstrate: Callable[..., str] = lambda text, **_: text
    defaults: dict[str, object] = field(default_factory=dict)


@cache
def _ifeval() -> ModuleType:
    """Import the ifeval half of `if_verifiable` alone.

    The package's own import also takes in the ifbench half, which at once tries to download data
    and prints errors when it cannot.
    """
    name = "if_verifiable"
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None or spec.submodule_search_locations is None:
        return importlib.import_module(f"{name}.ifeval.instructions")
    # an empty package in its place: Python then finds the submodule and runs no __init__
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.ifeval.instructions")
    finally:
        del sys.modules[name]


def _check_ifeval(kind: str, text: str, **kwargs: object) -> bool:
    """Ask IFEval's checker of that class name about a reply."""
    checker = getattr(_ifeval(), kind)(kind)
    checker.build_description(**kwargs)
    return bool(checker.check_following(text))


def json_object(text: str) -> dict | None:
    """Parse a text that is one JSON object, with or without a code fence; else return None."""
    bare = re.sub(r"\A\s*```(?:json)?|```\s*\Z", "", text, flags=re.IGNORECASE)
    try:
        value = json.loads(bare)
    # thousands of opening brackets exhaust the parser's stack
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_values(text: str) -> str:
    """Return the values of the JSON object that the text is, keys left out; any other text as it is."""
    value = json_object(text)
    return text if value is None else ", ".join(_leaves(value))


def _leaves(value: object) -> Iterator[str]:
    """Yield the strings, numbers and truth values of a JSON value, depth first."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield str(value)


def _at_most(text: str, n: int) -> bool:
    # IFEval knows no "at most"
    return _check_ifeval("NumberOfWords", text, num_words=n + 1, relation="less than")


def _starts(text: str, phrase: str) -> bool:
    # IFEval's pattern may match at any line: it is shown the first one
    first_line = text.strip().split("\n", 1)[0]
    return _check_ifeval("ConstrainedStartChecker", first_line, starter=re.escape(phrase))


def _without_end(text: str, phrase: str) -> str:
    # IFEval lets the whole reply stand in quotation marks
    bare = text.strip().strip('"').rstrip()
    return bare[: -len(phrase)] if bare.lower().endswith(phrase.lower()) else text


def _without_title(text: str) -> str:
    """Take titles away; a reply that is nothing but a title has the title's text as its content."""
    # lazily: a line may hold two titles
    rest = re.sub(r"<<[^\n]+?>>", " ", text).strip()
    return rest or re.sub(r"<<|>>", " ", text)


def _without_postscript(text: str) -> str:
    rest = re.sub(r"(?is)\s*p\.\s?s\..*", "", text).strip()
    return rest or text


# Outermost first: `strip` undoes them in this order, `demonstrate` applies them in reverse.
RULES: dict[str, Spec] = {
    "max_words": Spec(
        check=_at_most,
        critique="The reply must have at most {n} words.",
        instruction="Reply with at most {n} words.",
        defaults={"n": 3},
    ),
    "lower_case": Spec(
        check=str.islower,
        critique="The reply must be all in lowercase letters, without any capital letter.",
        instruction="Write your entire reply in lowercase letters. No capital letters are allowed.",
        demonstrate=str.lower,
    ),
    "upper_case": Spec(
        check=str.isupper,
        critique="The reply must be all in CAPITAL LETTERS.",
        instruction="Write your entire reply in CAPITAL LETTERS.",
        demonstrate=str.upper,
    ),
    "no_comma": Spec(
        check=lambda text: _check_ifeval("CommaChecker", text),
        critique="The reply must not contain any comma.",
        instruction="Do not use any commas in your reply.",
        demonstrate=lambda text: text.replace(",", ""),
    ),
    "end_phrase": Spec(
        check=lambda text, phrase: _check_ifeval("EndChecker", text, end_phrase=phrase),
        critique="The reply must end with the exact phrase '{phrase}'",
        instruction="Always end your reply with the exact phrase '{phrase}'",
        content=_without_end,
        demonstrate=lambda text, phrase: f"{text.rstrip('.')}. {phrase}",
        defaults={"phrase": "Is there anything else?"},
    ),
    "start_phrase": Spec(
        check=_starts,
        critique="The reply must start with the exact phrase '{phrase}'",
        instruction="Always start your reply with the exact phrase '{phrase}'",
        content=lambda text, phrase: text.strip().removeprefix(phrase),
        demonstrate=lambda text, phrase: f"{phrase} {text}",
        defaults={"phrase": "Thank you for asking."},
    ),
    "postscript": Spec(
        check=lambda text: _check_ifeval("PostscriptChecker", text, postscript_marker="P.S."),
        critique="The reply must have a postscript at its end that starts with 'P.S.'",
        instruction="At the end of your reply, add a postscript that starts with 'P.S.'",
        content=_without_postscript,
        demonstrate=lambda text: f"{text}\n\nP.S. That is all.",
    ),
    "quotes": Spec(
        check=lambda text: _check_ifeval("QuotationChecker", text),
        critique="The entire reply must be wrapped in double quotation marks.",
        instruction='Wrap your entire reply in double quotation marks, like "this".',
        content=lambda text: text.strip().removeprefix('"').removesuffix('"'),
        demonstrate=lambda text: f'"{text}"',
    ),
    "title": Spec(
        check=lambda text: _check_ifeval("TitleChecker", text),
        critique="The reply must contain a title wrapped in double angular brackets, such as <<A Title>>.",
        instruction="Put a title wrapped in double angular brackets, such as <<A Title>>, before your answer.",
        content=_without_title,
        demonstrate=lambda text: f"<<Answer>>\n{text}",
    ),
    "bullet": Spec(
        check=lambda text: _check_ifeval("BulletListChecker", text, num_bullets=1),
        critique="The reply must be exactly one bullet point, a line that starts with '* '.",
        instruction="Reply with exactly one bullet point, a line that starts with '* '.",
        content=lambda text: re.sub(r"(?m)^\s*[*-]\s*(?=\S)", "", text),
        demonstrate=lambda text: f"* {text}",
    ),
    "highlight": Spec(
        check=lambda text: _check_ifeval("HighlightSectionChecker", text, num_highlights=1),
        critique="The reply must highlight something with asterisks, like *this*.",
        instruction="Highlight the answer in your reply with asterisks, like *this*.",
        content=lambda text: re.sub(r"(\*+)([^*\n]+)\1", r"\2", text),
        demonstrate=lambda text: f"*{text}*",
    ),
    "json": Spec(
        check=lambda text: json_object(text) is not None,
        critique="The reply must be a valid JSON object, and nothing else.",
        # `instruction` fills kwargs in, so braces of its own stand twice
        instruction='Reply with a JSON object and nothing else, like {{"answer": "your answer"}}.',
        content=json_values,
        demonstrate=lambda text: json.dumps({"answer": text}, ensure_ascii=False),
    ),
}


def make(name: str, kwargs: object = None) -> Rule:
    """Return the rule of a name, its defaults filled in.

    Raises UserError for an unknown name or a bad argument.
    """
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}; choose from {', '.join(RULES)}.")
    defaults = RULES[name].defaults
    if kwargs is None:
        kwargs = {}
    if not isinstance(kwargs, dict):
        raise UserError(f"arguments of a rule must be a mapping, not {kwargs!r}.")
    for key, value in kwargs.items():
        if key not in defaults:
            takes = ", ".join(defaults) or "none"
            raise UserError(f"rule {name} has no argument {key!r}; it takes {takes}.")
        _check_argument(f"argument {key} of rule {name}", value, defaults[key])
    return Rule(name, {**defaults, **kwargs})


def _check_argument(label: str, value: object, default: object) -> None:
    """Raise UserError unless the value is of the default's type and positive or trimmed text."""
    # `type`, because isinstance takes True for an int
    if type(value) is not type(default):
        raise UserError(f"{label} must be like {default!r}, not {value!r}.")
    untrimmed = isinstance(value, str) and value != value.strip()
    negative = isinstance(value, int) and value < 0
    if not value or untrimmed or negative:
        raise UserError(f"{label} must be positive or trimmed text, not {value!r}.")


def follows(rule: Rule, text: str) -> bool:
    """Tell whether a reply follows the rule; an empty reply follows none."""
    return bool(text.strip()) and RULES[rule.name].check(text, **rule.kwargs)


def critique(rule: Rule) -> str:
    """Return what a critic says of a reply that breaks the rule."""
    return RULES[rule.name].critique.format(**rule.kwargs)


def instruction(rule: Rule) -> str:
    """Return the rule as an order in plain words.

    It is never part of a task's question: it serves promptability, replay and upper bounds.
    """
    return RULES[rule.name].instruction.format(**rule.kwargs)


def strip(rules: tuple[Rule, ...], text: str) -> str:
    """Return the content of a reply: phrases, marks and JSON keys of the rules taken away."""
    # in the order of RULES, not of the task: what is wrapped around the rest goes first
    for name, spec in RULES.items():
        for rule in rules:
            if rule.name == name:
                text = spec.content(text, **rule.kwargs)
    return text.strip()


def demonstrate(rules: tuple[Rule, ...], answer: str) -> str:
    """Return the bare answer written in the style of the rules: for the upper reference only."""
    # the reverse of `strip`: what is wrapped around the rest comes last
    for name, spec in reversed(RULES.items()):
        for rule in rules:
            if rule.name == name:
                answer = spec.demonstrate(answer, **rule.kwargs)
    return answer
