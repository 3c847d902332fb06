"""Math problems: as many as asked for, parts that share nothing, gold solutions that end in the right answer."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nslora.config import RunConfig
from nslora.tasks import math_problems
from nslora.tasks.build import build
from nslora.tasks.grading import grade

SIZES = (8, 8, 40)


@pytest.fixture(scope="module")
def hard() -> math_problems.Parts:
    return math_problems.hard(0, SIZES, np.random.default_rng(0))


def test_parts_have_the_sizes_asked_for(hard: math_problems.Parts) -> None:
    assert tuple(map(len, hard)) == SIZES
    assert tuple(map(len, math_problems.easy(0, SIZES))) == SIZES


def test_hard_problems_share_no_template_across_parts(hard: math_problems.Parts) -> None:
    groups = [{item.hidden.group for item in part} for part in hard]
    assert all(not a & b for a, b in combinations(groups, 2))
    assert all(len(group) > 1 for group in groups)
    questions = [item.example.question for part in hard for item in part]
    assert len(set(questions)) == len(questions)


def test_solutions_end_in_the_answer_and_questions_do_not_tell_the_form(
    hard: math_problems.Parts,
) -> None:
    for item in (item for part in hard for item in part):
        example = item.example
        assert grade(item, example.solution).value == 1, example
        assert len(example.solution) > len(example.answer) + 20
        assert "final answer" not in example.question and example.question[-1] in "?."


def test_templates_are_drawn_anew_per_seed_and_the_same_in_every_process() -> None:
    cfg = RunConfig(task="math", tier="hard", items=8, test_items=8)
    assert build(cfg).train == build(cfg).train
    one, other = build(cfg), build(cfg.but(seed=1))
    assert {one.hidden[e.id].group for e in one.train} != {
        other.hidden[e.id].group for e in other.train
    }


def test_gold_is_the_chain_of_thought_where_there_is_one(hard: math_problems.Parts) -> None:
    example = hard[0][0].example
    assert example.gold == example.solution != ""
    easy = math_problems.easy(0, (1,))[0][0].example
    assert easy.gold == easy.answer
    assert easy.gold.lstrip("-").replace(".", "").isdigit()


def test_easy_problems_are_distinct_and_of_every_kind_in_turn() -> None:
    parts = math_problems.easy(0, SIZES)
    questions = [item.example.question for part in parts for item in part]
    assert len(set(questions)) == len(questions)
    kinds = [item.hidden.group.split(":")[0] for item in parts[0]]
    assert kinds == [*math_problems.EASY] * 2
