"""The grid of experiments.toml: which runs belong to which (notebook x backbone) job, which are done, what is left."""

from __future__ import annotations

import hashlib
import json
import re
import time
import tomllib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, product
from pathlib import Path
from typing import Any, NamedTuple

from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.model.download import Weights
from nslora.runs.store import Store, append_json
from nslora.types import UserError

BLOCK = {"backbones", "tasks", "methods", "seeds", "rules", "settings", "variants"}
RULED = ("style", "mixed", "stream")  # tasks that have a style rule


@dataclass(frozen=True)
class Profile:
    """One profile of experiments.toml, resolved: notebook -> its runs; `reports` are notebooks without runs."""

    name: str
    root: Path
    results: Path
    limit_s: float
    notebooks: dict[str, tuple[RunConfig, ...]]
    reports: tuple[str, ...]

    @property
    def work(self) -> Path:
        """Folder of everything that is not a result: job records, logs, executed notebooks, unfinished runs."""
        return self.root / "runs" / self.name

    @property
    def store(self) -> Store:
        """Records in `results`, checkpoints under `work`."""
        return Store(self.results, self.work / "runs")

    @property
    def finished(self) -> list[dict[str, Any]]:
        """Runs finished in this working folder, oldest first."""
        path = self.work / "progress.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Job:
    """One notebook on one backbone at one seed; a report has no backbone and no runs of its own."""

    profile: Profile
    notebook: str
    backbone: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """File name of everything that belongs to the job."""
        full = f"{self.notebook}-{self.backbone}-s{self.seed}" if self.backbone else self.notebook
        return re.sub(r"[^\w.-]", "_", full)

    @property
    def source(self) -> Path:
        """The notebook as committed."""
        return self.profile.root / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def configs(self) -> list[RunConfig]:
        """Its runs, in the order they are made."""
        runs = self.profile.notebooks.get(self.notebook, ())
        return [c for c in runs if (c.backbone, c.seed) == (self.backbone, self.seed)]

    @property
    def parameters(self) -> dict[str, str | int]:
        """What its cell tagged "parameters" is given."""
        own: dict[str, str | int] = (
            {"backbone": self.backbone, "seed": self.seed} if self.backbone else {}
        )
        return {"profile": self.profile.name} | own

    @property
    def record(self) -> Path:
        """The record that says it is done."""
        return self.profile.work / "jobs" / f"{self.name}.json"

    @property
    def executed(self) -> Path:
        """The notebook with its outputs."""
        return self.profile.work / "notebooks" / f"{self.name}.ipynb"

    def identity(self) -> str:
        """Hash of what the job does: the notebook's cells, its parameters, its runs; for a report, all run records."""
        cells = [cell["source"] for cell in json.loads(self.source.read_text())["cells"]]
        inputs: list[str] = [c.run_id for c in self.configs]
        if not self.backbone:
            records = sorted(self.profile.results.glob("records/*/run.json"))
            inputs = [
                f"{p.parent.name} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in records
            ]
        return hashlib.sha256(json.dumps([cells, self.parameters, inputs]).encode()).hexdigest()

    def done(self) -> bool:
        """True if our record says that this very job finished, and its runs are still there."""
        if not self.record.exists():
            return False
        same = json.loads(self.record.read_text())["identity"] == self.identity()
        return same and all(map(self.profile.store.done, self.configs))


