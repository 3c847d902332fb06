"""Every method is one decision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from histories import numerical, step, symbolic

from nslora.algorithm import router
from nslora.config import METHODS, RunConfig
from nslora.types import Move, Signal, StepRecord

CFG = RunConfig(moves=6)
BOTH = {"content": 0.5, "style": 0.5}


def decide(
    method: str, history: list[StepRecord], demand: dict[str, float] = BOTH, cfg: RunConfig = CFG
) -> Move:
    return router.DECISIONS[method](history, demand, cfg, np.random.default_rng(0))


def test_every_method_has_a_decision() -> None:
    assert set(router.DECISIONS) == set(METHODS)


def test_pure_methods_never_change_their_mind() -> None:
    for history in ([], numerical([1.0, 1.0]), symbolic([0.0])):
        assert decide("lora", history) is decide("lora-demonstrated", history) is Move.NUMERICAL
        assert decide("textgrad", history) is Move.SYMBOLIC
        assert decide("frozen", history) is Move.STOP


def test_alternate_goes_prompt_weights_prompt_in_thirds() -> None:
    history: list[StepRecord] = []
    for number in range(6):
        history.append(step(number, decide("alternate", history), Signal()))
    s, n = Move.SYMBOLIC, Move.NUMERICAL
    assert [one.move for one in history] == [s, s, n, n, s, s]


def test_random_is_seeded_and_uses_both_moves() -> None:
    rng = np.random.default_rng(0)
    moves = [router.coin([], BOTH, CFG, rng) for _ in range(30)]
    again = np.random.default_rng(0)
    assert moves == [router.coin([], BOTH, CFG, again) for _ in range(30)]
    assert set(moves) == {Move.NUMERICAL, Move.SYMBOLIC}


@pytest.mark.parametrize("method", ["monitor", "neurosymbolic", "oracle"])
def test_the_papers_rule_numerical_until_saturated_symbolic_until_exhausted(method: str) -> None:
    assert decide(method, []) is Move.NUMERICAL
    assert decide(method, numerical([1.0, 0.5])) is Move.NUMERICAL
    assert decide(method, numerical([1.0, 0.99])) is Move.SYMBOLIC
    assert decide(method, [*numerical([1.0, 0.99]), *symbolic([0.4])]) is Move.SYMBOLIC
    assert decide(method, [*numerical([1.0, 0.99]), *symbolic([0.0])]) is Move.NUMERICAL


def test_a_phase_without_demand_is_skipped_by_the_router_but_not_by_the_bare_signal() -> None:
    only_style, only_content = {"content": 0.0, "style": 0.6}, {"content": 0.6, "style": 0.0}
    assert decide("neurosymbolic", [], only_style) is Move.SYMBOLIC
    assert decide("monitor", [], only_style) is Move.NUMERICAL
    assert decide("neurosymbolic", numerical([1.0, 0.99]), only_content) is Move.NUMERICAL
    assert decide("neurosymbolic", [], {"content": 0.01, "style": 0.01}) is Move.STOP


@pytest.mark.parametrize("chooses", ["rule", "utility"])
def test_trained_weights_that_fail_on_dev_are_trained_on_though_no_training_example_needs_it(
    chooses: str,
) -> None:
    """Runs on facts stopped after two of four moves, at 75% on dev: one of 24 training examples is below the floor."""
    cfg, nothing = RunConfig(moves=6, router=chooses), {"content": 0.04, "style": 0.0}
    trained, edited = numerical([1.0, 0.5]), symbolic([0.5])
    for success, then in ((0.75, Move.NUMERICAL), (0.95, Move.STOP), (1.0, Move.STOP)):
        assert decide("neurosymbolic", scored(trained, success), nothing, cfg) is then
        assert decide("neurosymbolic", scored([*trained, *edited], success), nothing, cfg) is then
        assert decide("neurosymbolic", scored(edited, success), nothing, cfg) is Move.STOP


def scored(history: list[StepRecord], success: float) -> list[StepRecord]:
    """The history with this dev success after its last move."""
    return [*history[:-1], replace(history[-1], dev={"success": success})]


def test_style_that_prompts_failed_to_bring_becomes_a_demand_on_the_weights() -> None:
    only_style = {"content": 0.0, "style": 0.6}
    assert decide("neurosymbolic", symbolic([0.5]), only_style) is Move.SYMBOLIC
    assert decide("neurosymbolic", symbolic([0.0]), only_style) is Move.NUMERICAL


@pytest.mark.parametrize("method", ["neurosymbolic", "oracle"])
def test_a_needed_kind_of_move_is_not_left_untried_until_the_last_one(method: str) -> None:
    learning = [1.0, 0.5, 0.25, 0.12, 0.06, 0.03]  # never saturated
    made = [decide(method, numerical(learning[:n])) for n in range(6)]
    assert made == [Move.NUMERICAL] * 4 + [Move.SYMBOLIC, Move.NUMERICAL]
    assert decide(method, symbolic([0.4] * 4)) is Move.NUMERICAL
    never = RunConfig(moves=6, reserve=0)
    assert decide(method, numerical(learning[:4]), BOTH, never) is Move.NUMERICAL
    assert decide(method, symbolic([0.4] * 4), BOTH, never) is Move.SYMBOLIC


def test_the_last_move_is_not_another_prompt_where_prompts_left_the_style_missing() -> None:
    tried = step(
        5, Move.SYMBOLIC, Signal(gain=0.4), demand={"style": 0.6}
    )  # a gain, but one of content
    history = [*numerical([1.0, 0.5, 0.25, 0.12]), tried]
    assert decide("neurosymbolic", history, {"content": 0.2, "style": 0.5}) is Move.NUMERICAL
    assert decide("neurosymbolic", history, {"content": 0.2, "style": 0.3}) is Move.SYMBOLIC
    more = RunConfig(moves=7)
    assert decide("neurosymbolic", history, {"content": 0.2, "style": 0.5}, more) is Move.SYMBOLIC


def test_nothing_is_tried_only_because_it_was_not_yet() -> None:
    weights_only, prompts_only = {"content": 0.6, "style": 0.05}, {"content": 0.05, "style": 0.6}
    assert (
        decide("neurosymbolic", numerical([1.0, 0.5, 0.25, 0.12]), weights_only) is Move.NUMERICAL
    )
    assert decide("neurosymbolic", symbolic([0.4] * 4), prompts_only) is Move.SYMBOLIC
    assert decide("monitor", numerical([1.0, 0.5, 0.25, 0.12])) is Move.NUMERICAL
    tried = [*symbolic([0.0]), *numerical([1.0, 0.5, 0.25])]
    assert decide("neurosymbolic", tried, {"content": 0.5, "style": 0.5}) is Move.NUMERICAL


def test_the_classifier_alone_follows_the_larger_demand() -> None:
    assert decide("classifier", symbolic([0.5]), {"content": 0.3, "style": 0.2}) is Move.NUMERICAL
    assert decide("classifier", numerical([1.0]), {"content": 0.1, "style": 0.2}) is Move.SYMBOLIC


def test_utility_weighs_demand_progress_and_cost() -> None:
    cfg = RunConfig(router="utility")
    cheap = step(1, Move.NUMERICAL, Signal(), dev_change=0.2, tokens=1.0)
    dear = step(2, Move.SYMBOLIC, Signal(), dev_change=0.2, tokens=9.0)
    useless = step(2, Move.NUMERICAL, Signal(), dev_change=-0.1, tokens=1.0)
    assert decide("neurosymbolic", [cheap, dear], BOTH, cfg) is Move.NUMERICAL
    assert (
        decide("neurosymbolic", [cheap, dear], {"content": 0.05, "style": 0.9}, cfg)
        is Move.SYMBOLIC
    )
    assert decide("neurosymbolic", [useless, useless, dear], BOTH, cfg) is Move.SYMBOLIC
