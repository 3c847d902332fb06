"""The signal, its reading as small, patience and the switch rules."""

from __future__ import annotations

import math

import pytest
from histories import numerical, step, symbolic
from hypothesis import given
from hypothesis import strategies as st

from nslora.algorithm import monitor
from nslora.algorithm.session import Bill, Losses, Memory, Outcome, State
from nslora.config import RunConfig
from nslora.types import Candidate, Example, Move, Prompt, Reward, Scored, Signal

pytestmark = pytest.mark.pure

CFG = RunConfig(c1_eps=0.1, c2_eps=0.5, gain_eps=0.02, patience=1)
positive = st.floats(1e-3, 1e3)
START, REFINED = Prompt(), Prompt("Be brief.")


def losses(**nll: float) -> Losses:
    """Return the losses of pairs of two answer tokens each, by question, under the start prompt."""
    return {(START, question, "Lima"): (value, 2) for question, value in nll.items()}


@given(positive, positive)
def test_c1_is_the_relative_change_of_the_papers_equation(new: float, old: float) -> None:
    assert monitor.relative_change(new, old) == pytest.approx((new - old) / old)
    assert monitor.loss_change(losses(a=new), losses(a=old)) == pytest.approx((new - old) / old)


def test_change_of_nothing_is_nothing() -> None:
    assert monitor.relative_change(0, 0) == 0
    assert monitor.relative_change(1, 0) == math.inf


def test_the_mean_loss_is_per_answer_token() -> None:
    long = {**losses(a=1.0), (START, "b", "La Paz, Bolivia"): (8.0, 4)}
    assert monitor.mean_nll(long) == pytest.approx(9.0 / 6)
    assert math.isnan(monitor.mean_nll({}))


def test_only_pairs_of_both_epochs_are_compared() -> None:
    """A change means learning: a hard new fact or an easy old one would look like unlearning or learning."""
    before = losses(a=2.0, b=4.0, dropped=0.1)
    now = losses(a=1.0, b=2.0, new=50.0)
    assert monitor.loss_change(now, before) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    "other",
    [
        {(REFINED, "a", "Lima"): (9.0, 2)},
        {(START, "a", "Lima. Over."): (9.0, 2)},
        {(START, "Where?", "Lima"): (9.0, 2)},
    ],
    ids=["prompt", "target", "question"],
)
def test_another_prompt_target_or_question_is_another_pair(other: Losses) -> None:
    assert monitor.loss_change(other, losses(a=2.0)) is None
    shared = {**other, **losses(a=1.0)}
    assert monitor.loss_change(shared, losses(a=2.0)) == pytest.approx(-0.5)


def test_without_an_earlier_epoch_there_is_no_c1() -> None:
    assert monitor.loss_change(losses(a=1.0), {}) is None


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 100))
def test_gain_is_finite_and_has_the_sign_of_the_change(new: float, old: float, n: int) -> None:
    gained = monitor.gain(new, old, n)
    assert abs(gained) <= n
    assert (gained > 0) == (new > old) or gained == pytest.approx(0)


def rows(value: float) -> list[Scored]:
    return [Scored(Example("x", "Where?", "Lima"), "?", Reward(value))] * 4


def test_each_kind_of_move_has_its_part_of_the_signal() -> None:
    state = State(Candidate(), dev=rows(0.5), memory=Memory(losses=losses(a=2.0)))
    memory = Memory(losses=losses(a=1.0))
    outcome = Outcome(Candidate(), {"grad_norm": 3.0}, Bill(), memory)
    trained = monitor.after(state, Move.NUMERICAL, outcome, rows(0.75))
    assert trained == Signal(c1=-0.5, c2=3.0)
    edited = monitor.after(state, Move.SYMBOLIC, outcome, rows(0.75))
    assert edited == Signal(gain=0.5)


@pytest.mark.parametrize(
    ("c1", "small"), [(-0.5, False), (-0.101, False), (-0.05, True), (0.5, True)]
)
def test_a_loss_that_hardly_falls_or_rises_is_saturation(c1: float, small: bool) -> None:
    assert monitor.is_small(Signal(c1=c1, c2=9.0), CFG) is small


def test_a_vanishing_gradient_is_saturation() -> None:
    assert monitor.is_small(Signal(c1=-0.9, c2=0.1), CFG)
    assert monitor.is_small(Signal(c1=None, c2=0.1), CFG)
    assert not monitor.is_small(Signal(c1=None, c2=0.9), CFG)


def test_patience_asks_for_small_signals_in_a_row() -> None:
    patient = RunConfig(patience=2)
    assert monitor.saturated(numerical([1.0, 0.99]), CFG)
    assert not monitor.saturated(numerical([1.0, 0.99]), patient)
    assert monitor.saturated(numerical([1.0, 0.99, 0.98]), patient)
    assert not monitor.saturated(numerical([1.0, 0.99, 0.5]), patient)
    assert not monitor.saturated([], CFG)


def test_symbolic_moves_are_exhausted_when_they_gain_little() -> None:
    patient = RunConfig(patience=2)
    assert monitor.exhausted(symbolic([0.5, 0.0]), CFG)
    assert not monitor.exhausted(symbolic([0.5, 0.0]), patient)
    assert monitor.exhausted(symbolic([0.5, 0.0, -0.1]), patient)
    assert not monitor.exhausted(symbolic([0.0, 0.5]), CFG)
    assert not monitor.exhausted(numerical([1.0, 1.0]), CFG)


def test_phases_do_not_leak_into_each_other() -> None:
    history = [*symbolic([0.0]), *numerical([1.0])]
    assert monitor.last_phase(history) == history[1:]
    assert monitor.last_phase([]) == []
    assert not monitor.exhausted(history, CFG)
    assert monitor.prompts_failed(history, CFG)
    assert not monitor.prompts_failed(numerical([1.0]), CFG)


def test_prompts_have_failed_where_the_demand_for_style_stays() -> None:
    tried = [step(1, Move.SYMBOLIC, Signal(gain=0.4), demand={"style": 0.6})]
    assert not monitor.prompts_failed(tried, CFG)
    assert not monitor.prompts_failed(tried, CFG, style=0.3)
    assert monitor.prompts_failed(tried, CFG, style=0.4)
