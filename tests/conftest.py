"""What the tests share: hypothesis without chance, one loaded backbone for the session, an empty store."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


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
