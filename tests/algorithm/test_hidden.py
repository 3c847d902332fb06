"""What is hidden stays hidden: no decision, move or target policy reads it, by what runs do and by what code says."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nslora import algorithm
from nslora.algorithm import loop
from nslora.tasks.build import build
from nslora.types import Reward

HIDDEN = {"rules", "need", "group", "hidden", "parts", "content_strict"}
# module and function that may read them: the two estimators that look further, by their names
READERS = {("needs", "by_parts"), ("needs", "hidden"), ("session", "reward")}
MODULES = sorted(Path(algorithm.__file__).parent.glob("*.py"))


class Poisoned:
    """A task whose hidden fields must not be read, and whose reward comes in parts of nonsense."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    @property
    def hidden(self) -> Any:
        raise AssertionError("a method has read what is hidden")

    def reward(self, example: Any, text: str) -> Reward:
        pristine = self._task.reward(example, text)
        parts = {"content": 1 - pristine.parts["content"], "content_strict": 7.0, "style": 0.25}
        return Reward(pristine.value, pristine.critique, parts)

    def demonstrate(self, example: Any) -> str:
        raise AssertionError("a method has read the hidden style")


def steps(opened, poisoned: bool, **settings: Any) -> list[str]:
    """Return the steps of a run as lines of JSON."""
    run = opened(seed=1, c1_eps=0.3, **settings)
    if poisoned:
        run.task = Poisoned(run.task)
    last, _ = loop.adapt_phases(run, lambda state, needs: None)
    return [json.dumps(asdict(step)) for step in last.whole]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "neurosymbolic"},
        {"method": "neurosymbolic", "needs": "random", "moves": 5},
        {"method": "neurosymbolic", "needs": "asked"},
        {"method": "monitor"},
        {"method": "needs-only", "needs": "recall"},
        {"method": "lora-remade"},
        {"method": "lora-rft"},
        {"method": "textgrad"},
        {"method": "alternate"},
        {"method": "fixed:SN", "targets": "both", "moves": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_run_that_cannot_see_what_is_hidden_is_the_same_run(opened, settings) -> None:
    pristine = steps(opened, poisoned=False, **settings)
    assert steps(opened, poisoned=True, **settings) == pristine
    assert len(pristine) > 1


def test_the_poison_works(opened) -> None:
    """Lest the test above prove nothing: the oracle and the upper reference do look."""
    for method in ("oracle", "lora-demonstrated"):
        with pytest.raises(AssertionError, match="a method has read"):
            steps(opened, poisoned=True, method=method)


def test_needs_are_read_off_a_reward_in_parts_where_it_may_be_seen(opened) -> None:
    seen = opened(reward="parts", needs="parts", method="neurosymbolic")
    last, _ = loop.adapt_phases(seen, lambda state, needs: None)
    # of three kinds of examples, a random model lacks the content of each
    assert last.whole[1].demand == {"content": 1.0, "style": 0.0}
    example = seen.task.train[0]
    assert set(seen.reward(example, "x").parts) == {"content", "content_strict", "style"}
    assert opened().reward(example, "x").parts == {}


def readers(path: Path, names: set[str]) -> set[tuple[str, str]]:
    """Return (module, function) of every place that reads an attribute of one of these names."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    # a nested function's reads are those of the outer one too, so each place is listed by name
    inside: dict[int, str] = {}
    for function in functions:
        inside |= {id(node): function.name for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            found.add((path.stem, inside.get(id(node), "")))
    return found


def test_no_code_of_the_algorithm_reads_hidden_fields_but_the_named_readers() -> None:
    found = set().union(*(readers(path, HIDDEN) for path in MODULES))
    assert found <= READERS
    # and the named ones do, so that the search finds what it looks for
    assert {("needs", "by_parts"), ("needs", "hidden")} <= found


def test_the_hidden_style_is_written_in_one_place_and_judged_in_none() -> None:
    found = set().union(*(readers(path, {"demonstrate", "obeys"}) for path in MODULES))
    # told rules: the prompts of promptability say them
    assert found == {("remake", "demonstrated"), ("session", "abilities")}


def test_a_task_in_parts_is_no_other_task(opened) -> None:
    """The setting changes what methods see, not what they are asked."""
    run = opened(reward="parts", needs="parts", method="neurosymbolic")
    assert build(run.cfg) == build(run.cfg.but(reward="number", needs="method"))
