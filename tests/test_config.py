"""Settings: checked with one sentence, resolved by method, fingerprinted, and the source of randomness."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from nslora.config import METHODS, OF_OWN_DATA, OF_STREAM, Needs, RunConfig, Targets
from nslora.types import UserError

pytestmark = pytest.mark.pure

OTHER = {  # another valid value for every setting that takes part in a run's identity
    "task": "facts", "backbone": "gemma3-270m", "method": "lora", "moves": 3, "returned": "tuned",
    "items": 5, "dev_items": 5, "test_items": 5, "mix": "2:1:0", "rule": "json", "tier": "hard", "max_new_tokens": 9,
    "reward": "parts", "rank": 4, "lr": 1e-3, "batch": 2, "epochs": 2, "targets": "gold",
    "inputs": "needed", "shrink": False, "bake": True, "replay": 0.0, "replay_pool": 9, "candidates": 1, "feedback": 1,
    "prompt_tokens": 99, "gate": False, "control": "random", "needs": "classifier", "c1_eps": 0.5,
    "c2_eps": 0.1, "gain_eps": 0.1, "patience": 2, "demand_floor": 0.2, "follows_floor": 0.4, "reserve": 0,
    "editor_url": "https://example.org/v1", "editor_model": "smollm2-135m",
    "editor_engine": "llama.cpp", "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lernrate": 1e-3}, "unknown setting 'lernrate'; the settings are backbone, bake"),
        ({"task": "poetry"}, "setting task = 'poetry': unknown; choose from facts"),
        ({"method": "gpt"}, "unknown method 'gpt'; choose from frozen, lora"),
        ({"method": "fixed"}, "unknown method 'fixed'"),
        ({"method": "fixed:NNX"}, "unknown method 'fixed:NNX'"),
        ({"method": "lora:NN"}, "unknown method 'lora:NN'"),
        ({"method": "fixed:NNSN", "moves": 3}, "has more moves than its budget, 3"),
        (
            {"method": "fixed:NNSN", "moves": 2, "rounds": 3, "task": "stream"},
            "has more moves than its budget, 3",
        ),
        ({"lr": "1e-4"}, "setting lr = '1e-4': input should be a valid number"),
        ({"seed": 1.5}, "setting seed = 1.5: input should be a valid integer"),
        ({"seed": True}, "setting seed = True: input should be a valid integer"),
        ({"moves": 0}, "setting moves = 0: input should be greater than 0"),
        ({"lr": float("nan")}, "setting lr = nan: input should be"),
        ({"lr": float("inf")}, "setting lr = inf: input should be a finite number"),
        ({"replay": -1.0}, "setting replay = -1.0: input should be greater than or equal to 0"),
        ({"targets": "best"}, "setting targets = 'best': input should be 'method', 'gold'"),
        ({"needs": "parts"}, 'needs = "parts" takes a reward in parts'),
        ({"rounds": 3}, "rounds is a setting of the stream alone"),
    ],
)
def test_wrong_settings_get_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        RunConfig.of(settings)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_whole_numbers_do_for_fractions() -> None:
    assert RunConfig(lr=1).lr == 1.0


def test_every_setting_but_seed_and_study_changes_the_fingerprint() -> None:
    base = RunConfig()
    assert set(OTHER) == set(RunConfig.model_fields) - {"seed", "study", *OF_OWN_DATA, *OF_STREAM}
    prints = {base.but(**{name: value}).fingerprint for name, value in OTHER.items()}
    assert len(prints | {base.fingerprint}) == len(OTHER) + 1
    assert base.but(seed=3, study="main").fingerprint == base.fingerprint
    stream = base.but(task="stream")
    assert stream.but(rounds=3).fingerprint != stream.fingerprint


def test_own_data_are_known_by_their_content(tmp_path: Path) -> None:
    first, copy = tmp_path / "mine.jsonl", tmp_path / "elsewhere" / "mine.jsonl"
    copy.parent.mkdir()
    for path in (first, copy):
        path.write_text('{"question": "Who?", "answer": "Ann"}')
    cfg = RunConfig(task=f"own:{first}")
    run_id = cfg.run_id
    assert cfg.but(task=f"own:{copy}").run_id == run_id
    assert cfg.but(grader="exact").run_id != run_id
    assert cfg.but(columns="question=q").run_id != run_id
    assert cfg.but(system="Be brief.").run_id != run_id
    assert cfg.but(template="Q: {question}").run_id != run_id
    # so are the rows to test on
    assert cfg.but(test=str(first)).run_id == cfg.but(test=str(copy)).run_id != run_id
    first.write_text('{"question": "Who?", "answer": "Ben"}')
    assert RunConfig(task=f"own:{first}").run_id != run_id
    # a run that is under way keeps its folder
    assert cfg.run_id == run_id


def test_settings_of_own_data_are_no_part_of_other_runs() -> None:
    base = RunConfig()
    assert not set(OF_OWN_DATA) & set(base.settings)
    assert set(OF_OWN_DATA) <= set(RunConfig(task="own:x.jsonl").settings)


def test_naming_a_methods_own_policy_is_the_same_run() -> None:
    own = RunConfig(method="lora-remade")
    assert own.but(targets="remade", needs="none").run_id == own.run_id
    assert own.but(method="lora").row.targets == "gold"


def test_a_receipt_makes_the_same_run_again() -> None:
    cfg = RunConfig(method="neurosymbolic", rule="json", study="main")
    assert cfg.settings["targets"] == "remade" and cfg.settings["needs"] == "asked"
    assert RunConfig.of(cfg.settings).run_id == cfg.run_id


def test_every_row_of_the_table_of_methods_names_what_there_is() -> None:
    from nslora.algorithm.needs import ESTIMATORS

    assert set(ESTIMATORS) == set(get_args(Needs)) - {"method"}
    for row in METHODS.values():
        assert row.needs in ESTIMATORS and row.targets in get_args(Targets)


@pytest.mark.parametrize(
    ("method", "most"), [("frozen", 0), ("gepa", 1), ("fixed:SN", 2), ("lora", 5), ("random", 5)]
)
def test_a_method_makes_the_moves_of_its_budget_or_of_its_schedule(method: str, most: int) -> None:
    assert RunConfig(method=method, moves=5).most_moves == most


def test_a_run_id_is_short_and_has_no_path_in_it() -> None:
    cfg = RunConfig(task=f"own:/data/{'x' * 280}.jsonl", backbone="hub:a/b@" + "0" * 40)
    assert len(cfg.run_id) < 150 and re.fullmatch(r"[\w.-]+", cfg.run_id)
    other = cfg.but(task=f"own:/other/{'x' * 280}.jsonl")
    assert other.run_id != cfg.run_id


def test_randomness_is_shared_by_seed_and_purpose() -> None:
    draw = lambda cfg, purpose: cfg.rng(purpose).integers(2**31)  # noqa: E731
    a = RunConfig(seed=1)
    assert draw(a, "x") == draw(a.but(method="lora"), "x")
    assert draw(a, "x") != draw(a, "y") and draw(a, "x") != draw(a.but(seed=2), "x")


def test_a_runs_own_randomness_is_shared_with_no_other_run() -> None:
    a = RunConfig(seed=1, method="random")
    others = [a.but(rule="json"), a.but(backbone="gemma3-270m"), a.but(seed=2)]
    draws = [cfg.own_rng("coin").integers(2**31) for cfg in [a, *others]]
    assert len(set(draws)) == 4
    assert a.own_rng("coin").integers(2**31) == draws[0]


@pytest.mark.parametrize(
    "setting", [{"dtype": "nf4"}, {"system": "Be brief."}, {"grader": "exact"}]
)
def test_settings_of_own_data_are_refused_elsewhere(setting):
    """They are no part of a study's identity, and what is no part of it must not change a run."""
    with pytest.raises(UserError, match="setting of own data alone"):
        RunConfig(**setting)
    assert RunConfig(task="own:mine.jsonl", **setting).settings.items() >= setting.items()
