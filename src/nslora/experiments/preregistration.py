"""Pre-registration: what a confirmatory study will run and claim, written down before it is run.

`nslora freeze` writes results/preregistration.toml: the claims with their bounds, the statistics, every
run and instance, the tuning trees that rivals are chosen on, and two hashes: of the code that a run
executes, and of the code that judges. From then on other code makes no run of the study, and `nslora
verify` names every record, tree, claim and change of the judging code that is not what was registered.
Whoever has to mend what judges says so in results/amendments.toml, and so whoever gives up a run or a tree
that cannot be made (`abandoned` with its name instead of `judge`):

    [[amendments]]
    date = "2026-12-01"
    judge = "the hash that `nslora verify` says"
    why = "What was wrong, and which verdicts it changes."
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import nslora
from nslora.config import TUNING
from nslora.disk import saving
from nslora.experiments.grid import Profile
from nslora.experiments.registration import SEAL, path_of, read
from nslora.runs.store import code, git, read_json
from nslora.study import claims
from nslora.study.records import amendments
from nslora.study.schedules import load as load_trees
from nslora.types import UserError

# what turns records into verdicts: routers decide on trees when these are judged
JUDGES = (
    "config.py",
    "types.py",
    "disk.py",
    "runs/store.py",
    "tasks/bigbench.py",
    "algorithm/monitor.py",
    "algorithm/router.py",
    "study/claims.py",
    "study/classifier.py",
    "study/records.py",
    "study/stats.py",
    "study/stream.py",
    "study/schedules/__init__.py",
    "study/schedules/answers.py",
    "study/schedules/routers.py",
    "study/schedules/trees.py",
)
STATISTICS = (
    "A claim holds on a backbone if each of its comparisons does, and altogether if it holds on every backbone "
    "(intersection-union). A comparison is a Student's t interval of 95% over seed or instance means, its variance "
    "floored by the sampling variance of the items, which are clustered by fact. P-values are adjusted by Holm over "
    "all claims, of which those that are not wholly made count as lost. All seeds count."
)


def freeze(profile: Profile) -> Path:
    """Write the pre-registration of a profile, of which nothing has been run yet; return its path.

    Raises UserError where there is a pre-registration, where the code is not that of a commit, where a seed is one of
    tuning, where something has been run, and where tuning trees, which rivals are chosen on, are missing or of other
    code.
    """
    path = path_of(profile.root)
    if path.exists():
        raise UserError(f"{path} is there: a study is registered once.")
    # a new file in src/ would be executed, too
    changes = (
        ("status", "--porcelain", "--untracked-files=no"),
        ("status", "--porcelain", "--", ":/src"),
        # and a clone would lack a new tree
        ("status", "--porcelain", "--", ":/results/schedules"),
    )
    if any(git(*asked) for asked in changes):
        raise UserError("commit your changes first: a study is made by the code of one commit.")
    listed = registered(profile)
    settings = [*profile.runs, *profile.schedules]
    if tuned := [cfg.run_id for cfg in settings if cfg.is_tuning]:
        raise UserError(f"{tuned[0]} has a seed of tuning ({TUNING} or more).")
    if begun := sorted(receipts(profile)):
        raise UserError(f"{begun[0].parent} is there: what is known cannot be registered.")
    require_tuning(profile)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(profile, listed), encoding="utf-8")
    return path


def registered(profile: Profile) -> dict[str, list[str]]:
    """Return the names of a profile's runs and of its trees."""
    return {
        "runs": sorted({cfg.run_id for cfg in profile.runs}),
        # a run's name does not hold its study
        "studies": sorted({f"{cfg.study} {cfg.run_id}" for cfg in profile.runs}),
        "trees": sorted(cfg.run_id for cfg in profile.schedules),
        "tuning": tuning_trees(profile),
    }


def tuning_trees(profile: Profile) -> list[str]:
    """Return the name of each tree of seeds of tuning with the SHA-256 of its files."""
    trees = [path.parent for path in sorted(profile.trees.glob("*/instance.json"))]
    return [
        f"{tree.name} {digest([tree / 'instance.json', tree / 'nodes.jsonl'])}"
        for tree in trees
        if _split(tree / "instance.json") == "tuning"
    ]


def require_tuning(profile: Profile) -> None:
    """Raise UserError unless each backbone of the trees has a finished one of tuning, all of them of this code."""
    trees = load_trees(profile.trees, "tuning")
    if lacking := {cfg.backbone for cfg in profile.schedules} - {*trees.instances.backbone}:
        raise UserError(
            f"no tree of tuning is finished on {min(lacking)}: rivals are chosen on them."
        )
    for path in sorted(profile.trees.glob("*/instance.json")):
        about = read_json(path)
        if about["split"] == "tuning" and about["environment"]["code"] != code():
            raise UserError(
                f"{path.parent} is of other code than this: grow it anew, or take it away."
            )


