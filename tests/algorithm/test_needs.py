"""What an example needs: features, counterfactual labels, the classifier, and every estimator."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from nslora.algorithm import needs
from nslora.algorithm.session import Session, State
from nslora.config import METHODS, RunConfig
from nslora.types import Candidate, Example, Need, Reward, Scored

Rows = list[Scored]


def scored(output: str, gold: str = "Lima", value: float = 0.5) -> Scored:
    return Scored(Example("x", "Where?", gold, fact="f"), output, Reward(value), -0.5)


# ---- shares and choices


def test_demand_counts_failing_examples_by_need() -> None:
    estimated = needs.Needs(np.array([True, True, False, True]), np.array([0.9, 0.1, 0.9, 0.2]))
    assert estimated.demand == {"content": 0.25, "style": 0.5}
    assert estimated.for_weights().tolist() == [True, False, False, False]
    assert estimated.for_prompt().tolist() == [False, True, False, True]


def test_one_half_counts_as_content() -> None:
    estimated = needs.Needs(np.array([True]), np.array([0.5]))
    assert (estimated.content, estimated.style) == (1.0, 0.0)


def test_where_nobody_can_tell_all_examples_are_for_the_weights_and_the_failing_for_prompts() -> (
    None
):
    unknown = needs.Needs(np.array([True, False]))
    assert unknown.demand == {} and unknown.content == unknown.style == 0
    assert unknown.for_weights().tolist() == [True, True]
    assert unknown.for_prompt().tolist() == [True, False]


def test_a_prompt_has_all_failing_examples_where_none_needs_style() -> None:
    content = needs.Needs(np.array([True, False]), np.array([0.9, 0.1]))
    assert content.for_prompt().tolist() == [True, False]


# ---- features


def test_features_see_what_a_person_would_look_at() -> None:
    wrong, styled = scored("I was born in Oslo, I think."), scored("Lima")
    x = needs.features([wrong, styled], [5.0, 0.1], [5.0, 0.2])
    column = {name: x[:, i] for i, name in enumerate(needs.FEATURES)}
    assert column["reward"].tolist() == [0.5, 0.5]
    assert column["nll"].tolist() == [5.0, 0.1]
    assert column["nll_neutral"].tolist() == [5.0, 0.2]
    assert column["mean_logprob"].tolist() == [-0.5, -0.5]
    assert column["recall"].tolist() == [0.0, 1.0]
    assert column["log_length_ratio"][0] == pytest.approx(math.log(8 / 2))
    assert column["shape"][1] == 0 < column["shape"][0]


def test_features_use_the_reward_as_one_number_only() -> None:
    """Content wrong or style wrong: the same single number, so the parts cannot be read off."""
    kinds = [Reward(0.5, "", {"content": c, "style": 1 - c}) for c in (0.0, 1.0)]
    rows = [Scored(scored("").example, "Lima", reward) for reward in kinds]
    a, b = needs.features(rows, [1.0, 1.0], [1.0, 1.0]).tolist()
    assert a == b


def test_features_of_nothing_have_their_columns() -> None:
    assert needs.features([], [], []).shape == (0, len(needs.FEATURES))
    empty = needs.features([scored("", gold="")], [0.0], [0.0])
    assert np.isfinite(empty).all()


@given(st.text(), st.text())
def test_shape_distance_is_a_distance(a: str, b: str) -> None:
    d = needs.shape_distance(a, b)
    assert -1e-9 <= d <= 1 + 1e-9
    assert d == needs.shape_distance(b, a)
    assert needs.shape_distance(a, a) == 0


def test_described_rows_are_those_of_the_candidate_and_of_the_initial_prompt(opened) -> None:
    run, state = start(opened(method="neurosymbolic"))
    x = needs.describe(run, state)
    assert x.shape == (len(state.train), len(needs.FEATURES))
    nll, neutral = (x[:, needs.FEATURES.index(name)] for name in ("nll", "nll_neutral"))
    # at the start both prompts are one
    assert nll.tolist() == neutral.tolist() and (nll > 0).all()


# ---- labels


def test_labels_say_which_move_raised_the_reward_more() -> None:
    before, better = [scored("?")] * 4, scored("Lima", value=1.0)
    same = scored("?")
    numerical, symbolic = [better, same, same, better], [same, better, same, better]
    labels = needs.counterfactual(before, numerical, symbolic)
    assert labels[:2].tolist() == [1.0, 0.0]
    assert np.isnan(labels[2:]).all()
    with pytest.raises(ValueError, match="one scored row"):
        needs.counterfactual(before, [better], [same])


def test_a_move_that_only_did_less_harm_is_no_need() -> None:
    """Found as a bug: examples that were right before got the label of whichever move spoiled them less."""
    right, spoiled = scored("Lima", value=1.0), scored("Oslo")
    assert np.isnan(needs.counterfactual([right], [right], [spoiled])).all()


# ---- the classifier


def separable(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in which nll tells the label, with noise; facts of two rows each."""
    y = rng.integers(0, 2, n).astype(float)
    x = rng.normal(size=(n, len(needs.FEATURES)))
    x[:, needs.FEATURES.index("nll")] += 3 * y
    return x, y, np.arange(n) // 2


