"""Math problems: as many as asked for, parts that share nothing, gold solutions that end in the right answer."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nslora.algorithm import remake
from nslora.config import RunConfig
from nslora.tasks import math_problems
from nslora.tasks.build import build, grade
from nslora.types import Prompt

SIZES = (8, 8, 40)


@pytest.fixture(scope="module")
def hard() -> math_problems.Parts:
    return math_problems.hard(0, SIZES, np.random.default_rng(0))


def test_parts_have_the_sizes_asked_for(hard: math_problems.Parts) -> None:
    assert tuple(map(len, hard)) == SIZES
    assert tuple(map(len, math_problems.easy(0, SIZES))) == SIZES


def test_hard_problems_share_no_template_across_parts(hard: math_problems.Parts) -> None:
    groups = [{e.group for e in part} for part in hard]
    assert all(not a & b for a, b in combinations(groups, 2))
    assert all(len(group) > 1 for group in groups)
    questions = [e.question for part in hard for e in part]
    assert len(set(questions)) == len(questions)


def test_solutions_end_in_the_answer_and_questions_do_not_tell_the_form(
    hard: math_problems.Parts,
) -> None:
    for example in (e for part in hard for e in part):
        assert grade(example, example.solution).content == 1.0, example
        assert len(example.solution) > len(example.answer) + 20
        assert "final answer" not in example.question and example.question[-1] in "?."


def test_templates_are_drawn_anew_per_seed_and_the_same_in_every_process(
    hard: math_problems.Parts,
) -> None:
    cfg = RunConfig(task="math", tier="hard", items=8, test_items=8)
    assert build(cfg).examples("train") == build(cfg).examples("train")
    other = RunConfig(task="math", tier="hard", items=8, test_items=8, seed=1)
    assert {e.group for e in build(cfg).examples("train")} != {
        e.group for e in build(other).examples("train")
    }


def test_weights_train_on_the_chain_of_thought(hard: math_problems.Parts) -> None:
    example = hard[0][0]
    (pair,) = remake.gold([example], Prompt())
    assert pair.target == example.solution
    (easy,) = remake.gold(math_problems.easy(0, (1,))[0], Prompt())
    assert easy.target.lstrip("-").replace(".", "").isdigit()
