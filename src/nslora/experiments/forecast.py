"""Forecast what runs will take, from the receipts of finished ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nslora.config import RunConfig
from nslora.experiments.grid import Job, Profile, jobs
from nslora.runs import preflight
from nslora.runs.store import write_text

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


class Cost(NamedTuple):
    """What runs take: seconds, the editor's tokens and money, peak memory of their process in MB."""

    seconds: float = 0.0
    tokens: float = 0.0
    money: float = 0.0
    peak_mb: float = 0.0


def total(costs: Iterable[Cost]) -> Cost:
    """Add costs up; of memory take the highest."""
    # the empty cost, so that there is a row to zip
    seconds, tokens, money, peaks = zip(Cost(), *costs, strict=True)
    return Cost(sum(seconds), sum(tokens), sum(money), max(peaks))


def history(profile: Profile, *folders: str) -> list[dict[str, Any]]:
    """Return the receipts of the finished runs in `folders` of the project, of any profile.

    Incomplete ones are left out.
    """
    # an ordered set: folders may overlap
    paths: dict[Path, None] = {}
    for folder in folders:
        paths |= dict.fromkeys(sorted(profile.root.glob(f"{folder}/records/*/run.json")))
    receipts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [receipt for receipt in receipts if set(receipt) >= RECEIPT]


def expected(cfg: RunConfig, past: list[dict[str, Any]]) -> Cost | None:
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
    costs = [_scaled(run, cfg.moves / run["config"]["moves"]) for run in like]
    seconds, tokens, money, peak_mb = total(costs)
    n = len(costs)
    return Cost(seconds / n, tokens / n, money / n, peak_mb)


def _scaled(run: dict[str, Any], share: float) -> Cost:
    """Return `share` times what a finished run took; memory does not scale."""
    editor = run["editor"]
    return Cost(
        seconds=share * run["cost"]["wall_s"],
        tokens=share * (editor["tokens_in"] + editor["tokens_out"]),
        money=share * editor["money"],
        peak_mb=run["cost"]["peak_mb"],
    )


def left(job: Job, past: list[dict[str, Any]]) -> list[Cost | None]:
    """Return what each of a job's runs that are not done will take; None where nobody knows."""
    store = job.profile.store
    return [expected(cfg, past) for cfg in job.configs if not store.done(cfg)]


def known(costs: Iterable[Cost | None]) -> list[Cost]:
    """Return the costs without the unknown ones."""
    return [cost for cost in costs if cost is not None]


def longest_first(queue: list[Job]) -> list[Job]:
    """Sort jobs by the time expected of them: a long one left for the end would run alone."""
    past = history(queue[0].profile, "results/**") if queue else []
    return sorted(queue, key=lambda job: -total(known(left(job, past))).seconds)


def plan(profile: Profile) -> list[dict[str, Any]]:
    """Return one row per job: its name, whether it is done, its runs, and what those left take."""
    past = history(profile, "results/**")
    rows = []
    for job in jobs(profile):
        costs = left(job, past)
        expectation = total(known(costs))
        row = {
            "job": job.name,
            "done": job.done(),
            "runs": len(job.configs),
            "left": len(costs),
            "seconds": expectation.seconds,
            "tokens": expectation.tokens,
            "unknown": costs.count(None),
        }
        rows.append(row)
    return rows


def table(profile: Profile) -> str:
    """Return a Markdown table of what each notebook of a profile is expected to take.

    It follows from the receipts in the profile's results, then from those of the full profile.
    """
    # the committed table must not depend on what else lies in results/
    results = profile.results.relative_to(profile.root).as_posix()
    past = history(profile, results, "results/full")
    text = HEAD.format(profile=profile.name)
    for notebook, runs in profile.notebooks.items():
        text += _line(notebook, runs, past)
    return text + f"\n{', '.join(profile.reports)}: read records only, in seconds.\n"


def _line(notebook: str, runs: tuple[RunConfig, ...], past: list[dict[str, Any]]) -> str:
    costs = known(expected(cfg, past) for cfg in runs)
    sums = total(costs)
    hours, memory, tokens, money = "----"
    if costs:
        hours = f"{sums.seconds / 3600:.1f}"
        memory = f"{sums.peak_mb / 1e3:.1f}"
        tokens = f"{sums.tokens:,.0f}"
        money = f"{sums.money:.2f}"
    download = f"{sum(w.bytes for w in preflight.weights(runs)) / 1e9:.1f}"
    counts = (str(len(runs)), str(len(runs) - len(costs)))
    cells = (notebook, *counts, hours, memory, download, tokens, money)
    return f"| {' | '.join(cells)} |\n"


def sizes(profiles: Iterable[Profile]) -> str:
    """Return a Markdown table for the README: what each profile takes, by the receipts of its runs.

    Runs without a receipt of their own or of a like run are counted beside it.
    """
    text = "| profile | runs | hours of one thread | peak memory of a job, GB | models to download, GB |\n"
    text += "| :-- | --: | --: | --: | --: |\n"
    for profile in profiles:
        runs = [cfg for notebook in profile.notebooks.values() for cfg in notebook]
        # one run may belong to several notebooks
        unique = {cfg.run_id: cfg for cfg in runs}
        results = profile.results.relative_to(profile.root).as_posix()
        past = history(profile, results)
        costs = known(expected(cfg, past) for cfg in unique.values())
        sums = total(costs)
        unknown = len(unique) - len(costs)
        hours, memory = f"{sums.seconds / 3600:.1f}", f"{sums.peak_mb / 1e3:.1f}"
        if unknown:
            hours = f"{hours} and {unknown} runs unknown" if costs else "unknown"
        download = f"{sum(w.bytes for w in preflight.weights(runs)) / 1e9:.1f}"
        memory = memory if costs else "unknown"
        text += f"| {profile.name} | {len(unique)} | {hours} | {memory} | {download} |\n"
    return text


def save(profile: Profile) -> Path:
    """Write the table beside the profile's results."""
    path = profile.results / "expected.md"
    write_text(path, table(profile))
    return path