def test_the_fit_separates_and_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    model = needs.fit(*separable(400, rng))
    x, y, _ = separable(2000, rng)
    p = model.p_content(x)
    assert roc_auc_score(y, p) > 0.95
    bins = np.digitize(p, [0.2, 0.4, 0.6, 0.8])
    members = [bins == b for b in set(bins)]
    # expected calibration error
    error = sum(abs(p[rows].mean() - y[rows].mean()) * rows.mean() for rows in members)
    assert error < 0.05


def test_noise_is_not_separated_out_of_fold() -> None:
    rng = np.random.default_rng(1)
    x, y, groups = separable(400, rng)
    values = needs.out_of_fold(rng.permutation(x), y, groups)
    assert abs(roc_auc_score(y, values) - 0.5) < 0.12


def test_one_kind_of_label_is_refused() -> None:
    x = np.zeros((4, len(needs.FEATURES)))
    with pytest.raises(ValueError, match="only one kind"):
        needs.fit(x, np.ones(4), np.arange(4))


def test_json_keeps_the_classifier(tmp_path) -> None:
    model = needs.fit(*separable(100, np.random.default_rng(2)))
    model.save(tmp_path / "needs.json")
    text = (tmp_path / "needs.json").read_text()
    assert needs.NeedClassifier.parse(text) == model
    with pytest.raises(ValueError, match="other features"):
        needs.NeedClassifier.parse(text.replace('"nll"', '"length"'))


def test_the_packaged_classifier_tells_an_unknown_fact_from_a_missing_style() -> None:
    """A right answer out of style needs style; a wrong one with high nll of gold needs content."""
    wrong = scored("The person was born in the city of Oslo.")
    unstyled = scored("The capital of Peru is Lima.")
    x = needs.features([wrong, unstyled], [6.0, 1.5], [6.0, 1.5])
    p = needs.NeedClassifier.default().p_content(x)
    assert p[0] > 0.5 > p[1]


# ---- estimators


def start(run: Session, *outputs: str) -> tuple[Session, State]:
    """Return a state whose training rows are these replies to the first questions, or the model's own."""
    if not outputs:
        train = run.score(run.task.initial_prompt, run.task.feedback)
        return run, State(Candidate(run.task.initial_prompt), train=train)
    rows = []
    for example, output in zip(run.task.feedback, outputs, strict=False):
        rows.append(Scored(example, output, run.reward(example, output)))
    return run, State(Candidate(run.task.initial_prompt), train=rows)


def of_kind(run: Session, need: Need) -> Example:
    return next(e for e in run.task.feedback if run.task.hidden[e.id].need is need)


def estimated(run: Session, estimator: str, example: Example, reply: str) -> tuple[bool, float]:
    """Return whether a reply fails and P(content) as estimated for it."""
    row = Scored(example, reply, run.reward(example, reply))
    state = State(Candidate(run.task.initial_prompt), train=[row])
    guess = needs.ESTIMATORS[estimator](run, state)
    assert guess.p_content is not None
    return bool(guess.failing[0]), float(guess.p_content[0])


def test_the_settings_name_every_estimator() -> None:
    (names,) = [get_args(RunConfig.model_fields["needs"].annotation)]
    assert set(names) == {"method", *needs.ESTIMATORS}
    assert {method.needs for method in METHODS.values()} <= set(needs.ESTIMATORS)


