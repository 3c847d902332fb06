"""The signal, its two readings, patience and the switch rules."""

from __future__ import annotations

import pytest
from histories import numerical, step, symbolic
from hypothesis import given
from hypothesis import strategies as st

from nslora.algorithm import monitor
from nslora.config import RunConfig
from nslora.types import Move, Signal

CFG = RunConfig(c1_eps=0.1, c2_eps=0.5, gain_eps=0.02, patience=1)
positive = st.floats(1e-3, 1e3)


@given(positive, positive)
def test_c1_is_the_relative_change_of_the_papers_equation(new: float, old: float) -> None:
    history = numerical([old, new])
    assert history[1].signal.c1 == pytest.approx((new - old) / old)
    assert history[1].signal.c2 == 9.0


def test_a_new_numerical_phase_has_no_c1() -> None:
    assert monitor.after_numerical([*numerical([2.0]), *symbolic([0.1])], 1.0, 3.0).c1 is None


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 100))
def test_gain_is_finite_and_has_the_sign_of_the_change(new: float, old: float, n: int) -> None:
    gained = monitor.gain(new, old, n)
    assert abs(gained) <= n
    assert (gained > 0) == (new > old) or gained == pytest.approx(0)


@pytest.mark.parametrize(
    ("c1", "small", "expected"),
    [
        (-0.5, "signed", False),
        (-0.05, "signed", True),
        (0.5, "signed", True),
        (0.5, "absolute", False),
        (-0.05, "absolute", True),
    ],
)
def test_the_two_readings_of_small_differ_on_a_rising_loss(
    c1: float, small: str, expected: bool
) -> None:
    cfg = RunConfig(c1_eps=0.1, small=small)
    assert monitor.is_small(Signal(c1=c1, c2=9.0), cfg) is expected


def test_a_small_gradient_norm_alone_is_saturation() -> None:
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
    assert monitor.exhausted(symbolic([0.5, 0.0]), CFG)
    assert not monitor.exhausted(symbolic([0.0, 0.5]), CFG)
    assert not monitor.exhausted(numerical([1.0, 1.0]), CFG)


def test_phases_do_not_leak_into_each_other() -> None:
    history = [*symbolic([0.0]), *numerical([1.0])]
    assert monitor.phase(history) == history[1:]
    assert not monitor.exhausted(history, CFG)
    assert monitor.prompts_failed(history, CFG)
    assert not monitor.prompts_failed(numerical([1.0]), CFG)


def test_prompts_have_failed_where_the_demand_for_style_stays() -> None:
    tried = [step(1, Move.SYMBOLIC, Signal(gain=0.4), demand={"style": 0.6})]
    assert not monitor.prompts_failed(tried, CFG)
    assert not monitor.prompts_failed(tried, CFG, style=0.3)
    assert monitor.prompts_failed(tried, CFG, style=0.4)
