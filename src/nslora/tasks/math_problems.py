"""Math problems with checkable answers in two tiers, made by reasoning-gym: a list of items per size."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise, product
from types import ModuleType
from typing import Any

import numpy as np

from nslora.types import Example, Hidden, Item

EASY = {
    "chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2},
    "basic_arithmetic": {
        "min_terms": 2,
        "max_terms": 3,
        "min_digits": 1,
        "max_digits": 2,
        "allow_negation": False,
    },
    "products": {"min_digits": 1, "max_digits": 2},
    "number_sequence": {"max_complexity": 1},
}
TOLD = " Give the result as your final answer. Do not include units."  # what gsm_symbolic adds to every problem
SPARE = 20  # problems made per problem wanted: repeated questions are left out
Parts = list[list[Item]]


def _dataset(kind: str, **settings: Any) -> Any:
    # reasoning-gym imports pycosat for its zebra puzzles alone; it has no wheels, and a fresh machine no compiler.
    sys.modules.setdefault("pycosat", ModuleType("pycosat"))
    import reasoning_gym

    return reasoning_gym.create_dataset(kind, **settings)


def easy(seed: int, sizes: Sequence[int]) -> Parts:
    """Make arithmetic of the EASY kinds in turn, one list per size, disjoint by index range."""
    total = sum(sizes)
    sets = {
        kind: _dataset(kind, seed=seed, size=10 * total, **settings)
        for kind, settings in EASY.items()
    }
    problems: dict[str, Item] = {}
    for i, kind in product(range(10 * total), sets):
        question = plain(kind, sets[kind][i]["question"])
        answer = str(sets[kind][i]["answer"])
        # a question that comes again keeps its first place
        problems.setdefault(question, _problem(f"{kind}:{i}", question, answer, f"{kind}:{i}"))
        if len(problems) == total:
            break
    rows = list(problems.values())
    return [rows[start:end] for start, end in pairwise([0, *accumulate(sizes)])]


def _problem(name: str, question: str, answer: str, group: str, solution: str = "") -> Item:
    example = Example(f"math:{name}", question, answer, fact=name, solution=solution)
    return Item(example, Hidden(group=group, grader="number"))


def plain(kind: str, question: str) -> str:
    """Return the problem alone: reasoning-gym's wording tells how to reply ("Give only the result ...")."""
    if kind == "number_sequence":
        return f"What is the next number in this sequence? {question.removesuffix(', ?')}"
    expression = re.search(r"-?[\d(][-\d\s()+*/]*", question)
    assert expression, question
    return f"What is {expression.group().strip()}?"


def hard(seed: int, sizes: Sequence[int], rng: np.random.Generator) -> Parts:
    """Make word problems of gsm_symbolic with their chains of thought, the parts disjoint by template.

    The templates are shared out in proportion to the sizes, at least one to each part.
    """
    data = _dataset("gsm_symbolic", seed=seed, size=SPARE * sum(sizes))
    templates = rng.permutation(sorted(set(data.task_indices)))
    cuts = [
        max(nth, round(len(templates) * upto / sum(sizes)))
        for nth, upto in enumerate(accumulate(sizes), 1)
    ]
    part = {int(t): nth for nth, (i, j) in enumerate(pairwise([0, *cuts])) for t in templates[i:j]}
    parts: list[dict[str, Item]] = [{} for _ in sizes]
    for i, template in enumerate(data.task_indices):
        problems = parts[part[template]]
        if len(problems) < sizes[part[template]]:
            problem, group = data[i], f"gsm:{template}"
            question = problem["question"].removesuffix(TOLD)
            solution = problem["metadata"]["answer_cot"].replace("####", "Answer:")
            item = _problem(f"{group}:{i}", question, str(problem["answer"]), group, solution)
            problems.setdefault(question, item)
    return [list(problems.values()) for problems in parts]
