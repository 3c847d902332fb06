"""What the tests of the study share: one synthetic study with everything but pictures built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic import write_grid

from nslora.study import claims, records, report


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small study. Tests leave it as it is."""
    results = tmp_path_factory.mktemp("results")
    write_grid(results)
    report.build(results, images=False)
    return results


@pytest.fixture(scope="session")
def loaded(grid: Path) -> records.Records:
    """The records of the small study."""
    return records.load(grid)


@pytest.fixture(scope="session")
def judged(loaded: records.Records) -> dict[str, Any]:
    """All claims of the small study."""
    return claims.judged(loaded)
