"""The grid: what experiments.toml may say, and when a job is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import RUNS, edit, finish, make, notebook

from nslora.config import RunConfig
from nslora.disk import write_sums
from nslora.experiments import grid
from nslora.runs.store import write_json, write_text
from nslora.tasks import bigbench
from nslora.tasks.build import build, phases
from nslora.types import UserError

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
BACKBONE = "smollm2-135m"
MORE = """
[[profiles.t.notebooks.good]]
study = "ablations"
backbones = ["b"]
tasks = ["facts", "style"]
rules = ["json", "bullet"]
methods = ["lora"]
seeds = [0, 1]
settings = { items = 5 }
"""


def append(root: Path, text: str) -> None:
    with (root / "experiments.toml").open("a") as file:
        file.write(text)


def test_blocks_expand_to_checked_runs(tmp_path):
    make(tmp_path, good=(RUNS,))
    append(tmp_path, MORE)
    profile = grid.load("t", tmp_path)
    first, more = [
        [c for c in profile.notebooks["good"] if c.backbone == backbone]
        for backbone in (BACKBONE, "b")
    ]
    assert [(c.task, c.rule, c.seed, c.items, c.moves) for c in more] == [
        ("facts", "end_phrase", 0, 5, 2),
        ("facts", "end_phrase", 1, 5, 2),
        *(("style", rule, seed, 5, 2) for rule in ("json", "bullet") for seed in (0, 1)),
    ]
    assert {c.lr for c in first} == {1e-3}
    assert {c.study for c in first} == {"main"}
    assert {c.study for c in more} == {"ablations"}
    assert [job.name for job in grid.jobs(profile)] == [
        f"good-{BACKBONE}-s0",
        "good-b-s0",
        "good-b-s1",
        "09_paper",
    ]


def test_a_run_belongs_to_one_study(tmp_path):
    make(tmp_path, good=(RUNS,), other=(RUNS,))
    assert (
        len({c.run_id for runs in grid.load("t", tmp_path).notebooks.values() for c in runs}) == 2
    )
    # the method's own targets by their name: other words for the same run
    again = MORE.replace('"b"', f'"{BACKBONE}"').replace("items = 5", 'targets = "gold"')
    append(tmp_path, again)
    with pytest.raises(UserError, match=r"facts-.*-lora-s0.* 'main' \(good\) and .* 'ablations'"):
        grid.load("t", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("profiles.t", "profiles.other", "unknown profile 't'; choose from other"),
        ("items = 3", "itemz = 3", "unknown setting 'itemz'"),
        ('methods = ["frozen"', 'method = ["frozen"', "unknown key 'method'"),
        ('study = "main"', "", "lacks the key 'study'"),
        ('study = "main"', 'study = "mine"', "unknown study 'mine'; choose from main"),
        ("notebooks.good", "notebooks.bad", "notebooks/bad.ipynb, which is missing"),
        ("[settings]", "[settings", "not valid TOML"),
        ("seeds = [0]", 'seeds = ["0"]', r"good\.0\.seeds\.0: input should be a valid integer"),
        ("job_minutes = 5", "job_minutes = 0", "job_minutes: input should be greater than 0"),
    ],
)
def test_wrong_experiments_get_one_sentence(tmp_path, old, new, words):
    make(tmp_path, good=(RUNS,))
    edit(tmp_path, old, new)
    with pytest.raises(UserError, match=words):
        grid.load("t", tmp_path)


def test_a_job_is_done_until_what_it_made_or_is_made_of_changes(tmp_path):
    make(tmp_path, good=(RUNS,))
    profile = grid.load("t", tmp_path)
    job, report = grid.jobs(profile)
    records = [finish(profile.store, cfg) for cfg in job.configs]
    for one in (job, report):
        write_json(one.record, {"identity": one.identity()})
        assert not one.done()
        write_text(one.executed, "")
        assert one.done()
    (records[0] / "run.json").write_text('{"new": 1}')
    assert not job.done()
    write_sums(records[0])
    assert job.done()
    assert not report.done()
    # a report shows what the trees say, too
    write_json(report.record, {"identity": report.identity()})
    assert report.done()
    (profile.trees / "tree").mkdir(parents=True)
    write_text(profile.trees / "tree" / "nodes.jsonl", "{}")
    assert not report.done()
    assert job.done()
    (records[0] / "scores.csv").unlink()
    assert not job.done()
    (records[0] / "scores.csv").write_text("more")
    assert not job.done()
    (records[0] / "scores.csv").write_text("")
    assert job.done()
    notebook(tmp_path, "good", RUNS + "pass")
    assert not job.done()


def test_the_committed_profiles_have_what_their_comments_say():
    quick, full, smoke = (grid.load(name, ROOT) for name in ("quick", "full", "smoke"))
    made = {c.method for runs in smoke.notebooks.values() for c in runs}
    # one of each kind; every decision is tested on a tiny model
    assert {"frozen", "lora", "textgrad", "neurosymbolic"} <= made
    assert {c.backbone for runs in smoke.notebooks.values() for c in runs} == {BACKBONE}
    assert len({c.run_id for runs in quick.notebooks.values() for c in runs}) <= 25
    assert min(c.seed for runs in full.notebooks.values() for c in runs) == 10
    assert full.results == ROOT / "results" / "full"


def test_every_task_of_the_committed_profiles_can_be_built():
    """A block once took dev items from its profile that left its test too few wordings: no run could have begun."""
    for name in ("smoke", "quick", "tuning", "full"):
        profile = grid.load(name, ROOT)
        for cfg in [*profile.runs, *profile.schedules]:
            # those of BIG-bench are fetched, and tested with their own sizes
            if cfg.task in bigbench.TASKS:
                continue
            for phase in range(phases(cfg)):
                task = build(cfg, phase)
                sizes = cfg.shares if cfg.task == "mixed" else (1,)
                assert len(task.test) >= sum(sizes) * cfg.test_items


@pytest.mark.parametrize("name", ["smoke", "quick", "full"])
def test_what_is_changed_in_a_run_has_the_unchanged_run_beside_it(name: str):
    """Else the tables of ablations, controls and baking leave it out."""
    runs = grid.load(name, ROOT).runs
    # a baked style prompt stands beside the prompt alone, and nothing
    alone = {"baking": ("textgrad", "frozen")}
    main = {(*where(cfg), cfg.method) for cfg in runs if cfg.study == "main"}
    for cfg in runs:
        if cfg.study in ("ablations", "controls", "baking"):
            for method in alone.get(cfg.study, (cfg.method,)):
                assert (*where(cfg), method) in main, cfg.run_id


def where(cfg: RunConfig) -> tuple[str, str, str, int]:
    return cfg.task, cfg.rule, cfg.backbone, cfg.seed


def test_no_family_of_the_confirmatory_trees_shares_a_seed_with_another():
    """Else they would ask about the same people."""
    families = {}
    for cfg in grid.load("full", ROOT).schedules:
        if cfg.task == "mixed":
            family = (cfg.rule, cfg.mix, cfg.items, cfg.lr)
            assert families.setdefault((cfg.backbone, cfg.seed), family) == family
