"""Which parts matter: runs with a setting changed, against the runs of the main study."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

import pandas as pd
from pandas import DataFrame

from nslora.study.records import IDENTITY, ITEM, MEASURES, Records, estimates, graded
from nslora.study.stats import DIFFERENCE

COLUMNS = ["row", "backbone", "change", "mean", "low", "high", "n", "method"]
# An instance is another one where a setting is changed, so items are matched without it.
MATCHED = [name for name in ITEM if name != "instance"]


def changes(records: Records, study: str = "ablations") -> DataFrame:
    """Return one row per run of the study: `run_id`, `main_id` (its run of the main study), and the `change`.

    The run of the main study is that of the same task, rule, backbone, method and seed with the fewest other settings.
    """
    names = [name for name in records.settings if name not in IDENTITY]
    pairs = records.of(study).runs.merge(
        records.of("main").runs, on=IDENTITY, suffixes=("", " of main")
    )
    # [run, setting] where they differ
    ours = pairs[names].astype(str)
    differs = ours != pairs[[f"{name} of main" for name in names]].astype(str).to_numpy()
    texts = (ours.columns + " = " + ours).where(differs)
    pairs["change"] = texts.apply(lambda row: ", ".join(row.dropna()), axis=1, result_type="reduce")
    pairs["count"] = differs.sum(axis=1)
    # a run without a change is the main one again
    nearest = pairs[pairs["count"] > 0].sort_values("count").drop_duplicates("run_id")
    return nearest.rename(columns={"run_id of main": "main_id"})[["run_id", "main_id", "change"]]


def ablations(
    records: Records,
    task: str = "mixed",
    method: str = "neurosymbolic",
    study: str = "ablations",
) -> DataFrame:
    """Return what a change of settings does to a method: its runs minus the main ones, paired by seed and item.

    One row per measure (`row`, see records.MEASURES), backbone and change, shares with intervals.
    """
    pairs = changes(records, study)
    chosen = records.runs[(records.runs.task == task) & (records.runs.method == method)]
    pairs = pairs[pairs.run_id.isin(chosen.run_id)]
    parts = []
    for row, measure in MEASURES.items():
        items = graded(records, *measure)[["run_id", *MATCHED, "value"]]
        unchanged = items.rename(columns={"run_id": "main_id", "value": "unchanged"})
        # one row per item that both runs answered
        both = pairs.merge(items, on="run_id").merge(unchanged, on=["main_id", *MATCHED])
        both["value"] = both.value.astype(float) - both.unchanged.astype(float)
        table = estimates(both, ["backbone", "change"], DIFFERENCE)
        parts.append(table.assign(row=row, method=method))
    return pd.concat(parts, ignore_index=True)[COLUMNS]
