"""Ablations: runs with a changed setting, paired with the main study."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import write_record

from nslora.study import ablations, records


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> records.Records:
    folder = tmp_path_factory.mktemp("results")
    for seed in range(3):
        write_record(folder, (1.0, 1.0), method="neurosymbolic", seed=seed)
        write_record(folder, (1.0, 1.0), method="lora", seed=seed)
        shared = {"study": "ablations", "seed": seed}
        write_record(folder, (0.2, 0.2), replay=0.0, **shared)
        write_record(folder, (1.0, 1.0), replay=0.0, rank=8, **shared)
        # another method, and a run that changes nothing
        write_record(folder, (0.0, 0.0), method="lora", gate=False, **shared)
        write_record(folder, (0.0, 0.0), **shared)
    # a seed that the main study lacks
    write_record(folder, (0.0, 0.0), study="ablations", replay=0.0, seed=7)
    return records.load(folder)


def test_changed_settings_are_those_of_the_columns(changed: records.Records) -> None:
    table = ablations.changes(changed)
    counted = table.change.value_counts().to_dict()
    assert counted == {"replay = 0.0": 3, "rank = 8, replay = 0.0": 3, "gate = False": 3}
    main = changed.runs.set_index("run_id")
    assert set(main.study[table.main_id]) == {"main"}
    assert (main.seed[table.main_id].to_numpy() == main.seed[table.run_id].to_numpy()).all()


def test_a_change_is_paired_with_the_main_run_of_its_seed(changed: records.Records) -> None:
    everything = ablations.ablations(changed)
    assert list(everything.row.unique()) == list(records.MEASURES)
    frame = everything[everything.row == "test success"].set_index("change")
    assert set(frame.index) == {"replay = 0.0", "rank = 8, replay = 0.0"}
    assert frame.loc["replay = 0.0", "mean"] == pytest.approx(-0.87, abs=0.1)
    assert frame.loc["rank = 8, replay = 0.0", "mean"] == 0.0
    row = frame.loc["replay = 0.0"]
    assert row.n == 3 and -1 <= row.low < row["mean"] < row.high <= 1
    other = ablations.ablations(changed, method="lora")
    assert set(other.change) == {"gate = False"} and set(other.method) == {"lora"}


def test_the_nearest_main_run_is_the_one_compared_with(tmp_path: Path) -> None:
    write_record(tmp_path, method="neurosymbolic")
    write_record(tmp_path, method="neurosymbolic", rank=8, lr=0.1)
    write_record(tmp_path, study="ablations", rank=8)
    assert ablations.changes(records.load(tmp_path)).change.tolist() == ["rank = 8"]


def test_no_records_have_no_ablations(tmp_path: Path) -> None:
    nothing = ablations.ablations(records.load(tmp_path))
    assert nothing.empty
    write_record(tmp_path, task="mixed", method="neurosymbolic")
    assert list(ablations.ablations(records.load(tmp_path)).columns) == list(nothing.columns)
