"""Tasks of BIG-bench: fetched from a real index over loopback, damaged on the way, graded, split."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from scripted import Scripted, lowercase
from tinymodel import config

from nslora import cache
from nslora.algorithm.session import Session
from nslora.config import TASKS, TUNING, RunConfig
from nslora.runs import run as runs
from nslora.tasks import bigbench, grading
from nslora.tasks.build import INITIAL, Task, build
from nslora.types import Example, Hidden, Item, Need, UserError

CANARY = "BENCHMARK DATA SHOULD NEVER APPEAR canary GUID 0123"
FILE = bigbench.SDIST.file
QUOTED = "('.*?')"
SPLITS = ("train", "dev", "test")
NAMES = list(bigbench.TASKS)


# ---- an archive with the layout of the real one


def single(name: str, examples: list[dict[str, Any]], **settings: str) -> dict[str, Any]:
    return {"canary": CANARY, "name": name, "examples": examples, **settings}


def chosen(question: str, *options: str) -> dict[str, Any]:
    return {"input": question, "target_scores": {o: int(i == 1) for i, o in enumerate(options)}}


def contents() -> dict[str, dict[str, Any]]:
    """Files of the archive by the path below the folder of tasks."""
    things = [f"I have {n} cats. How many?" for n in range(200)]
    counting = [{"input": q, "target": [f"word {n}", str(n)]} for n, q in enumerate(things)]
    words = [f"zebra{n} apple{n}" for n in range(200)]
    sorting = [{"input": w, "target": " ".join(sorted(w.split()))} for w in words]
    intents = [chosen(f"Utterance: play song {n}", "rate", "play") for n in range(200)]
    dates = [chosen(f"Day {n}?", "01/01/2001", f"{n:02}/02/2002") for n in range(200)]
    asked = [{"input": f"The country of person {n} is", "target": f"Land{n}"} for n in range(200)]
    asked += [
        {"input": "The capital of the US is", "target": "Washington, D.C."},
        {"input": "The genre of Weird Al is", "target": "comedy"},
        {"input": "The genre of Weird Al is", "target": ["parody", "comedy"]},
    ]
    prefixes = {"example_input_prefix": "\nList: ", "example_output_prefix": "\nSorted: "}
    files = {
        "object_counting/task.json": single("object_counting", counting),
        "word_sorting/task.json": single("word_sorting", sorting, task_prefix="Sort:", **prefixes),
        "intent_recognition/task.json": single("intent_recognition", intents),
        "date_understanding/task.json": single("date_understanding", dates),
        "qa_wikidata/task.json": single("qa_wikidata", asked, example_input_prefix="\n"),
        "mult_data_wrangling/task.json": {"canary": CANARY, "name": "mult_data_wrangling"},
        "chess/task.json": single("chess", [{"input": "e4", "target": "e5"}]),
    }
    prompts = {"example_input_prefix": "Input: ", "example_output_prefix": " Output: "}
    for domain in ("dates", "names", "times"):
        for nth in (1, 2):
            for style in (1, 2):
                name = f"get_{nth}_{domain}_{style}"
                rows = [f"{domain} {nth} {n}" for n in range(32)]
                examples = [{"input": f"'{row}'", "target": f"'{row[-2:]}.'"} for row in rows]
                files[f"mult_data_wrangling/{name}/task.json"] = single(
                    name, examples, output_regex=QUOTED, **prompts
                )
    return files


def pack(files: dict[str, dict[str, Any]]) -> bytes:
    """Return a source archive that holds these files, code that must not run, and ballast."""
    ballast = np.random.default_rng(0).bytes(300_000)
    members = {
        "setup.py": b"raise SystemExit('run')",
        "bigbench/__init__.py": b"raise SystemExit('imported')",
        "bigbench/benchmark_tasks/ballast.bin": ballast,
    }
    for path, data in files.items():
        members[f"bigbench/benchmark_tasks/{path}"] = json.dumps(data).encode()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"bigbench-1.0.0/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return raw.getvalue()


ARCHIVE = pack(contents())


# ---- an index on loopback


@dataclass
class Site:
    """What the index serves, and what it was asked.

    Attributes:
        cuts: of the next replies: how many bytes are sent of those that were announced.
        ranges: whether a part of the file may be asked for.
        asked: (path, range) of every request.
    """

    archive: bytes = ARCHIVE
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""

    @property
    def starts(self) -> list[str]:
        return [start for path, start in self.asked if path.endswith(".gz")]


class Index(BaseHTTPRequestHandler):
    """As much of a package index as one archive needs."""

    def __init__(self, site: Site, *args: Any) -> None:
        self.site = site
        super().__init__(*args)

    def do_GET(self) -> None:
        start = self.headers.get("Range", "")
        self.site.asked.append((self.path, start))
        if self.path == "/simple/bigbench/":
            links = [f'<a href="../../files/{name}#sha256=0">x</a>' for name in ("other.gz", FILE)]
            self.answer(200, "".join(links).encode(), "text/html")
        elif self.path == f"/files/{FILE}":
            first = int(start.removeprefix("bytes=").removesuffix("-")) if self.site.ranges else 0
            whole = self.site.archive[first:]
            cut = self.site.cuts.pop(0) if self.site.cuts else len(whole)
            self.answer(206 if self.site.ranges else 200, whole, "application/gzip", cut)
        else:
            self.send_error(404)

    def answer(self, status: int, body: bytes, kind: str, cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Pin the small archive in the place of the real one; return its tasks' files. The cache is empty."""
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(ARCHIVE).hexdigest()
    sdist = replace(bigbench.SDIST, sha256=digest, bytes=len(ARCHIVE))
    monkeypatch.setattr(bigbench, "SDIST", sdist)
    files = contents()
    kept = {}
    for task, source in bigbench.TASKS.items():
        # one wording of each problem
        members = sorted(path for path in files if path.startswith(task) and "_2/task" not in path)
        joined = b",".join(json.dumps(files[path]).encode() for path in members)
        kept[task] = b"[" + joined + b"]"
        digest = hashlib.sha256(kept[task]).hexdigest()
        monkeypatch.setitem(bigbench.TASKS, task, replace(source, sha256=digest))
    return kept


