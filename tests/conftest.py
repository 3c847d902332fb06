"""What the tests share: hypothesis without chance, one thread each, a backbone for the session, an empty store."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The first files, of minutes each: started last, one would run alone. xdist deals each worker two in turn, so the third
# waits for the first, and is a short one.
FIRST = ("test_smoke.py", "test_notebooks.py", "test_architecture.py", "test_jobs.py")

# Files are tested side by side: a thread that spins while it waits takes the core that another one computes on.
# It is read when torch is first imported, here and in child processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without a pure test where only those are wanted: they import the model libraries."""
    if config.option.markexpr != "pure" or not collection_path.name.startswith("test_"):
        return None
    # None lets other plugins decide
    return True if "mark.pure" not in collection_path.read_text(encoding="utf-8") else None


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


@pytest.fixture(scope="session")
def tiny_loaded(tmp_path_factory: pytest.TempPathFactory):
    """A random model of two layers in float32, loaded once: whole runs take about a second."""
    from tinymodel import save_tiny_model

    from nslora.model.backbone import load

    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return load(str(folder), threads=1, dtype="float32", device="cpu")


@pytest.fixture
def tiny(tiny_loaded):
    """The random model, given back without an adapter."""
    yield tiny_loaded
    from tinymodel import bare

    bare(tiny_loaded)


@pytest.fixture(scope="session")
def memo():
    """What the frozen random model replied: kept for the session, as a folder keeps it for its runs."""
    kept: dict[str, str] = {}

    def remember(key: str, compute):
        if key not in kept:
            kept[key] = json.dumps(compute())
        return json.loads(kept[key])

    return remember


@pytest.fixture
def opened(tiny, memo, tmp_path: Path):
    """A function that opens a Session on the random model, with settings of a short run but for those given."""
    from scripted import Scripted, lowercase
    from tinymodel import config

    from nslora.algorithm.session import Session
    from nslora.tasks.build import build

    def open_session(reply=lowercase, memo=memo, **settings):
        cfg = config(**{"rule": "lower_case", "backbone": tiny.name, **settings})
        scratch = tmp_path / cfg.run_id
        scratch.mkdir(exist_ok=True)
        return Session(cfg, build(cfg), tiny, Scripted(reply), scratch, memo)

    return open_session