@pytest.mark.parametrize("name", sorted(set(needs.ESTIMATORS) - {"parts"}))
def test_every_estimator_gives_a_probability_for_every_example(opened, name: str) -> None:
    run, state = start(opened(needs=name))
    guess = needs.ESTIMATORS[name](run, state)
    assert guess.failing.tolist() == [s.reward.success < 1 for s in state.train]
    if name == "none":
        assert guess.p_content is None
    else:
        assert guess.p_content is not None
        assert guess.p_content.shape == guess.failing.shape
        assert ((guess.p_content >= 0) & (guess.p_content <= 1)).all()


def test_recall_asks_for_the_words_that_are_not_in_the_reply(opened) -> None:
    run = opened()
    example = of_kind(run, Need.STYLE)
    assert estimated(run, "recall", example, f"It is {example.answer}.") == (True, 0.0)
    assert estimated(run, "recall", example, "no idea") == (True, 1.0)


def test_asked_compares_the_reply_with_the_bare_gold_answer(opened) -> None:
    """The rule is lower case, so that a bare name fails where a form is asked for."""
    run = opened()
    content, style = of_kind(run, Need.CONTENT), of_kind(run, Need.STYLE)
    # the bare answer is enough: what fails is content, whatever the words
    assert estimated(run, "asked", content, "no idea") == (True, 1.0)
    assert estimated(run, "asked", content, f"Not {content.answer}") == (True, 1.0)
    # a form is asked for, and the reply is worth less than the bare answer
    assert estimated(run, "asked", style, "No idea") == (True, 1.0)
    # of equal worth, in form but wrong or right but out of form: the words tell
    assert estimated(run, "asked", style, "no idea") == (True, 1.0)
    assert estimated(run, "asked", style, style.answer) == (True, 0.0)
    # what passes is no demand
    assert estimated(run, "asked", style, style.answer.lower())[0] is False


def test_asked_sees_that_a_bare_answer_is_asked_for(opened, tmp_path: Path) -> None:
    data = tmp_path / "capitals.jsonl"
    rows = [{"question": f"Capital {n}?", "answer": f"Place {n}"} for n in range(15)]
    data.write_text("\n".join(map(json.dumps, rows)))
    run = opened(task=f"own:{data}", grader="exact")
    example = run.task.feedback[0]
    assert estimated(run, "asked", example, f"It is {example.answer}.") == (True, 0.0)
    assert estimated(run, "asked", example, "no idea") == (True, 1.0)


def test_constant_is_content_and_random_differs_between_moves_and_runs(opened) -> None:
    run, state = start(opened())
    constant = needs.constant(run, state)
    assert constant.demand == {"content": float(constant.failing.mean()), "style": 0.0}

    def draw(run: Session, state: State) -> list[float]:
        p_content = needs.random(run, state).p_content
        assert p_content is not None
        return p_content.tolist()

    assert draw(run, state) == draw(run, state)
    from histories import symbolic

    later = State(state.candidate, train=state.train, history=tuple(symbolic([0.0, 0.0])))
    assert draw(run, later) != draw(run, state)
    other = opened(lr=2e-2)
    assert draw(other, state) != draw(run, state)


def test_parts_tell_content_first(opened) -> None:
    run = opened(reward="parts", needs="parts")
    style = of_kind(run, Need.STYLE)
    assert estimated(run, "parts", style, style.answer) == (True, 0.0)
    assert estimated(run, "parts", style, "no idea") == (True, 1.0)


def test_the_oracle_reads_the_hidden_label(opened) -> None:
    run = opened(method="oracle")
    content, style, both = (of_kind(run, need) for need in (Need.CONTENT, Need.STYLE, Need.BOTH))
    assert estimated(run, "hidden", content, "?") == (True, 1.0)
    assert estimated(run, "hidden", style, "?") == (True, 0.0)
    # what needs both needs content until that is right
    assert estimated(run, "hidden", both, "?") == (True, 1.0)
    assert estimated(run, "hidden", both, f"It is {both.answer}.") == (True, 0.0)


def test_probes_are_read_without_their_ties(tmp_path) -> None:
    header = ",".join([*needs.FEATURES, "label", "fact"])
    rows = ["0,0,0,0,0,0,0,1.0,a", "0,0,0,0,0,0,0,,b"]
    (tmp_path / "probe-x.csv").write_text("\n".join([header, *rows]) + "\n")
    assert needs.probes(tmp_path)["fact"].tolist() == ["a"]
    assert len(needs.probes(tmp_path / "none")) == 0