@pytest.fixture
def cached(pinned: dict[str, bytes]) -> None:
    """Put the tasks' files into the cache, as fetching does (which other tests show)."""
    for task, raw in pinned.items():
        path = bigbench._path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


@pytest.fixture
def site(pinned, monkeypatch: pytest.MonkeyPatch):
    """An index that pip is set to use."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, site))
    Thread(target=server.serve_forever, daemon=True).start()
    site.address = f"127.0.0.1:{server.server_port}/simple/"
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{site.address}")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///nowhere")
    yield site
    server.shutdown()
    server.server_close()


def left_in_cache() -> list[str]:
    return sorted(p.name for p in cache.cache_dir().iterdir() if p.suffix != ".lock")


def fetch() -> None:
    bigbench.draw("word_sorting", 1, np.random.default_rng(0))


# ---- fetching


def test_a_file_per_task_is_kept_and_the_archive_is_not(site, capsys) -> None:
    fetch()
    (folder,) = left_in_cache()
    kept = sorted(path.name for path in (cache.cache_dir() / folder).iterdir())
    assert kept == sorted(f"{name}.json" for name in NAMES)
    assert "100%" in capsys.readouterr().err, "progress is shown"
    asked = list(site.asked)
    assert len(asked) == 2
    for name in NAMES:
        build(config(task=name))
    assert site.asked == asked, "the index is not needed again"


def test_a_cut_download_goes_on_where_it_was_cut(site) -> None:
    site.cuts = [100_000, 50_000]
    fetch()
    assert site.starts == ["bytes=0-", "bytes=100000-", "bytes=150000-"]


def test_a_download_that_is_always_cut_is_refused_and_resumed_by_the_next(site) -> None:
    site.cuts = [40_000] * cache.ATTEMPTS
    with pytest.raises(UserError, match=rf"cannot fetch {FILE} \(.*complete") as error:
        fetch()
    assert "\n" not in str(error.value)
    assert left_in_cache() == [f"{FILE}.part"]
    fetch()
    assert site.starts[-1] == f"bytes={40_000 * cache.ATTEMPTS}-"


def test_a_truncated_archive_is_refused(site) -> None:
    site.archive = ARCHIVE[:-1000]
    with pytest.raises(UserError, match=rf"cannot fetch {FILE} \(truncated"):
        fetch()
    site.archive = ARCHIVE
    fetch()
    assert site.starts[-1] == f"bytes={len(ARCHIVE) - 1000}-"


def test_a_server_without_ranges_sends_it_from_its_beginning(site) -> None:
    site.ranges = False
    site.cuts = [100_000]
    fetch()
    assert len(site.starts) == 2


def test_an_archive_with_another_hash_is_refused_and_deleted(site) -> None:
    middle = len(ARCHIVE) // 2
    site.archive = ARCHIVE[:middle] + bytes([255 - ARCHIVE[middle]]) + ARCHIVE[middle + 1 :]
    with pytest.raises(UserError, match=rf"cannot fetch {FILE} \(checksum mismatch\)"):
        fetch()
    assert left_in_cache() == []
    site.archive = ARCHIVE
    fetch()


def test_a_download_that_was_not_checked_yet_is_checked(site) -> None:
    part = cache.cache_dir() / f"{FILE}.part"
    part.parent.mkdir()
    part.write_bytes(ARCHIVE)
    fetch()
    assert site.starts == []


def test_an_archive_that_an_interrupted_process_left_is_used(site) -> None:
    cache.cache_dir().mkdir()
    (cache.cache_dir() / FILE).write_bytes(ARCHIVE)
    fetch()
    assert site.asked == []


def test_an_index_that_has_nothing_is_one_sentence_without_its_password(site, monkeypatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:hunter2@{site.address}nothing")
    with pytest.raises(UserError, match="no package index lists it") as error:
        fetch()
    assert "hunter2" not in str(error.value) and "\n" not in str(error.value)
    asked = len(site.asked)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="no package index lists it"):
        fetch()
    assert len(site.asked) == asked


def test_the_second_index_is_asked_where_the_first_has_nothing(site, monkeypatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{site.address}nothing")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file:///nowhere http://{site.address}")
    fetch()


def test_an_index_that_cannot_be_reached_is_one_sentence(site, monkeypatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(UserError, match=rf"cannot fetch {FILE} \(\S.*\)") as error:
        fetch()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("harm", [b"", b"[]", ARCHIVE])
def test_a_damaged_file_is_named_and_made_anew(site, capsys, harm: bytes) -> None:
    fetch()
    path = next(cache.cache_dir().rglob("word_sorting.json"))
    good = path.read_bytes()
    path.write_bytes(harm)
    fetch()
    assert path.read_bytes() == good
    assert f"{path} is damaged" in capsys.readouterr().err


def test_an_archive_with_another_task_in_it_is_refused(site, monkeypatch) -> None:
    other = replace(bigbench.TASKS["word_sorting"], sha256="0" * 64)
    monkeypatch.setitem(bigbench.TASKS, "word_sorting", other)
    with pytest.raises(UserError, match="another word_sorting than expected"):
        fetch()


def test_a_full_disk_is_said_before_anything_is_fetched(site, monkeypatch) -> None:
    full = type("Usage", (), {"free": len(ARCHIVE) - 1})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="GB free"):
        fetch()
    assert site.asked == []


IN_A_PROCESS = """
import json, sys
from dataclasses import replace
from nslora.cache import Sdist
from nslora.config import RunConfig
from nslora.tasks import bigbench
from nslora.tasks.build import build
bigbench.SDIST = Sdist(**json.loads(sys.argv[1]))
for task, digest in json.loads(sys.argv[2]).items():
    bigbench.TASKS[task] = replace(bigbench.TASKS[task], sha256=digest)
