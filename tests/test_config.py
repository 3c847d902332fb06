"""Settings: validated, fingerprinted, and the source of independent randomness."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nslora.config import RunConfig
from nslora.types import SLOT, Prompt, UserError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metod": "lora"}, "unknown setting 'metod'"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"task": "poetry"}, "unknown task 'poetry'"),
        ({"lr": "fast"}, "setting lr must be of type float"),
        ({"seed": True}, "setting seed must be of type int"),
        ({"moves": 0}, "setting moves must be greater than 0"),
        ({"lr": float("nan")}, "setting lr must be greater than 0"),
        ({"replay": -1.0}, "setting replay must not be negative"),
        ({"small": "tiny"}, "unknown small 'tiny'"),
    ],
)
def test_wrong_settings_get_one_sentence(settings: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        RunConfig.of(settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_are_accepted_where_a_float_is_meant() -> None:
    assert RunConfig.of({"replay": 1}) == RunConfig(replay=1.0)
    assert type(RunConfig(replay=1).replay) is float


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_seeds_share_a_fingerprint_but_not_a_run_id(a: int, b: int) -> None:
    one, two = RunConfig(seed=a), RunConfig(seed=b)
    assert one.fingerprint == two.fingerprint
    assert (one.run_id == two.run_id) == (a == b)


def test_every_setting_but_the_seed_changes_the_fingerprint() -> None:
    base = RunConfig()
    others = [
        replace(base, lr=1e-4),
        replace(base, method="lora"),
        replace(base, rule="json"),
        replace(base, threads=1),
    ]
    assert len({cfg.fingerprint for cfg in [base, *others]}) == len(others) + 1


def test_run_ids_are_file_names() -> None:
    cfg = RunConfig(task="own:a b/../c.jsonl", backbone="hub:Org/Name@" + "0" * 40)
    assert "/" not in cfg.run_id and " " not in cfg.run_id


def test_randomness_is_equal_in_every_process_and_independent_per_purpose() -> None:
    code = "from nslora.config import RunConfig; print(RunConfig(seed=3).rng('x').integers(10**9))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    here = RunConfig(seed=3)
    assert {int(run.stdout) for run in runs} == {int(here.rng("x").integers(10**9))}
    assert here.rng("x").integers(10**9) != here.rng("y").integers(10**9)


def test_a_prompt_keeps_other_braces_as_text() -> None:
    prompt = Prompt('Reply as {"answer": "..."}', f"Q: {SLOT} {{json}}")
    assert prompt.render("Why?") == "Q: Why? {json}"
    assert prompt.messages("Why?")[0]["content"] == 'Reply as {"answer": "..."}'
    assert len(Prompt().messages("Why?")) == 1
