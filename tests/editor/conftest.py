"""A faulty endpoint for each test, with a key in the environment and no proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faulty import KEY, Faulty, serving

VARIABLES = ("KEY", "PRICE", "BUDGET", "MODE")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"NSLORA_EDITOR_{name}", raising=False)
    for name in ("OPENAI_API_KEY", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    monkeypatch.setenv("NSLORA_EDITOR_KEY", KEY)
    with serving() as server:
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before another attempt, unless the endpoint asks for one."""
    monkeypatch.setattr("nslora.editor.attempt.PAUSE_S", 0.0)