for name in bigbench.TASKS:
    task = build(RunConfig(task=name, seed=3, items=5, test_items=7))
    print(*(e.id for e in (*task.train, *task.dev, *task.test)))
    print(*(e.id for _, e in task.pool))
"""


def test_two_processes_fetch_once_and_draw_the_same_examples(site) -> None:
    digests = {name: source.sha256 for name, source in bigbench.TASKS.items()}
    arguments = [json.dumps(asdict(bigbench.SDIST)), json.dumps(digests)]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", IN_A_PROCESS, *arguments], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert said[0] == said[1] and len(said[0].split()) > 6 * 17
    assert len(site.asked) == 2
    task = build(RunConfig(task=NAMES[0], seed=3, items=5, test_items=7))
    ids = [example.id for split in SPLITS for example in getattr(task, split)]
    assert said[0].splitlines()[0].split() == ids


# ---- grading


def ask(*accepted: str, pattern: str = bigbench.PATTERN) -> Item:
    example = Example("q", "What?", accepted[0])
    return Item(example, Hidden(grader="bigbench", accepted=accepted, pattern=pattern))


NINE = ask("nine", "9")


@pytest.mark.parametrize(
    ("item", "reply", "exact", "named"),
    [
        (NINE, "nine", 1, 1),
        (NINE, "9", 1, 1),
        # read to the first mark that ends a sentence
        (NINE, " 9.\nThat is because", 1, 1),
        (NINE, "nine; ten", 1, 1),
        (NINE, "Nine", 0, 1),
        (NINE, "You have nine.", 0, 1),
        (NINE, "9 objects", 0, 1),
        (NINE, "ninety", 0, 0),
        (NINE, "", 0, 0),
        (NINE, "...", 0, 0),
        (ask("'a.b'", pattern=QUOTED), "It is 'a.b', not 'c'.", 1, 1),
        (ask("'a.b'", pattern=QUOTED), "a.b", 0, 1),
        (ask("'a.b'", pattern=QUOTED), "'c' or 'a.b'", 0, 1),
        (ask("''", pattern=QUOTED), "It is ''", 1, 1),
        (ask("''", pattern=QUOTED), "", 0, 0),
        (ask("add_to_playlist"), "Add to playlist", 0, 1),
    ],
)
def test_the_reward_is_exact_match(item: Item, reply: str, exact: int, named: int) -> None:
    reward = bigbench.grade(item, reply)
    assert reward.value == reward.success == exact
    assert reward.parts == {"content": named, "content_strict": exact, "style": exact}
    expected = " or ".join(f"'{text}'" for text in item.hidden.accepted)
    assert reward.critique == ("" if exact else f"The expected reply is {expected}.")


def test_other_tasks_are_graded_as_before(cached) -> None:
    task = build(config(task="object_counting"))
    example = task.locality[0]
    reply = f"I think it is {example.answer}."
    item = Item(example, task.hidden[example.id])
    assert task.reward(example, reply) == grading.grade(item, reply)
    assert task.reward(example, reply).success == 1


# ---- examples


def test_the_tasks_have_names_in_the_settings() -> None:
    assert set(NAMES) < set(TASKS)


def everything(task: Task) -> list[Example]:
    return [example for split in SPLITS for example in getattr(task, split)]


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_drawn_by_the_seed_and_share_nothing(cached, name: str) -> None:
    cfg = config(task=name, items=8, test_items=20)
    task = build(cfg)
    assert [len(getattr(task, split)) for split in SPLITS] == [8, 8, 20]
    assert task.feedback == task.train and task.initial_prompt == INITIAL
    assert len(task.locality) >= 100 and len(task.promptability) >= 100
    examples = everything(task)
    assert len({e.id for e in examples}) == len({e.question for e in examples}) == 36
    assert {e.fact for e in examples} == {e.id for e in examples}
    groups = [{task.hidden[e.id].group for e in getattr(task, split)} for split in SPLITS]
    assert not groups[0] & groups[1] and not groups[2] & (groups[0] | groups[1])
    for example in examples:
        assert task.reward(example, example.answer).value == 1
        assert task.reward(example, "I do not know").value == 0
    assert task == build(cfg.but(method="lora", backbone="gemma3-270m"))
    assert task.test != build(cfg.but(seed=1)).test


@pytest.mark.parametrize("name", NAMES)
def test_what_is_tuned_on_is_never_asked_elsewhere(cached, name: str) -> None:
    cfg = config(task=name, items=8, test_items=20)
    asked, tuned = (
        {e.question for seed in seeds for e in everything(build(cfg.but(seed=seed)))}
        for seeds in (range(6), range(TUNING, TUNING + 6))
    )
    assert len(asked) >= 36 and not asked & tuned


@pytest.mark.parametrize("name", NAMES)
def test_no_canary_is_passed_on(cached, name: str) -> None:
    task = build(config(task=name, items=8, test_items=20))
    assert "canary" not in json.dumps([asdict(e) for e in everything(task)])
    assert "canary" not in json.dumps(task.dataset("test").to_list())
    assert all("canary" in file for file in bigbench._read(name)), "the files have one"


def questions(name: str, **settings: int) -> dict[str, tuple[str, ...]]:
    """Return the accepted replies of a task's examples by question."""
    task = build(config(**{"task": name, "items": 25, "test_items": 50, **settings}))
    return {e.question: task.hidden[e.id].accepted for e in everything(task)}


