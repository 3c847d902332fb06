"""Six real tasks of BIG-bench (Srivastava et al., arXiv 2206.04615; Apache-2.0), graded by its own exact match.

The package index carries them as the source archive of `bigbench`, which is data here: never
installed, never imported, never run. Of the archive one file per task stays in the cache, pinned by its
SHA-256, and a damaged one is made anew:

    bigbench-<first 8 digits of the archive's SHA-256>/<task>.json    a JSON array of the task's files
    bigbench-1.0.0.tar.gz                                             while these are made

Questions are posed as BIG-bench poses them without examples, but for its "Q:" and "A:": a chat has
turns. The tasks whose reply is one of several options are asked without options, and the right one is
the target. Nothing else of the files is passed on, their canary string least of all.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nslora.cache import Sdist, cache_dir, fetch_sdist, lock, require_disk, sha256
from nslora.tasks.grading import normalise
from nslora.types import Example, Hidden, Item, Need, Reward, UserError

SDIST = Sdist(
    name="bigbench",
    version="1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    bytes=358249635,
)
# what of a reply BIG-bench compares, unless a task has a pattern of its own
PATTERN = r"[^\.\?\!\;\n]+"
# examples offered per example wanted, where those that the backbone knows are left out
SPARE = 8


@dataclass(frozen=True)
class Source:
    """One task.

    Attributes:
        sha256: of its file in the cache.
        need: what its examples mostly ask for.
        unknown: whether a run takes only the examples whose answer its frozen backbone does not name.
        problems: whether it is made of small problems, each about a kind of text (its domain).
    """

    sha256: str
    need: Need
    unknown: bool = False
    problems: bool = False


TASKS = {
    "object_counting": Source(
        "2b499350011a693a7ebdf54a6cdad301c4b5c90c9f54709a4746faa7fc2081d2", Need.BOTH
    ),
    "word_sorting": Source(
        "82e7e3c2e762096432c86a5545c99aeac840903c16435f7c6c688e08d4842c0d", Need.BOTH
    ),
    "intent_recognition": Source(
        "ed45144392437f8a42aeefb8893dbddfa9c5149fa53079beb8e9a1e419da8309", Need.BOTH
    ),
    "date_understanding": Source(
        "634a662a4f18e08d2d207ca0ab994b992dfb0509c95755b6283c149ce2b1e519", Need.BOTH
    ),
    "mult_data_wrangling": Source(
        "76cf493e90f5ac9cbfb2e34031d6d4582140808fb072af75cba8c4596b7bfccf",
        Need.STYLE,
        problems=True,
    ),
    "qa_wikidata": Source(
        "49338c19f837d26a1cc352cf542348152451f1cb23841477680de1cc85fbe100",
        Need.CONTENT,
        unknown=True,
    ),
}
# a problem is there in two wordings of the same rows, of which the first is kept
MEMBER = re.compile(rf"[^/]+/bigbench/benchmark_tasks/({'|'.join(TASKS)})/(?:\w+_1/)?task\.json")

Data = dict[str, Any]  # a file of the archive


# ---- examples


def draw(task: str, count: int, rng: np.random.Generator, tuning: bool = False) -> list[Item]:
    """Return `count` examples of a task in random order; more where known ones are left out later.

    They are of the half that is for `tuning`, or of the other. Raises UserError when it has fewer.
    """
    source = TASKS[task]
    files = _read(task)
    half = slice(int(tuning), None, 2)
    if source.problems:
        items: list[Item] = []
        for data in _one_of_each_domain(files, half, rng):
            # as few problems as do
            if len(items) < count:
                items += _items(task, data)
    else:
        items = [item for data in files for item in _items(task, data)][half]
    if len(items) < count:
        raise UserError(f"items + dev_items + test_items must be at most {len(items)} for {task}.")
    wanted = SPARE * count if source.unknown else count
    return [items[i] for i in rng.permutation(len(items))[:wanted]]


def _one_of_each_domain(files: Sequence[Data], half: slice, rng: np.random.Generator) -> list[Data]:
    """Return one problem of each domain, of a `half` of its problems, in random order.

    No question says what is to be done with a text, so that its domain must tell.
    """
    problems: dict[str, list[Data]] = defaultdict(list)
    for data in files:
        # the parent of the problems has no examples
        if "examples" in data:
            # a name like get_day_2_dates_1
            domain = data["name"].split("_")[-2]
            problems[domain].append(data)
    domains = rng.permutation(sorted(problems))
    halves = [problems[domain][half] for domain in domains]
    return [problems[rng.integers(len(problems))] for problems in halves]


def _items(task: str, data: Data) -> list[Item]:
    """Return the examples of one file, equal questions joined."""
    pattern = data.get("output_regex", PATTERN)
    before = data.get("task_prefix", "") + data.get("example_input_prefix", "")
    after = data.get("example_output_prefix", "")
    targets: dict[str, list[str]] = defaultdict(list)
    for example in data["examples"]:
        question = f"{before}{example['input']}{after}".strip()
        targets[question] += _targets(example)

    items = []
    for i, (question, right) in enumerate(targets.items()):
        # BIG-bench reads a reply to its first full stop, so that none gives words like "u.s.a"
        accepted = tuple(
            text for text in dict.fromkeys(right) if _read_reply(text, pattern) == text
        )
        if accepted:
            name = f"{data['name']}:{i}"
            example = Example(name, question, accepted[0], fact=name)
            hidden = Hidden((), TASKS[task].need, name, "bigbench", accepted, pattern)
            items.append(Item(example, hidden))
    return items


def _targets(example: Data) -> list[str]:
    """Return the right replies of an example: its targets, or its best options."""
    if "target" in example:
        target = example["target"]
        return [target] if isinstance(target, str) else target
    scores = example["target_scores"]
    best = max(scores.values())
    return [option for option, score in scores.items() if score == best]


# ---- grading


def grade(item: Item, reply: str) -> Reward:
    """Return the reward of a reply: BIG-bench's `exact_str_match`, and a critique that names the targets.

    The first match of the task's pattern in the reply must be a target, letter by letter. The parts are
    for reports: `content` tells whether a target stands in the reply as whole words, `content_strict`
    and `style` repeat the reward.
    """
    accepted = item.hidden.accepted
    exact = float(_read_reply(reply, item.hidden.pattern) in accepted)
    words = f" {normalise(reply)} "
    # a target without words, such as "''", is not named by an empty reply
    names = {normalise(text) for text in accepted} - {""}
    named = any(f" {name} " in words for name in names)
    expected = " or ".join(f"'{text}'" for text in accepted)
    critique = "" if exact else f"The expected reply is {expected}."
    parts = {"content": float(named or exact), "content_strict": exact, "style": exact}
    return Reward(exact, critique, parts)


def _read_reply(reply: str, pattern: str) -> str:
    """Return what BIG-bench compares of a reply: the first match of `pattern`, else nothing."""
    # a chat's reply starts in a turn of its own, so white space around it says nothing
    match = re.search(pattern, reply.strip())
    return match[0] if match else ""


# ---- files


def _read(task: str) -> list[Data]:
    """Return the files of a task, fetched first if need be. Raises UserError when that fails."""
    path = _path(task)
    if not _is_whole(path):
        with lock(SDIST.name):
            # another process may have made it meanwhile
            if not _is_whole(path):
                _make_files()
    return json.loads(path.read_bytes())


def _path(task: str) -> Path:
    return cache_dir() / f"{SDIST.name}-{SDIST.sha256[:8]}" / f"{task}.json"


def _is_whole(path: Path) -> bool:
    """Return whether a task's file is there as it was made; say so where it is damaged."""
    if not path.exists():
        return False
    whole = sha256(path) == TASKS[path.stem].sha256
    if not whole:
        print(f"{path} is damaged: making it anew", file=sys.stderr)
    return whole


def _make_files() -> None:
    """Make every task's file of the archive, fetched first unless an interrupted process left it whole."""
    archive = cache_dir() / SDIST.file
    if not archive.exists():
        require_disk(SDIST.bytes, f"fetching {SDIST.name}")
        fetch_sdist(SDIST, archive)
    for task, members in _members(archive).items():
        path = _path(task)
        path.parent.mkdir(exist_ok=True)
        new = path.with_suffix(".new")
        new.write_bytes(b"[" + b",".join(members) + b"]")
        new.replace(path)
        if not _is_whole(path):
            raise UserError(f"{SDIST.file} holds another {task} than expected.")
    archive.unlink()


def _members(archive: Path) -> dict[str, list[bytes]]:
    """Return the files of each task in order of their paths. They are read, never extracted."""
    contents: dict[str, dict[str, bytes]] = {task: {} for task in TASKS}
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            match = MEMBER.fullmatch(member.name)
            stream = members.extractfile(member) if match else None
            if match and stream:
                contents[match[1]][member.name] = stream.read()
    return {task: [files[name] for name in sorted(files)] for task, files in contents.items()}
