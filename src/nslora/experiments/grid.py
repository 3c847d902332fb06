"""Read the grid of experiments.toml: which runs belong to which notebook, and which are done.

A *job* is one notebook on one backbone at one seed, with the runs that experiments.toml gives it. A
*report* is a notebook without runs of its own; it reads the records of all others.
"""

import hashlib
import json
import re
import time
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveFloat, ValidationError

from nslora.config import RunConfig
from nslora.disk import sha256
from nslora.experiments.registration import require_frozen_code
from nslora.runs.store import Store, append_json, read_json
from nslora.types import Json, UserError

STUDIES = (
    "main",
    "stream",
    "data-efficiency",
    "ablations",
    "baking",
    "controls",
    "schedules",
)
REQUIRED = {"study", "backbones", "tasks", "methods", "seeds"}
OPTIONAL = {"rules", "settings", "variants"}
Settings = dict[str, Any]
# warnings of libraries to each other, about which a reader can do nothing
NOISE = "IProgress not found|`is_gradient_checkpointing` is deprecated"


class Block(BaseModel):
    """What a block of experiments.toml may hold; which keys, `_check_block` knows."""

    study: str = ""
    backbones: list[str] = []
    tasks: list[str] = []
    methods: list[str] = []
    seeds: list[int] = []
    rules: list[str] = []
    settings: Settings = {}
    variants: list[Settings] = []


class Section(BaseModel):
    """What a profile of experiments.toml may hold."""

    results: str = ""
    job_minutes: PositiveFloat = 1
    settings: Settings = {}
    notebooks: dict[str, list[Block]] = {}
    schedules: list[Block] = []


class Experiments(BaseModel):
    """What experiments.toml may hold; values are checked by RunConfig."""

    reports: list[str] = []
    settings: Settings = {}
    backbones: dict[str, Settings] = {}
    profiles: dict[str, Section] = {}


# tasks that have a style rule
RULED = ("style", "mixed", "stream")


@dataclass(frozen=True)
class Profile:
    """One profile of experiments.toml, resolved.

    Attributes:
        root: folder of the project; results: of its records, tables, figures and notebooks.
        limit_s: wall-clock limit of one job.
        notebooks: the runs of each notebook, in the order they are made.
        schedules: instances of which every schedule is tried (`experiments.schedules`).
        reports: notebooks without runs.
    """

    name: str
    root: Path
    results: Path
    limit_s: float
    notebooks: dict[str, tuple[RunConfig, ...]]
    reports: tuple[str, ...]
    schedules: tuple[RunConfig, ...] = ()

    @property
    def work(self) -> Path:
        """The folder of what is not a result: job records, logs, unfinished runs, checkpoints."""
        return self.root / "runs" / self.name

    @property
    def runs(self) -> list[RunConfig]:
        """The runs of all notebooks; one that two of them name comes twice."""
        return [cfg for runs in self.notebooks.values() for cfg in runs]

    @property
    def unnamed(self) -> list[str]:
        """Records of runs that experiments.toml does not name, or no longer: tables count them, too."""
        named = {cfg.run_id for cfg in self.runs}
        folders = self.results.glob("records/*/")
        return sorted(f.name for f in folders if f.name not in named and f.suffix != ".part")

    @property
    def trees(self) -> Path:
        """The folder of schedule trees, which all profiles share."""
        return self.root / "results" / "schedules"

    @property
    def store(self) -> Store:
        """The store of its runs: records in `results`, checkpoints under `work`."""
        return Store(self.results, self.work / "runs")

    @property
    def finished(self) -> list[Json]:
        """Runs finished in this working folder, oldest first: run, job, seconds, success."""
        path = self.work / "progress.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        entries = []
        for line in lines.split("\n"):
            # half a line of a process that was killed tells nothing
            with suppress(ValueError):
                entries.append(json.loads(line))
        return entries