def test_questions_are_posed_as_the_files_say() -> None:
    (item,) = bigbench._items(
        "word_sorting",
        single(
            "word_sorting",
            [{"input": "b a", "target": "a b"}],
            task_prefix="Sort:",
            example_input_prefix="\nList: ",
            example_output_prefix="\nSorted: ",
        ),
    )
    assert item.example.question == "Sort:\nList: b a\nSorted:"
    assert item.hidden.need is Need.BOTH and item.hidden.pattern == bigbench.PATTERN


def test_the_best_option_is_the_target_and_several_targets_are_accepted(cached) -> None:
    assert set(questions("intent_recognition").values()) == {("play",)}
    counting = questions("object_counting")
    assert counting["I have 4 cats. How many?"] == ("word 4", "4")


def test_equal_questions_are_one_example_and_unreachable_targets_are_left_out() -> None:
    data = contents()["qa_wikidata/task.json"]
    accepted = {i.example.question: i.hidden.accepted for i in bigbench._items("qa_wikidata", data)}
    assert accepted["The genre of Weird Al is"] == ("comedy", "parody")
    assert "The capital of the US is" not in accepted
    assert len(accepted) == 201


def test_data_wrangling_asks_one_problem_of_each_domain_it_needs(cached) -> None:
    problems: dict[bool, set[str]] = {False: set(), True: set()}
    for seed in (*range(8), *range(TUNING, TUNING + 8)):
        task = build(config(task="mult_data_wrangling", seed=seed, items=10, test_items=20))
        ids = {e.id.partition(":")[0] for e in everything(task)}
        # two problems of 32 examples hold 40
        assert len(ids) == len({name.split("_")[-2] for name in ids}) == 2
        assert all(name.endswith("_1") for name in ids), "one wording"
        problems[seed >= TUNING] |= ids
    assert len(problems[False]) == len(problems[True]) == 3, "any problem may be drawn"
    assert not problems[False] & problems[True]
    hidden = task.hidden[task.test[0].id]
    assert hidden.pattern == QUOTED and hidden.need is Need.STYLE


