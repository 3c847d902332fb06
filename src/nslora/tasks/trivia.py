"""Common questions that small models tend to answer (trivia.toml), in two sets that share no template."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, zip_longest

from nslora.types import Example, Hidden, Item, Need, Rule

Templates = dict[str, dict[str, str]]
# by template, the answer of each key
_SETS = tomllib.loads(files("nslora.tasks").joinpath("trivia.toml").read_text(encoding="utf-8"))
RETENTION: Templates = _SETS["retention"]
REPLAY: Templates = _SETS["replay"]


@dataclass(frozen=True)
class Question:
    """A question with its answer; `group` is what splits are disjoint by (a country, a template)."""

    text: str
    answer: str
    group: str

    def item(self, label: str, asked: tuple[Rule, ...] = ()) -> Item:
        """Return the question as an item under style rules; its id starts with `label`."""
        example = Example(f"{label}:{self.text}", self.text, self.answer, fact=self.text)
        need = Need.STYLE if asked else Need.CONTENT
        return Item(example, Hidden(asked, need, self.group))


def questions(templates: Templates) -> list[list[Question]]:
    """Return the questions of a set of templates, one list per template, best known first."""
    return [
        [Question(template.format(key), answer, template) for key, answer in answers.items()]
        for template, answers in templates.items()
    ]


def in_turn(lists: Iterable[list[Question]]) -> list[Question]:
    """Take one question of each list in turn: however short a start of the result holds all lists."""
    # short lists end first and leave None in the later rounds
    rounds = zip_longest(*lists)
    return [question for question in chain.from_iterable(rounds) if question is not None]


def kinds() -> list[frozenset[str]]:
    """Return the answers of each template: names of one kind."""
    return [frozenset(answers.values()) for answers in (RETENTION | REPLAY).values()]