@dataclass(frozen=True)
class Job:
    """One notebook on one backbone at one seed; a report has no backbone."""

    profile: Profile
    notebook: str
    backbone: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """The file name of everything that belongs to the job."""
        run = f"-{self.backbone}-s{self.seed}" if self.backbone else ""
        return re.sub(r"[^\w.-]", "_", self.notebook + run)

    @property
    def source(self) -> Path:
        """The notebook as committed."""
        return self.profile.root / "notebooks" / f"{self.notebook}.ipynb"

    @property
    def executed(self) -> Path:
        """The notebook with its outputs, as published."""
        return self.profile.results / "notebooks" / f"{self.name}.ipynb"

    @property
    def record(self) -> Path:
        """The record that says it is done."""
        return self.profile.work / "jobs" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """What its process said."""
        return self.profile.work / "logs" / f"{self.name}.log"

    @property
    def configs(self) -> list[RunConfig]:
        """Its runs, in the order they are made."""
        runs = self.profile.notebooks.get(self.notebook, ())
        return [c for c in runs if (c.backbone, c.seed) == (self.backbone, self.seed)]

    @property
    def parameters(self) -> dict[str, str | int]:
        """The values of the notebook's cell tagged "parameters"."""
        run = {"backbone": self.backbone, "seed": self.seed} if self.backbone else {}
        return {"profile": self.profile.name, **run}

    def identity(self) -> str:
        """Hash what the job does: the notebook's cells, its parameters, and its runs.

        For a report, all run records and trees take the place of its runs.
        """
        cells = [cell["source"] for cell in read_json(self.source)["cells"]]
        if self.backbone:
            inputs = [cfg.run_id for cfg in self.configs]
        else:
            receipts = sorted(self.profile.results.glob("records/*/run.json"))
            trees = sorted(self.profile.trees.glob("*/nodes.jsonl"))
            # a report is stale once any of them is new or made anew
            inputs = [f"{path.parent.name} {sha256(path)}" for path in [*receipts, *trees]]
        text = json.dumps([cells, self.parameters, inputs])
        return hashlib.sha256(text.encode()).hexdigest()

    def done(self) -> bool:
        """Tell whether this very job has finished here, and what it made is still there."""
        if not (self.record.exists() and self.executed.exists()):
            return False
        try:
            same = read_json(self.record)["identity"] == self.identity()
        except (ValueError, KeyError, TypeError):
            # a damaged record says nothing, and the job is done again
            return False
        return same and all(map(self.profile.store.done, self.configs))


def find_root() -> Path:
    """Return the nearest folder at or above the working directory that has an experiments.toml.

    Elsewhere it is the checkout of this file. Raises UserError if that has none.
    """
    here = Path.cwd()
    checkout = Path(__file__).resolve().parents[3]
    # an editable install finds its own project from anywhere
    for folder in (here, *here.parents, checkout):
        if (folder / "experiments.toml").is_file():
            return folder
    raise UserError(f"no experiments.toml at or above {here}.")