@pytest.mark.parametrize(
    ("name", "most"), [("object_counting", 100), ("qa_wikidata", 101), ("mult_data_wrangling", 96)]
)
def test_too_many_examples_are_one_sentence(cached, name: str, most: int) -> None:
    assert build(config(task=name, items=20, test_items=most - 40))
    with pytest.raises(UserError, match=f"must be at most {most} for {name}") as error:
        build(config(task=name, items=20, test_items=most - 39))
    assert "\n" not in str(error.value)


# ---- runs


def test_only_what_the_frozen_weights_do_not_know_is_asked(cached, tiny, memo, tmp_path) -> None:
    cfg = config(task="qa_wikidata", backbone=tiny.name, items=3, test_items=4, max_new_tokens=24)
    task = build(cfg)
    assert len(task.pool) == bigbench.SPARE * 10
    prompt, _ = task.pool[0]
    texts = [tiny.text(prompt, example.question) for _, example in task.pool]
    replies = {
        example.id: reply.text
        for (_, example), reply in zip(
            task.pool, tiny.generate(texts, cfg.max_new_tokens), strict=True
        )
    }
    # every second reply of the random model counts as an answer
    words = {id_: grading.normalise(text) for id_, text in replies.items()}
    known = [id_ for id_, said in list(words.items())[::2] if said]
    assert len(known) > 20
    hidden = {id_: replace(task.hidden[id_], accepted=(words[id_],)) for id_ in known}
    task = replace(task, hidden={**task.hidden, **hidden})

    run = Session(cfg, task, tiny, Scripted(lowercase), tmp_path, memo)
    assert [len(getattr(run.task, split)) for split in SPLITS] == [3, 3, 4]
    unknown = [example for _, example in task.pool if example.id not in known]
    assert everything(run.task) == unknown[:10]
    assert run.task.feedback == run.task.train and run.task.pool == ()
    assert run.bill().generated_tokens == 0, "choosing the data is not the method's cost"

    task = replace(task, pool=task.pool[:14])
    with pytest.raises(UserError, match="knows too much"):
        Session(cfg, task, tiny, Scripted(lowercase), tmp_path, memo)


