"""Math problems with checkable answers in two tiers, made by reasoning-gym: a list of examples per size asked for."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise, product
from types import ModuleType
from typing import Any

import numpy as np

from nslora.types import Example

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
Parts = list[list[Example]]


def _dataset(kind: str, **settings: Any) -> Any:
    # reasoning-gym imports pycosat for its zebra puzzles alone; it has no wheels, and a fresh machine no compiler.
    sys.modules.setdefault("pycosat", ModuleType("pycosat"))
    import reasoning_gym

    return reasoning_gym.create_dataset(kind, **settings)


def easy(seed: int, sizes: Sequence[int]) -> Parts:
    """Arithmetic of the EASY kinds in turn, the parts disjoint by index range."""
    total = sum(sizes)
    sets = {
        kind: _dataset(kind, seed=seed, size=10 * total, **settings)
        for kind, settings in EASY.items()
    }
    found: dict[str, Example] = {}
    for i, kind in product(range(10 * total), sets):
        question, name = plain(kind, sets[kind][i]["question"]), f"{kind}:{i}"
        answer = str(sets[kind][i]["answer"])
        example = Example(f"math:{name}", question, answer, group=name, fact=name, grader="number")
        found.setdefault(question, example)
        if len(found) == total:
            break
    rows = list(found.values())
    return [rows[start:end] for start, end in pairwise([0, *accumulate(sizes)])]


def plain(kind: str, question: str) -> str:
    """The problem alone: reasoning-gym's wording tells how to reply ("Give only the result ...")."""
    if kind == "number_sequence":
        return f"What is the next number in this sequence? {question.removesuffix(', ?')}"
    found = re.search(r"-?[\d(][-\d\s()+*/]*", question)
    assert found, question
    return f"What is {found.group().strip()}?"


def hard(seed: int, sizes: Sequence[int], rng: np.random.Generator) -> Parts:
    """Word problems of gsm_symbolic with their chains of thought, the parts disjoint by template.

    The templates are shared out in proportion to the sizes, at least one to each part.
    """
    data = _dataset("gsm_symbolic", seed=seed, size=SPARE * sum(sizes))
    templates = rng.permutation(sorted(set(data.task_indices)))
    cuts = [
        max(nth, round(len(templates) * upto / sum(sizes)))
        for nth, upto in enumerate(accumulate(sizes), 1)
    ]
    part = {int(t): nth for nth, (i, j) in enumerate(pairwise([0, *cuts])) for t in templates[i:j]}
    parts: list[dict[str, Example]] = [{} for _ in sizes]
    for i, template in enumerate(data.task_indices):
        here = part[template]
        if len(parts[here]) < sizes[here]:
            problem, group = data[i], f"gsm:{template}"
            question, answer = problem["question"].removesuffix(TOLD), str(problem["answer"])
            chain = problem["metadata"]["answer_cot"].replace("####", "Answer:")
            example = Example(
                f"math:{group}:{i}",
                question,
                answer,
                group=group,
                fact=f"{group}:{i}",
                grader="number",
                solution=chain,
            )
            parts[here].setdefault(question, example)
    return [list(rows.values()) for rows in parts]