def load(name: str, root: Path | None = None) -> Profile:
    """Read one profile of experiments.toml and check all of it; raises UserError."""
    root = root or find_root()
    try:
        table = tomllib.loads((root / "experiments.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"experiments.toml is not valid TOML: {error}.") from None
    try:
        Experiments.model_validate(table, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"experiments.toml, {where}: {problem['msg'].lower()}.") from None
    profiles = table.get("profiles", {})
    if name not in profiles:
        raise UserError(f"unknown profile {name!r}; choose from {', '.join(profiles)}.")
    profile = profiles[name]
    runs = {
        notebook: [cfg for block in blocks for cfg in _expand(block, table, profile)]
        for notebook, blocks in profile.get("notebooks", {}).items()
    }
    _check_studies(runs)
    reports = tuple(table.get("reports", ()))
    for notebook in (*runs, *reports):
        if not (root / "notebooks" / f"{notebook}.ipynb").is_file():
            raise UserError(f"experiments.toml names notebooks/{notebook}.ipynb, which is missing.")
    return Profile(
        name=name,
        root=root,
        results=root / profile.get("results", f"runs/{name}/results"),
        limit_s=60.0 * profile.get("job_minutes", 60),
        # a run that two blocks of a notebook name is made once
        notebooks={n: tuple({cfg.run_id: cfg for cfg in c}.values()) for n, c in runs.items()},
        reports=reports,
        schedules=tuple(
            cfg for block in profile.get("schedules", []) for cfg in _expand(block, table, profile)
        ),
    )


def _expand(block: Json, table: Json, profile: Json) -> Iterator[RunConfig]:
    """Yield the runs of one block: the product of its lists; raises UserError for a wrong key."""
    _check_block(block)
    variants = block.get("variants", [{}])
    for backbone, task in product(block["backbones"], block["tasks"]):
        # later ones win
        common = {
            **table.get("settings", {}),
            **table.get("backbones", {}).get(backbone, {}),
            **profile.get("settings", {}),
            **block.get("settings", {}),
            "study": block["study"],
            "backbone": backbone,
            "task": task,
        }
        rules = [{}]
        if task in RULED and "rules" in block:
            rules = [{"rule": rule} for rule in block["rules"]]
        grid = product(rules, block["seeds"], variants, block["methods"])
        for rule, seed, variant, method in grid:
            yield RunConfig.of({**common, **rule, **variant, "seed": seed, "method": method})


def _check_block(block: Json) -> None:
    if wrong := sorted(set(block) - REQUIRED - OPTIONAL):
        raise UserError(f"a block of experiments.toml has the unknown key {wrong[0]!r}.")
    if missing := sorted(REQUIRED - set(block)):
        raise UserError(f"a block of experiments.toml lacks the key {missing[0]!r}.")
    if block["study"] not in STUDIES:
        raise UserError(f"unknown study {block['study']!r}; choose from {', '.join(STUDIES)}.")


def _check_studies(runs: dict[str, list[RunConfig]]) -> None:
    """Raise UserError where one run is given to two studies: a receipt names one."""
    # run_id -> the study and the notebook that named it first
    first: dict[str, tuple[str, str]] = {}
    for notebook, configs in runs.items():
        for cfg in configs:
            study, where = first.setdefault(cfg.run_id, (cfg.study, notebook))
            if study != cfg.study:
                raise UserError(
                    f"experiments.toml makes the run {cfg.run_id} in study {study!r} ({where}) "
                    f"and in study {cfg.study!r} ({notebook})."
                )


def configs(profile: str, notebook: str, backbone: str, seed: int) -> list[RunConfig]:
    """Return the runs of one notebook on one backbone at one seed; UserError if there are none."""
    runs = Job(load(profile), notebook, backbone, seed).configs
    if not runs:
        raise UserError(
            f"profile {profile!r} has no runs of {notebook!r} on {backbone!r} at seed {seed} "
            "in experiments.toml."
        )
    return runs


def jobs(profile: Profile) -> list[Job]:
    """Return all jobs of a profile in order, reports last."""
    found = [
        Job(profile, notebook, cfg.backbone, cfg.seed)
        for notebook, runs in profile.notebooks.items()
        for cfg in runs
    ]
    reports = [Job(profile, notebook) for notebook in profile.reports]
    # each once, by its name
    return list({job.name: job for job in found + reports}.values())


def run_all(profile: str, notebook: str, backbone: str, seed: int) -> list[Path]:
    """Make the missing runs of a notebook; return the folders of all its records.

    Runs share one backbone and one editor. Each run prints one line, and each that is made here
    appends one to `runs/<profile>/progress.jsonl`, for the process that started the notebook's.
    """
    job = Job(load(profile), notebook, backbone, seed)
    store = job.profile.store
    runs = configs(profile, notebook, backbone, seed)
    missing = [cfg for cfg in runs if not store.done(cfg)]
    if missing:
        # a notebook may be opened by hand, and workers have checkouts of their own
        require_frozen_code(job.profile.root, job.profile.name)
    # the editor and the backbone are the slow things to open
    for _, group in groupby(missing, lambda cfg: (cfg.editor_model, cfg.editor_url, cfg.threads)):
        _run_group(list(group), job)
    for cfg in runs:
        print(f"{cfg.run_id}: test success {_success(store.record(cfg)):.2f}")
    return [store.record(cfg) for cfg in runs]


def _run_group(runs: list[RunConfig], job: Job) -> None:
    """Make runs that share a backbone and an editor."""
    warnings.filterwarnings("ignore", NOISE)
    from nslora.model.backbone import load as load_backbone
    from nslora.runs.run import make_run, open_editor

    store = job.profile.store
    # equal requests of these runs are answered from the recordings
    with open_editor(runs[0], store) as editor:
        backbone = load_backbone(runs[0].backbone, threads=runs[0].threads)
        for cfg in runs:
            start = time.monotonic()
            record = make_run(cfg, store, editor, backbone, watch=lambda step: None)
            entry = {
                "run": cfg.run_id,
                "job": job.name,
                "seconds": time.monotonic() - start,
                "success": _success(record),
            }
            append_json(job.profile.work / "progress.jsonl", entry)


def _success(record: Path) -> float:
    """Return the share of test items that a finished run's candidate gets right."""
    return read_json(record / "run.json")["final"]["test"]["success"]
