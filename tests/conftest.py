"""What the tests share: hypothesis without chance, one thread each, a backbone for the session, an empty store."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings

# The first files, of minutes each: started last, one would run alone. xdist deals each worker two in turn, so the third
# waits for the first, and is a short one.
FIRST = ("test_notebooks.py", "test_loop.py", "test_architecture.py", "test_grid.py")

# Files are tested side by side: a thread that spins while it waits takes the core that another one computes on.
os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # read when torch is first imported, here and in child processes

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the others keep their order."""
    items.sort(
        key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)
    )


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever thread count an earlier test of this process left behind."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backbone():
    """The smallest default backbone in float32, loaded once. Tests leave its weights as they find them."""
    from nslora.model.backbone import load

    return load("smollm2-135m", threads=1, dtype="float32", device="cpu")


@pytest.fixture
def store(tmp_path: Path):
    """A Store over empty folders."""
    from nslora.runs.store import Store

    return Store(tmp_path / "results", tmp_path / "runs")


@pytest.fixture
def opened(backbone, store):
    """A function that opens a Session of a small style run over the same store; the backbone is given back bare."""
    from nslora.algorithm.session import Session
    from nslora.config import RunConfig
    from nslora.tasks import build

    cfg = RunConfig(
        task="style",
        rule="end_phrase",
        items=4,
        test_items=4,
        max_new_tokens=6,
        threads=1,
        lr=3e-3,
        replay=0.0,
    )
    task = build.build(cfg)
    yield lambda: Session(cfg, task, backbone, cast(Any, None), store.begin(cfg), store.memo)
    backbone.model = backbone.model.unload()