def find_root() -> Path:
    """The nearest folder at or above the working directory with an experiments.toml, else this file's checkout."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[3]):
        if (folder / "experiments.toml").is_file():
            return folder
    raise UserError(f"no experiments.toml at or above {here}.")


def load(name: str, root: Path | None = None) -> Profile:
    """Read one profile of experiments.toml and check all of it; raises UserError."""
    root = root or find_root()
    try:
        table = tomllib.loads((root / "experiments.toml").read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"experiments.toml is not valid TOML: {error}.") from None
    profiles = table.get("profiles", {})
    if name not in profiles:
        raise UserError(f"unknown profile {name!r}; choose from {', '.join(profiles)}.")
    profile = profiles[name]
    notebooks = {
        notebook: tuple(
            dict.fromkeys(c for block in blocks for c in expand(block, notebook, table, profile))
        )
        for notebook, blocks in profile.get("notebooks", {}).items()
    }
    reports = tuple(table.get("reports", ()))
    for notebook in (*notebooks, *reports):
        if not (root / "notebooks" / f"{notebook}.ipynb").is_file():
            raise UserError(
                f"experiments.toml names the notebook {notebook!r}, but notebooks/{notebook}.ipynb is missing."
            )
    limit_s = 60.0 * profile.get("job_minutes", 60)
    return Profile(
        name,
        root,
        root / profile.get("results", f"runs/{name}/results"),
        limit_s,
        notebooks,
        reports,
    )


def expand(
    block: dict[str, Any], notebook: str, table: dict[str, Any], profile: dict[str, Any]
) -> list[RunConfig]:
    """The runs of one block: the product of its lists; raises UserError for a key or setting that does not exist."""
    if wrong := set(block) - BLOCK or {"backbones", "tasks", "methods", "seeds"} - set(block):
        raise UserError(
            f"a block of {notebook} in experiments.toml has an unknown or missing key {min(wrong)!r}."
        )
    configs = []
    for backbone, task in product(block["backbones"], block["tasks"]):
        common = table.get("settings", {}) | table.get("backbones", {}).get(backbone, {})
        common = (
            common
            | profile.get("settings", {})
            | block.get("settings", {})
            | {"backbone": backbone, "task": task}
        )
        rules = [{"rule": rule} for rule in block.get("rules", ())] if task in RULED else []
        variants = block.get("variants", [{}])
        for rule, seed, change, method in product(
            rules or [{}], block["seeds"], variants, block["methods"]
        ):
            configs.append(RunConfig.of(common | rule | change | {"seed": seed, "method": method}))
    return configs


def configs(profile: str, notebook: str, backbone: str, seed: int) -> list[RunConfig]:
    """The runs of one notebook on one backbone at one seed; raises UserError if the profile has none."""
    found = Job(load(profile), notebook, backbone, seed).configs
    if not found:
        raise UserError(
            f"profile {profile!r} has no runs of {notebook!r} on {backbone!r} at seed {seed} in experiments.toml."
        )
    return found


def jobs(profile: Profile) -> list[Job]:
    """All jobs of a profile in order, reports last."""
    keys = dict.fromkeys(
        (n, c.backbone, c.seed) for n, runs in profile.notebooks.items() for c in runs
    )
    return [Job(profile, *key) for key in keys] + [
        Job(profile, notebook) for notebook in profile.reports
    ]


def run_all(profile: str, notebook: str, backbone: str, seed: int) -> list[Path]:
    """What a notebook calls: make its runs that are missing, sharing one backbone and one editor; all record folders.

    Each finished run prints one line, and appends one to `runs/<profile>/progress.jsonl` for the scheduler.
    """
    runs, place = configs(profile, notebook, backbone, seed), load(profile)
    missing = [cfg for cfg in runs if not place.store.done(cfg)]
    for _, group in groupby(missing, lambda cfg: (cfg.editor_model, cfg.editor_url, cfg.threads)):
        run_group(list(group), Job(place, notebook, backbone, seed))
    return [place.store.record(cfg) for cfg in runs]


def run_group(runs: list[RunConfig], job: Job) -> None:
    """Make runs that share a backbone and an editor; equal editor requests are answered from the recordings."""
    warnings.filterwarnings(
        "ignore", "IProgress not found|`is_gradient_checkpointing` is deprecated"
    )  # in a notebook
    from nslora.model.backbone import load as load_backbone
    from nslora.runs.run import make_run, open_editor

    place, cfg = job.profile, runs[0]
    with open_editor(cfg, place.store) as editor:
        backbone = load_backbone(cfg.backbone, threads=cfg.threads)
        for cfg in runs:
            start = time.monotonic()
            record = make_run(cfg, place.store, editor, backbone, watch=lambda step: None)
            success = json.loads((record / "run.json").read_text())["final"]["test"]["success"]
            seconds = time.monotonic() - start
            print(f"{cfg.run_id}: test success {success:.2f}, {seconds:.0f} s")
            entry = {"run": cfg.run_id, "job": job.name, "seconds": seconds, "success": success}
            append_json(place.work / "progress.jsonl", entry)


class Cost(NamedTuple):
    """What runs take: seconds, the editor's tokens and money, and the peak memory of their process in MB."""

    seconds: float = 0.0
    tokens: float = 0.0
    money: float = 0.0
    peak_mb: float = 0.0


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum; of memory the highest."""
    seconds, tokens, money, peaks = zip(Cost(), *costs, strict=True)
    return Cost(sum(seconds), sum(tokens), sum(money), max(peaks))


def plan(profile: Profile) -> list[dict[str, Any]]:
    """One row per job: its name, whether it is done, runs and runs done, and what is left as `expected` says."""
    past = history(profile, "results/**")
    rows = []
    for job in jobs(profile):
        left, known = costs_left(job, past)
        rows.append(
            {
                "job": job.name,
                "done": job.done(),
                "runs": len(job.configs),
                "left": left,
                "seconds": total(known).seconds,
                "tokens": total(known).tokens,
                "unknown": left - len(known),
            }
        )
    return rows


def costs_left(job: Job, past: list[dict[str, Any]]) -> tuple[int, list[Cost]]:
    """The number of a job's runs that are not done, and what those will take of which `expected` knows it."""
    left = [expected(cfg, past) for cfg in job.configs if not job.profile.store.done(cfg)]
    return len(left), [cost for cost in left if cost is not None]


