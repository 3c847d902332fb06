"""Every method is one decision."""

from __future__ import annotations

from dataclasses import replace

import pytest
from histories import needs, numerical, step, symbolic

from nslora.algorithm import router
from nslora.config import METHODS, RunConfig
from nslora.types import Move, Signal, StepRecord

pytestmark = pytest.mark.pure

CFG = RunConfig(moves=6)
N, S, STOP = Move.NUMERICAL, Move.SYMBOLIC, Move.STOP
# methods whose decision is by signal and demand, and whose decision looks at whether prompts are followed
ROUTED = ("numerical-first",)
FOLLOWING = ("neurosymbolic", "oracle")


def choose(
    method: str,
    history: list[StepRecord],
    content: float = 0.5,
    style: float = 0.5,
    cfg: RunConfig = CFG,
) -> router.Choice:
    cfg = cfg.but(method=method)
    return router.DECISIONS[cfg.row.decision](history, needs(content, style), cfg)


def decide(
    method: str,
    history: list[StepRecord],
    content: float = 0.5,
    style: float = 0.5,
    cfg: RunConfig = CFG,
) -> Move:
    return choose(method, history, content, style, cfg).move


def made(method: str, moves: int, cfg: RunConfig = CFG) -> list[Move]:
    """Return the moves of a method whose decision does not look at signals."""
    history: list[StepRecord] = []
    for number in range(moves):
        history.append(step(number + 1, decide(method, history, cfg=cfg)))
    return [Move(one.move) for one in history]


def test_every_decision_is_some_methods_and_every_method_has_one() -> None:
    assert {method.decision for method in METHODS.values()} == set(router.DECISIONS)


def test_pure_methods_never_change_their_mind() -> None:
    for history in ([], numerical([1.0, 1.0]), symbolic([0.0])):
        for method in ("lora", "lora-rft", "lora-remade", "lora-demonstrated"):
            assert decide(method, history) is N
        assert decide("textgrad", history) is S
        assert decide("frozen", history) is STOP


def test_gepa_has_the_whole_budget_in_one_move() -> None:
    assert decide("gepa", []) is S
    assert decide("gepa", symbolic([0.5])) is STOP


def test_a_schedule_is_followed_to_its_end() -> None:
    assert made("fixed:SNNS", 5) == [S, N, N, S, STOP]
    assert choose("fixed:S", symbolic([0.1])).reason == "the schedule is at its end"


@pytest.mark.parametrize(
    ("moves", "schedule"),
    [(6, [S, S, N, N, S, S]), (3, [S, N, S]), (2, [S, N]), (4, [S, N, S, N])],
)
def test_alternate_goes_prompt_weights_prompt_in_thirds(moves: int, schedule: list[Move]) -> None:
    assert made("alternate", moves, CFG.but(moves=moves)) == schedule


def test_in_a_stream_the_budget_is_that_of_a_phase() -> None:
    """Three moves per phase at most, whatever the phases have together."""
    stream = CFG.but(task="stream", moves=6, rounds=3)
    assert made("alternate", 3, stream) == [S, N, S]
    assert (
        choose("numerical-first", numerical([1.0]), cfg=stream).reason == "needed and never tried"
    )
    # one move into a budget of six
    assert choose("numerical-first", numerical([1.0])).reason == "LoRA still learns"


def test_random_has_a_coin_of_its_own_in_every_run() -> None:
    coin = made("random", 16)
    assert coin == made("random", 16)
    assert set(coin) == {N, S}
    others = [CFG.but(**change) for change in ({"rule": "json"}, {"backbone": "gemma3-270m"})]
    for other in (*others, CFG.but(seed=1)):
        assert made("random", 16, other) != coin
    # the study that a run belongs to is no part of what it is
    assert made("random", 16, CFG.but(study="other")) == coin


@pytest.mark.parametrize("method", ["monitor", *ROUTED])
def test_the_papers_rule_numerical_until_saturated_symbolic_until_exhausted(method: str) -> None:
    assert decide(method, []) is N
    assert decide(method, numerical([1.0, 0.5])) is N
    assert decide(method, numerical([1.0, 0.99])) is S
    assert decide(method, [*numerical([1.0, 0.99]), *symbolic([0.4])]) is S
    assert decide(method, [*numerical([1.0, 0.99]), *symbolic([0.0])]) is N


def test_reasons_are_told() -> None:
    assert choose("monitor", numerical([1.0, 0.99])).reason == "LoRA is saturated"
    assert choose("monitor", numerical([1.0, 0.5])).reason == "LoRA still learns"
    assert choose("monitor", symbolic([0.4])).reason == "edits still gain"
    assert choose("monitor", symbolic([0.0])).reason == "edits gain little"
    assert choose("numerical-first", [], style=0).reason == "only content is needed"


def test_a_phase_without_demand_is_skipped_by_the_router_but_not_by_the_bare_signal() -> None:
    assert decide("numerical-first", [], content=0) is S
    assert decide("monitor", [], content=0) is N
    assert decide("numerical-first", numerical([1.0, 0.99]), style=0) is N
    assert decide("numerical-first", [], content=0.01, style=0.01) is STOP