def judge() -> str:
    """Return the SHA-256 of the code that judges (JUDGES)."""
    return digest([Path(nslora.__file__).parent / name for name in JUDGES])


def digest(paths: list[Path]) -> str:
    """Return the SHA-256 of files one after the other; a missing one is empty."""
    contents = [path.read_bytes() if path.exists() else b"" for path in paths]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def text(profile: Profile, listed: dict[str, list[str]]) -> str:
    """Return the pre-registration as TOML. Its strings and lists are JSON, which is TOML, too."""
    head = {
        "profile": profile.name,
        "results": os.path.relpath(profile.results, profile.root),
        "date": datetime.now(UTC).date().isoformat(),
        "revision": git("rev-parse", "HEAD"),
        "code": code(),
        "judge": judge(),
        "statistics": STATISTICS,
        **listed,
    }
    lines = ["# Written by `nslora freeze` before anything of it was run; not changed afterwards."]
    lines += [f"{key} = {_value(value)}" for key, value in head.items()]
    for key, (sentence, comparisons) in claims_of().items():
        lines += ["", "[[claims]]", f"key = {_value(key)}", f"claim = {_value(sentence)}"]
        lines.append(f"comparisons = {_value(comparisons)}")
    body = "\n".join(lines) + "\n"
    return f"{body}\n{SEAL}{hashlib.sha256(body.encode()).hexdigest()}\n"


def _value(value: str | list[str]) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return "[" + "".join(f"\n  {_value(item)}," for item in value) + "\n]"


def claims_of() -> dict[str, tuple[str, list[str]]]:
    """Return each claim's sentence, and its comparisons with their bounds in words.

    Comparisons that depend on what was run are told by what they compare.
    """
    said = {}
    for key, (sentence, comparisons) in claims.CLAIMS.items():
        # with every fixed schedule of the study
        given = [] if callable(comparisons) else comparisons
        words = [f"{c.words} > {100 * c.bound:g} points" for c in given]
        said[key] = (sentence, words or [" ".join((comparisons.__doc__ or "").split())])
    return said


def disagreements(profile: Profile) -> list[str]:
    """Return what is not as registered, one sentence each: records, trees, claims and statistics, in their words.

    What is not made yet is no disagreement (`progress`). Code that judges otherwise is one, unless
    results/amendments.toml says why.
    """
    content = read(profile.root, profile.name)
    if not content:
        return []
    said = []
    for receipt in sorted(receipts(profile)):
        name, made = receipt.parent.name, read_json(receipt)
        place = f"{made.get('study')} {name}" if receipt.name == "run.json" else name
        if place not in {*content["studies"], *content["trees"]}:
            said.append(f"{name} is no part of the registered study.")
        elif made.get("environment", {}).get("code") != content["code"]:
            said.append(f"{name} was made by other code than what is registered.")
    for tree in sorted({*content["tuning"]} ^ {*tuning_trees(profile)}):
        said.append(f"the tuning tree {tree.split()[0]} is not the registered one.")
    amended = amendments(path_of(profile.root).parent)
    said += [
        f"{row['abandoned']} was abandoned: {row['why']}" for row in amended if "abandoned" in row
    ]
    if judge() not in {content["judge"], *(row.get("judge") for row in amended)}:
        said.append(
            f"the code that judges ({', '.join(JUDGES)}) is not the registered one; its hash is {judge()}: mend it, or "
            "say why in results/amendments.toml."
        )
    if content["statistics"] != STATISTICS:
        said.append("the statistics are not the registered ones.")
    now = claims_of()
    then = {row["key"]: (row["claim"], row["comparisons"]) for row in content["claims"]}
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) != then.get(key):
            said.append(f"claim {key} is not the registered one.")
    return said


def progress(profile: Profile) -> str:
    """Return how much of a registered study is made, as a sentence; empty where none is registered."""
    content = read(profile.root, profile.name)
    if not content:
        return ""
    runs = {path.parent.name for path in profile.results.glob("records/*/run.json")}
    made = {"runs": runs, "trees": set(load_trees(profile.trees).instances.index)}
    counts = {
        kind: f"{len(names.intersection(content[kind]))} of {len(content[kind])} {kind}"
        for kind, names in made.items()
    }
    date = content["date"]
    return f"of the study registered on {date}, {counts['runs']} and {counts['trees']} are made."


def receipts(profile: Profile) -> list[Path]:
    """Return the receipts of a profile's runs, and of the trees of instances that tuning has not seen."""
    instances = profile.trees.glob("*/instance.json")
    unseen = [path for path in instances if _split(path) == "test"]
    return [*profile.results.glob("records/*/run.json"), *unseen]


def _split(instance: Path) -> str:
    """Return whether an instance is of "tuning" or "test"; raises UserError where its file is damaged."""
    try:
        return read_json(instance)["split"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{instance} cannot be read ({error}): restore it from git.") from None
