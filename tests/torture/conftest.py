"""One tally for all kinds, one nursery of processes, an editor on loopback, a tiny model in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import KEY, Faulty, Step, completion, serving
from harness import Kind, Nursery, Tally
from scripted import lowercase

from nslora.editor.replay import Request

TALLY = Tally()


def pytest_sessionfinish() -> None:
    path = os.environ.get("NSLORA_RELIABILITY")
    if path and TALLY.kinds:
        TALLY.write(Path(path))


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No budget, no price and no proxy of whoever calls the tests."""
    for name in ("PRICE", "BUDGET", "MODE"):
        monkeypatch.delenv(f"NSLORA_EDITOR_{name}", raising=False)
    for name in ("OPENAI_API_KEY", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kind() -> Iterator[Callable[[str], Kind]]:
    """Return a function that opens a kind by its name; what is lost of it fails the test."""
    opened: list[tuple[Kind, int]] = []

    def open_kind(name: str) -> Kind:
        found = TALLY.kind(name)
        opened.append((found, len(found.losses)))
        return found

    yield open_kind
    lost = [loss for found, before in opened for loss in found.losses[before:]]
    assert not lost, "\n".join(lost)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """A process that forks others."""
    found = Nursery()
    yield found
    found.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a folder."""
    from tinymodel import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def answer(body: dict[str, Any]) -> Step:
    """Answer as a good editor would."""
    *system, user = [message["content"] for message in body["messages"]]
    request = Request("".join(system), user, body["seed"])
    try:
        text = lowercase(request)
    except (IndexError, KeyError):
        text = "OK"
    return 200, {}, completion(text, prompt_tokens=50, completion_tokens=9)


@pytest.fixture(scope="session")
def editor() -> Iterator[Faulty]:
    """A good editor on loopback, which wants a key."""
    with pytest.MonkeyPatch.context() as patch, serving() as endpoint:
        patch.setenv("NSLORA_EDITOR_KEY", KEY)
        endpoint.reply = answer
        yield endpoint