def test_answers_longer_than_the_longest_reply_are_one_sentence(cached, tiny, store) -> None:
    cfg = config(task="word_sorting", backbone=tiny.name)
    with (
        Scripted(lowercase) as editor,
        pytest.raises(UserError, match=r"have up to \d\d tokens: max_new_tokens = 6 is") as error,
    ):
        runs.make_run(cfg, store, editor, tiny)
    assert "\n" not in str(error.value)
    # other tasks only have to name the answer
    facts = cfg.but(task="facts")
    runs.require_lengths(facts, build(facts), tiny)


@pytest.mark.parametrize("name", ["object_counting", "qa_wikidata"])
def test_a_run_publishes_no_canary(cached, tiny, store, name: str) -> None:
    settings = {"method": "fixed:SN", "moves": 2, "gate": False, "returned": "tuned"}
    cfg = config(task=name, backbone=tiny.name, max_new_tokens=12, **settings)
    with Scripted(lowercase) as editor:
        record = runs.make_run(cfg, store, editor, tiny, watch=lambda step: None)
    texts = [path.read_text(encoding="utf-8") for path in record.iterdir()]
    assert "bigbench" not in record.name and not any("canary" in text for text in texts)
    final = json.loads((record / "run.json").read_text())["final"]
    assert final["test"]["n"] == 2 and 0 <= final["test"]["success"] <= 1


def test_the_real_archive_fills_the_sizes_of_the_study() -> None:
    for name in NAMES:
        task = build(RunConfig(task=name, items=24, dev_items=36, test_items=72))
        examples = everything(task)
        assert len({e.question for e in examples}) == 132
        assert all(task.reward(e, e.answer).value == 1 for e in examples)
        assert "canary GUID" not in json.dumps([asdict(e) for e in examples])