def test_trained_weights_that_fail_on_dev_are_trained_on_though_no_training_example_needs_it() -> (
    None
):
    """Runs on facts stopped after two of four moves, at 75% on dev: one of 24 examples is below the floor."""
    trained, edited = numerical([1.0, 0.5]), symbolic([0.5])
    for success, then in ((0.75, N), (0.95, STOP), (1.0, STOP)):
        for history in (trained, [*trained, *edited]):
            assert decide("numerical-first", scored(history, success), 0.04, 0) is then
        assert decide("numerical-first", scored(edited, success), 0.04, 0) is STOP


def scored(history: list[StepRecord], success: float) -> list[StepRecord]:
    """The history with this dev success after its last move."""
    return [*history[:-1], replace(history[-1], dev={"success": success})]


def test_style_that_prompts_failed_to_bring_becomes_a_demand_on_the_weights() -> None:
    assert decide("numerical-first", symbolic([0.5]), content=0) is S
    assert decide("numerical-first", symbolic([0.0]), content=0) is N


@pytest.mark.parametrize("method", ROUTED)
def test_a_needed_kind_of_move_is_not_left_untried_until_the_last_one(method: str) -> None:
    learning = [1.0, 0.5, 0.25, 0.12, 0.06, 0.03]  # never saturated
    assert [decide(method, numerical(learning[:n])) for n in range(6)] == [N, N, N, N, S, N]
    assert decide(method, symbolic([0.4] * 4)) is N
    assert choose(method, symbolic([0.4] * 4)).reason == "needed and never tried"
    never = CFG.but(reserve=0)
    assert decide(method, numerical(learning[:4]), cfg=never) is N
    assert decide(method, symbolic([0.4] * 4), cfg=never) is S


def test_the_last_move_is_not_another_prompt_where_prompts_left_the_style_missing() -> None:
    # a gain, but one of content
    tried = step(5, S, Signal(gain=0.4), demand={"style": 0.6})
    history = [*numerical([1.0, 0.5, 0.25, 0.12]), tried]
    assert decide("numerical-first", history, 0.2, 0.5) is N
    assert decide("numerical-first", history, 0.2, 0.3) is S
    assert decide("numerical-first", history, 0.2, 0.5, CFG.but(moves=7)) is S
    assert decide("numerical-first", history, 0.2, 0.5, CFG.but(reserve=0)) is S


def test_nothing_is_tried_only_because_it_was_not_yet() -> None:
    four = numerical([1.0, 0.5, 0.25, 0.12])
    assert decide("numerical-first", four, 0.6, 0.05) is N
    assert decide("numerical-first", symbolic([0.4] * 4), 0.05, 0.6) is S
    assert decide("monitor", four) is N
    assert decide("numerical-first", [*symbolic([0.0]), *numerical([1.0, 0.5, 0.25])]) is N


# ---- prompts where they are followed


def following(
    history: list[StepRecord], content: float, style: float, follows: float = 0.9
) -> router.Choice:
    seen = replace(needs(content, style), follows=follows)
    return router.by_following(history, seen, CFG)


def test_the_prompt_is_rewritten_first_where_form_is_asked_for_and_prompts_are_followed() -> None:
    assert following([], 0.8, 0.2).move is S
    assert following([], 0.0, 0.9).move is S
    # no form is asked for
    assert following([], 0.9, 0.05).move is N
    # prompts are not followed
    for follows in (0.0, 0.47):
        assert following([], 0.2, 0.8, follows).move is N
        assert following([], 0.2, 0.8, follows).reason == "prompts are not followed"
    # nobody can tell: an edit shows it
    assert router.by_following([], needs(0.2, 0.8), CFG).move is S


def test_weights_take_what_an_edit_left() -> None:
    brought = [step(1, S, Signal(gain=1.3), demand={"style": 0.6})]
    assert following(brought, 0.8, 0.0).move is N
    # the form is still missing: another edit while edits gain
    assert following(brought, 0.3, 0.2).move is S
    # an edit that left most of its demand, or gained nothing, has failed
    assert following(brought, 0.3, 0.5).move is N
    assert following(symbolic([0.0]), 0.3, 0.5).move is N


def test_saturated_weights_leave_the_rest_to_a_prompt_that_is_followed() -> None:
    saturated = numerical([1.0, 0.99])
    assert following(saturated, 0.3, 0.0).reason == "LoRA is saturated"
    assert following(saturated, 0.3, 0.0, follows=0.4).move is N


@pytest.mark.parametrize("method", FOLLOWING)
def test_it_stops_where_nothing_is_needed_unless_dev_still_fails(method: str) -> None:
    assert decide(method, [], content=0.01, style=0.01) is STOP
    trained = numerical([1.0, 0.5])
    assert decide(method, scored(trained, 0.75), 0.04, 0) is N
    assert decide(method, scored(trained, 0.95), 0.04, 0) is STOP


def test_needs_alone_follow_the_larger_demand() -> None:
    assert decide("needs-only", symbolic([0.5]), 0.3, 0.2) is N
    assert decide("needs-only", numerical([1.0]), 0.1, 0.2) is S


def test_a_decision_leaves_its_arguments_alone_and_repeats_itself() -> None:
    history = numerical([1.0, 0.99])
    before = list(history)
    for method in ("monitor", *ROUTED, *FOLLOWING, "random", "needs-only"):
        assert choose(method, history) == choose(method, history)
    assert history == before