def history(profile: Profile, *folders: str) -> list[dict[str, Any]]:
    """Receipts of the finished runs in `folders` of the project, each once, of any profile; no incomplete ones."""
    found = (sorted(profile.root.glob(f"{folder}/records/*/run.json")) for folder in folders)
    runs = [json.loads(path.read_text()) for path in dict.fromkeys(chain.from_iterable(found))]
    return [run for run in runs if {"run_id", "config", "cost", "editor"} <= set(run)]


def expected(cfg: RunConfig, past: list[dict[str, Any]]) -> Cost | None:
    """What a run will take: as its own earlier record says, else the mean per move of like runs, else None."""

    def cost(run: dict[str, Any]) -> Cost:
        editor, share = run["editor"], cfg.moves / run["config"]["moves"]
        tokens = editor["tokens_in"] + editor["tokens_out"]
        return Cost(
            share * run["cost"]["wall_s"],
            share * tokens,
            share * editor["money"],
            run["cost"]["peak_mb"],
        )

    own = [run for run in past if run["run_id"] == cfg.run_id][:1]
    same = ("task", "backbone", "method")
    like = [
        cost(run) for run in own or past if all(run["config"][k] == getattr(cfg, k) for k in same)
    ]
    if not like:
        return None
    seconds, tokens, money, peak_mb = total(like)
    return Cost(seconds / len(like), tokens / len(like), money / len(like), peak_mb)


def needed(configs: Sequence[RunConfig]) -> list[Weights]:
    """The default weights that runs use: their backbones and, where edits can happen, the local editor."""
    names = {cfg.backbone for cfg in configs}
    names |= {
        cfg.editor_model for cfg in configs if cfg.editor_url == "local" and cfg.method != "frozen"
    }
    return [checkpoints.BACKBONES[name] for name in sorted(names) if name in checkpoints.BACKBONES]


def expectation(profile: Profile) -> str:
    """Markdown table of what each notebook of a profile is expected to take, by its own receipts and those of full."""
    past = history(profile, profile.results.relative_to(profile.root).as_posix(), "results")
    lines = [
        f"What `make reproduce PROFILE={profile.name}` takes per notebook, by the receipts of finished runs: hours",
        "of one thread, every run made anew. Runs that no finished run is like are `unknown` and not counted. Memory",
        "is the highest of a notebook's process; `make` runs two of them at a time.\n",
        "| notebook | runs | unknown | hours | peak memory, GB | to download, GB | editor tokens | money |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for notebook, runs in profile.notebooks.items():
        known = [cost for cost in (expected(cfg, past) for cfg in runs) if cost is not None]
        sums = total(known)
        spent = [
            f"{sums.seconds / 3600:.1f}",
            f"{sums.peak_mb / 1e3:.1f}",
            f"{sums.tokens:,.0f}",
            f"{sums.money:.2f}",
        ]
        hours, memory, tokens, money = spent if known else "----"
        download = f"{sum(w.bytes for w in needed(runs)) / 1e9:.1f}"
        cells = (
            notebook,
            len(runs),
            len(runs) - len(known),
            hours,
            memory,
            download,
            tokens,
            money,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + f"\n\n{', '.join(profile.reports)}: read records only, in seconds.\n"


def save_expectation(profile: Profile) -> Path:
    """Write the table of `expectation` beside the profile's results."""
    (path := profile.results / "expected.md").write_text(expectation(profile), encoding="utf-8")
    return path
