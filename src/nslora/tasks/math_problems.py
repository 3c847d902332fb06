"""Math problems with checkable answers in two tiers, made by reasoning-gym: a list of items per size."""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
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
# what gsm_symbolic adds to every problem
FORM = " Give the result as your final answer. Do not include units."
# problems made per problem wanted, because repeated questions are left out
SPARE_EASY = 10
SPARE_HARD = 20
Parts = list[list[Item]]


def _dataset(kind: str, **settings: Any) -> Any:
    # reasoning-gym imports pycosat for its zebra puzzles alone; it has no wheels, and a fresh
    # machine no compiler
    sys.modules.setdefault("pycosat", ModuleType("pycosat"))
    import reasoning_gym

    return reasoning_gym.create_dataset(kind, **settings)


def easy(seed: int, sizes: Sequence[int]) -> Parts:
    """Make arithmetic of the EASY kinds in turn, one list per size, disjoint by index and question."""
    total = sum(sizes)
    # problems are made as they are asked for
    items = islice(_distinct(_arithmetic(seed, SPARE_EASY * total)), total)
    return [list(islice(items, size)) for size in sizes]


def _arithmetic(seed: int, size: int) -> Iterator[Item]:
    """Yield `size` problems of each kind, one kind after the other."""
    sets = [_dataset(kind, seed=seed, size=size, **own) for kind, own in EASY.items()]
    for i in range(size):
        for kind, problems in zip(EASY, sets, strict=True):
            problem = problems[i]
            question = plain(kind, problem["question"])
            name = f"{kind}:{i}"
            yield _problem(name, question, str(problem["answer"]), group=name)


def _distinct(items: Iterator[Item]) -> Iterator[Item]:
    """Leave out the items whose question was asked before."""
    seen = set()
    for item in items:
        if item.example.question not in seen:
            seen.add(item.example.question)
            yield item


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
    """Make word problems of gsm_symbolic with their chains of thought, parts disjoint by template."""
    data = _dataset("gsm_symbolic", seed=seed, size=SPARE_HARD * sum(sizes))
    templates = rng.permutation(sorted(set(data.task_indices)))
    part_of = _share_out(templates, sizes)
    parts: list[dict[str, Item]] = [{} for _ in sizes]
    for i, template in enumerate(data.task_indices):
        part = part_of[template]
        if len(parts[part]) == sizes[part]:
            continue
        item = _word_problem(data[i], i, template)
        # a template filled with the same numbers twice asks the same question
        parts[part].setdefault(item.example.question, item)
    return [list(problems.values()) for problems in parts]


def _share_out(templates: np.ndarray, sizes: Sequence[int]) -> dict[int, int]:
    """Map each template to a part, in proportion to the sizes, at least one template to each."""
    cuts = []
    for nth, upto in enumerate(accumulate(sizes), start=1):
        share = round(len(templates) * upto / sum(sizes))
        cuts.append(max(nth, share))
    parts = enumerate(np.split(templates, cuts[:-1]))
    return {int(template): part for part, own in parts for template in own}


def _word_problem(problem: dict[str, Any], i: int, template: int) -> Item:
    group = f"gsm:{template}"
    question = problem["question"].removesuffix(FORM)
    solution = problem["metadata"]["answer_cot"].replace("####", "Answer:")
    return _problem(f"{group}:{i}", question, str(problem["answer"]), group, solution)
