"""Forecast what runs will take, from the receipts of finished ones."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from nslora.config import RunConfig
from nslora.disk import SUMS, damaged
from nslora.experiments.grid import Job, Profile, jobs
from nslora.runs import preflight
from nslora.runs.store import read_json, write_text
from nslora.types import Json

# parts of a receipt that a forecast reads
RECEIPT = {"run_id", "config", "cost", "editor"}
# runs that share them cost alike, per move
LIKE = ("task", "backbone", "method")

HEAD = """\
What `make reproduce PROFILE={profile}` takes per notebook, by the receipts of finished runs: hours
of one thread, every run made anew. Runs that no finished run is like are `unknown` and not counted. Memory
is the highest of a notebook's process; `make` runs two of them at a time.

| notebook | runs | unknown | hours | peak memory, GB | to download, GB | editor tokens | money |
| :-- | --: | --: | --: | --: | --: | --: | --: |
"""
LINE = "| {0} | {runs} | {unknown} | {hours} | {memory} | {download} | {tokens} | {money} |\n"
SIZES = """\
| profile | runs | hours of one thread | peak memory of a job, GB | models to download, GB |
| :-- | --: | --: | --: | --: |
"""
SIZE = "| {0} | {runs} | {hours} | {memory} | {download} |\n"


class Cost(NamedTuple):
    """What runs take: seconds, the editor's tokens and money, peak memory of their process in MB."""

    seconds: float = 0.0
    tokens: float = 0.0
    money: float = 0.0
    peak_mb: float = 0.0


def total(costs: Iterable[Cost | None]) -> Cost:
    """Add up the costs that are known; of memory take the highest."""
    # the empty cost, so that there is a row to zip
    seconds, tokens, money, peaks = zip(
        Cost(),
        *filter(None, costs),
        strict=True,
    )
    return Cost(
        sum(seconds),
        sum(tokens),
        sum(money),
        max(peaks),
    )


def history(profile: Profile, *folders: str) -> list[Json]:
    """Return the receipts of the finished runs in `folders` of the project, of any profile.

    Those that cannot be read are left out: what they cost is a guess, and their runs are made anew.
    """
    paths = [sorted(profile.root.glob(f"{folder}/records/*/run.json")) for folder in folders]
    # folders may overlap
    receipts = map(_receipt, dict.fromkeys(chain(*paths)))
    return [receipt for receipt in receipts if set(receipt) >= RECEIPT]


def _receipt(path: Path) -> Json:
    """Return a receipt; an empty one where it is damaged."""
    # all records have checksums but those of before
    if (path.parent / SUMS).exists() and damaged(path.parent):
        return {}
    try:
        receipt = read_json(path)
    except ValueError:
        return {}
    return receipt if isinstance(receipt, dict) else {}


def expected(cfg: RunConfig, past: list[Json]) -> Cost | None:
    """Return what a run will take: as its own earlier receipt says, else the mean of like runs.

    A like run counts per move. None where no run is like it.
    """
    run_id = cfg.run_id
    # receipts that count more come first in `past`
    like = [run for run in past if run["run_id"] == run_id][:1]
    if not like:
        alike = [getattr(cfg, key) for key in LIKE]
        like = [run for run in past if [run["config"][key] for key in LIKE] == alike]
    if not like:
        return None
    costs = []
    for run in like:
        share, editor = cfg.moves / run["config"]["moves"] / len(like), run["editor"]
        cost = Cost(
            seconds=share * run["cost"]["wall_s"],
            tokens=share * (editor["tokens_in"] + editor["tokens_out"]),
            money=share * editor["money"],
            # which does not scale
            peak_mb=run["cost"]["peak_mb"],
        )
        costs.append(cost)
    return total(costs)


def left(job: Job, past: list[Json]) -> list[Cost | None]:
    """Return what each of a job's runs that are not done will take; None where nobody knows."""
    store = job.profile.store
    return [expected(cfg, past) for cfg in job.configs if not store.done(cfg)]


def longest_first(queue: list[Job]) -> list[Job]:
    """Sort jobs by the time expected of them: a long one left for the end would run alone."""
    past = history(queue[0].profile, "results/**") if queue else []
    return sorted(queue, key=lambda job: -total(left(job, past)).seconds)


def plan(profile: Profile) -> list[Json]:
    """Return one row per job: its name, whether it is done, its runs, and what those left take."""
    past = history(profile, "results/**")
    rows = []
    for job in jobs(profile):
        costs = left(job, past)
        counts = {"runs": len(job.configs), "left": len(costs), "unknown": costs.count(None)}
        row = {"job": job.name, "done": job.done(), **counts}
        rows.append(row | total(costs)._asdict())
    return rows


def table(profile: Profile) -> str:
    """Return a Markdown table of what each notebook of a profile is expected to take.

    It follows from the receipts in the profile's results, then from those of the full profile.
    """
    past = history(profile, _folder(profile), "results/full")
    text = HEAD.format(profile=profile.name)
    for notebook, runs in profile.notebooks.items():
        text += LINE.format(notebook, **_cells(runs, past, "-"))
    return text + f"\n{', '.join(profile.reports)}: no runs of their own.\n"


def _folder(profile: Profile) -> str:
    """Return where a profile's results lie: a committed table depends on nothing else in results/."""
    return profile.results.relative_to(profile.root).as_posix()


def _cells(configs: Iterable[RunConfig], past: list[Json], missing: str) -> Json:
    """Return the cells of a table on these runs, each counted once."""
    runs = {cfg.run_id: cfg for cfg in configs}.values()
    costs = [expected(cfg, past) for cfg in runs]
    sums = total(costs)
    cells = {
        "hours": f"{sums.seconds / 3600:.1f}",
        "memory": f"{sums.peak_mb / 1e3:.1f}",
        "tokens": f"{sums.tokens:,.0f}",
        "money": f"{sums.money:.2f}",
    }
    if not any(costs):
        cells = dict.fromkeys(cells, missing)
    download = sum(weights.bytes for weights in preflight.weights(runs)) / 1e9
    counts = {"runs": len(runs), "unknown": costs.count(None)}
    return {**counts, **cells, "download": f"{download:.1f}"}


def sizes(profiles: Iterable[Profile]) -> str:
    """Return a Markdown table for the README: what each profile takes, by the receipts of its runs.

    Runs without a receipt of their own or of a like run are counted beside it.
    """
    text = SIZES
    for profile in profiles:
        past = history(profile, _folder(profile))
        cells = _cells(profile.runs, past, "unknown")
        if 0 < cells["unknown"] < cells["runs"]:
            cells["hours"] += f" and {cells['unknown']} runs unknown"
        text += SIZE.format(profile.name, **cells)
    return text


def save(profile: Profile) -> Path:
    """Write the table beside the profile's results."""
    path = profile.results / "expected.md"
    write_text(path, table(profile))
    return path
