"""What the tests share: hypothesis without chance, one loaded backbone for the session, an empty store."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

LONG = ("test_notebooks.py", "test_grid.py", "test_loop.py")  # minutes each: started last, one would run alone

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the others keep their order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def backbone():
    """The smallest default backbone in float32, loaded once. Tests leave its weights as they find them."""
    from nslora.backbones import load

    return load("smollm2-135m", threads=1, dtype="float32", device="cpu")


@pytest.fixture
def store(tmp_path: Path):
    """A Store over empty folders."""
    from nslora.store import Store

    return Store(tmp_path / "results", tmp_path / "runs")
