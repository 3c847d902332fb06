"""The numerical move: which facts it trains on, on which pairs, with which replay, and what it reports."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from histories import needs, step
from peft import get_peft_model_state_dict

from nslora.algorithm import loop, numerical
from nslora.algorithm.needs import Needs
from nslora.algorithm.session import Memory, Session, State
from nslora.types import Candidate, Generation, Move, Pair, Prompt, Reward, Signal

REFINED = Prompt("Write lower case.")


def begun(run: Session, prompt: Prompt | None = None) -> State:
    """Return the scored start of a run, as if it began with another prompt."""
    return loop.begin(run, State(Candidate(prompt or run.task.initial_prompt)))


def everyone(run: Session) -> Needs:
    """Return needs by which every training example fails and is for the weights."""
    n = len(run.task.feedback)
    return Needs(np.ones(n, bool), np.ones(n))


def moved(run: Session, state: State):
    return numerical.numerical(run, state, everyone(run))


# ---- facts


def test_weights_learn_every_example_whatever_it_needs(opened) -> None:
    run = opened(inputs="all", targets="gold")
    half = needs(0.5, 0.5, len(run.task.feedback))
    outcome = numerical.numerical(run, begun(run), half)
    assert outcome.memory.chosen == {e.fact for e in run.task.train}


def test_only_what_needs_content_is_learned_where_a_method_says_so(opened) -> None:
    run = opened(inputs="needed", targets="gold")
    state = begun(run)
    half = needs(0.5, 0.5, len(run.task.feedback))
    outcome = numerical.numerical(run, state, half)
    assert outcome.memory.chosen == numerical.needed_facts(run, state, half)
    assert outcome.memory.chosen < {e.fact for e in run.task.train}


def test_facts_that_fail_and_need_content_are_chosen(opened) -> None:
    run = opened()
    state = begun(run)
    half = needs(0.5, 0.5, len(run.task.feedback))
    chosen = numerical.needed_facts(run, state, half)
    assert chosen == {s.example.fact for s in state.train[: len(state.train) // 2]}


def test_style_that_prompts_failed_to_bring_is_for_the_weights_too(opened) -> None:
    run = opened()
    state = begun(run)
    failed = step(1, Move.SYMBOLIC, Signal(gain=0.0))
    state = replace(state, history=(*state.history, failed))
    half = needs(0.5, 0.5, len(run.task.feedback))
    assert numerical.needed_facts(run, state, half) == {s.example.fact for s in state.train}


def test_a_move_always_has_facts_to_train_on(opened) -> None:
    """Those chosen before where nothing fails, and all where nothing was chosen: the move is made."""
    run = opened()
    state = begun(run)
    nothing = Needs(np.zeros(len(state.train), bool), np.ones(len(state.train)))
    assert numerical.needed_facts(run, state, nothing) == {e.fact for e in run.task.train}
    chosen = frozenset({run.task.train[0].fact})
    state = replace(state, memory=Memory(chosen=chosen))
    assert numerical.needed_facts(run, state, nothing) == chosen


def test_a_chosen_fact_stays_chosen_once_it_passes(opened) -> None:
    run = opened(targets="gold", inputs="needed")
    first = run.task.feedback[0].fact
    state = replace(begun(run), memory=Memory(chosen=frozenset({first})))
    nothing = Needs(np.zeros(len(state.train), bool), np.ones(len(state.train)))
    outcome = numerical.numerical(run, state, nothing)
    assert outcome.memory.chosen == {first}
    wordings = {e.question for e in run.task.train if e.fact == first}
    assert {pair.question for pair in outcome.memory.trained} == wordings


def test_every_wording_of_a_chosen_fact_is_trained_on(opened) -> None:
    run = opened(targets="gold", replay=0.0)
    outcome = moved(run, begun(run))
    asked = [(pair.question, pair.target) for pair in outcome.memory.trained]
    assert sorted(asked) == sorted((e.question, e.gold) for e in run.task.train)
    assert outcome.evidence["pairs"] == {"gold": len(run.task.train)}


# ---- the epoch


def test_losses_are_those_of_the_tasks_own_pairs_without_replay(opened, monkeypatch) -> None:
    run = opened(targets="gold")
    replayed = [Pair(run.task.initial_prompt, "?", "!", "replay")]
    monkeypatch.setattr(numerical, "replay_pairs", lambda *_: replayed)
    outcome = moved(run, begun(run))
    assert outcome.evidence["pairs"]["replay"] == 1
    own = {(pair.prompt, pair.question, pair.target) for pair in outcome.memory.trained}
    assert set(outcome.memory.losses) == own
    nll, tokens = map(sum, zip(*outcome.memory.losses.values(), strict=True))
    assert outcome.evidence["loss"] == pytest.approx(nll / tokens)
    # bytes are tokens, and each answer ends its turn
    assert tokens == sum(len(e.gold.encode()) + 1 for e in run.task.train)


@pytest.mark.parametrize(
    ("whole", "scaled", "scale"),
    [
        ([1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], 0.8),
        ([1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], 0.8),
        ([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], 1.0),
        ([1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], 1.0),
        # others right than before, as many
        ([1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], 0.8),
        # too few are right for a tie to tell anything
        ([1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], 1.0),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], 1.0),
        # half a reward is no right reply
        ([0.9, 0.9, 0.9, 0.9, 0.9, 1], [0.9, 0.9, 0.9, 0.9, 0.9, 1], 1.0),
    ],
)
def test_an_adapter_is_scaled_down_where_most_of_dev_is_right_and_none_is_lost(
    whole: list[float], scaled: list[float], scale: float
) -> None:

    class Run:
        """A session whose dev rewards depend on the share in place."""

        def __init__(self) -> None:
            self.adapter = "adapter-01"
            self.replies: dict[str, dict[str, str]] = {}
            self.learner, self.task = self, SimpleNamespace(dev=range(6))
            self.place = 1.0
            self.products = [torch.ones(1)]

        def scale(self, tuned: list[torch.Tensor], share: float) -> None:
            assert tuned[0] is not self.products[0]
            self.place = share

        def score(self, prompt: Prompt, dev: object) -> list[SimpleNamespace]:
            known = self.replies.setdefault(self.adapter, {})
            known["?"] = known.get("?", f"at {self.place}")
            values = whole if self.place == 1.0 else scaled
            return [SimpleNamespace(reward=Reward(value)) for value in values]

    run = Run()
    assert numerical.shrink(cast(Session, run), Prompt()) == scale
    assert run.place == scale
    # the replies that are remembered are those of the weights in place
    assert run.replies == {"adapter-01": {"?": f"at {scale}"}}


def test_a_move_says_how_far_its_adapter_was_scaled_down(opened, monkeypatch) -> None:
    run = opened(targets="gold", shrink=False)
    assert moved(run, begun(run)).evidence["scale"] == 1.0 == run.learner.share
    # a random model gets nothing right, scaled or not
    run = opened(targets="gold")
    assert moved(run, begun(run)).evidence["scale"] == 1.0 == run.learner.share
    monkeypatch.setattr(numerical, "MOST", -1.0)
    run = opened(targets="gold")
    assert moved(run, begun(run)).evidence["scale"] == run.learner.share == numerical.SCALE


def test_a_move_of_several_passes_counts_all_of_them_and_trains_further(opened) -> None:
    once = moved(run := opened(targets="gold", replay=0.0), begun(run))
    thrice = moved(run := opened(targets="gold", replay=0.0, epochs=3), begun(run))
    assert thrice.bill.train_tokens == 3 * once.bill.train_tokens > 0
    assert thrice.evidence["loss"] < once.evidence["loss"]


def test_a_rejected_edit_leaves_the_next_epoch_as_it_would_have_been(opened) -> None:
    run = opened(targets="gold", batch=2)
    first = moved(run, begun(run))
    run = opened(targets="gold", batch=2)
    state = begun(run)
    rejected = step(1, Move.SYMBOLIC, Signal(gain=0.0))
    second = moved(run, replace(state, history=(*state.history, rejected)))
    assert second.memory == first.memory
    assert second.evidence == first.evidence
    # a second numerical move draws other numbers
    trained = step(1, Move.NUMERICAL, Signal(c2=1.0))
    run = opened(targets="gold", batch=2)
    other = moved(run, replace(state, history=(*state.history, trained)))
    assert other.evidence != first.evidence


def test_a_move_leaves_its_weights_in_place_and_in_a_checkpoint(opened) -> None:
    run = opened(targets="gold", replay=0.0)
    outcome = moved(run, begun(run))
    assert outcome.candidate.adapter == run.adapter == "adapter-01"
    trained = {k: v.clone() for k, v in get_peft_model_state_dict(run.learner.model).items()}
    run.use(Candidate())
    run.use(outcome.candidate)
    back = get_peft_model_state_dict(run.learner.model)
    assert all((back[name] == weight).all() for name, weight in trained.items())


def test_baking_trains_under_the_initial_prompt_what_the_refined_one_brought(opened) -> None:
    run = opened(replay=0.0, bake=True)
    initial = run.task.initial_prompt
    baked = moved(run, begun(run, REFINED))
    assert baked.candidate.prompt == initial
    assert {(p.prompt, p.refined) for p in baked.memory.trained} == {(initial, REFINED)}
    run = opened(replay=0.0)
    kept = moved(run, begun(run, REFINED))
    assert kept.candidate.prompt == REFINED
    assert {(p.prompt, p.refined) for p in kept.memory.trained} == {(REFINED, None)}


def test_an_arm_of_the_study_of_remade_data_trains_on_its_pairs(opened) -> None:
    run = opened(replay=0.0, targets="duplicated")
    outcome = moved(run, begun(run))
    assert outcome.evidence["pairs"] == {"gold": 2 * len(run.task.train)}


def test_sources_are_counted() -> None:
    pairs = [Pair(Prompt(), "?", "!", source) for source in ("replay", "gold", "replay")]
    assert numerical.count_sources(pairs) == {"gold": 1, "replay": 2}


# ---- replay


def fixed_replies(run: Session, monkeypatch, say) -> list[list[str]]:
    """Let the frozen weights say `say(text)`; return what they are asked from now on."""
    asked: list[list[str]] = []

    def reply(texts: list[str]) -> list[Generation]:
        asked.append(list(texts))
        return [Generation(say(text), 3, -0.1) for text in texts]

    monkeypatch.setattr(run, "frozen", reply)
    return asked


def test_replay_is_half_under_the_current_prompt_and_half_under_instructions(
    opened, monkeypatch
) -> None:
    run = opened(replay_pool=6)
    fixed_replies(run, monkeypatch, lambda text: "said")
    initial = run.task.initial_prompt
    rng = np.random.default_rng(0)
    pairs = numerical.replay_pairs(run, initial, 7, rng)
    assert [pair.source for pair in pairs] == ["replay"] * 7
    assert [pair.prompt == initial for pair in pairs] == [True] * 4 + [False] * 3
    other = numerical.replay_pairs(run, initial, 7, rng)
    assert {pair.question for pair in other[:4]} != {pair.question for pair in pairs[:4]}
    assert numerical.replay_pairs(run, initial, 0, rng) == []
    # no more than there are
    assert len(numerical.replay_pairs(run, initial, 99, rng)) == len(run.task.replay)


def test_under_a_refined_prompt_no_more_is_asked_than_is_needed(opened, monkeypatch) -> None:
    run = opened(replay_pool=6)
    asked = fixed_replies(run, monkeypatch, lambda text: "said")
    pairs = numerical.replay_pairs(run, REFINED, 4, np.random.default_rng(0))
    assert [pair.prompt == REFINED for pair in pairs] == [True] * 2 + [False] * 2
    under_refined, instructed = asked
    assert len(under_refined) == 2 and len(instructed) == 6
    assert all(REFINED.system in text for text in under_refined)
