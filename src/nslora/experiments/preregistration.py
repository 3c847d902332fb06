"""Pre-registration: what a confirmatory study will run and claim, written down before it is run.

`nslora freeze` writes results/preregistration.toml: the claims with their bounds, the statistics, every
run and instance, the tuning trees that rivals are chosen on, and two hashes: of the code that a run
executes, and of the code that judges. From then on other code makes no run of the study, and `nslora
verify` names every record, tree, claim and change of the judging code that is not what was registered.
Whoever has to mend what judges says so in results/amendments.toml:

    [[amendments]]
    date = "2026-12-01"
    judge = "the hash that `nslora verify` says"
    why = "What was wrong, and which verdicts it changes."
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import nslora
from nslora.config import TUNING
from nslora.disk import saving
from nslora.experiments.grid import Profile
from nslora.runs.store import code, git, read_json
from nslora.study import claims
from nslora.study.schedules import load as load_trees
from nslora.types import Json, UserError

# what turns records into verdicts: routers decide on trees when these are judged
JUDGES = (
    "config.py",
    "types.py",
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
# begins the last line, which holds the checksum of all before it
SEAL = "# sha256 of all above: "
STATISTICS = (
    "A claim holds on a backbone if each of its comparisons does, and altogether if it holds on every backbone "
    "(intersection-union). A comparison is a Student's t interval of 95% over seed or instance means, its variance "
    "floored by the sampling variance of the items, which are clustered by fact. P-values are adjusted by Holm over "
    "all claims. All seeds count."
)


def path_of(profile: Profile) -> Path:
    """Return where the project's pre-registration is, or will be."""
    return profile.root / "results" / "preregistration.toml"


def freeze(profile: Profile) -> Path:
    """Write the pre-registration of a profile, of which nothing has been run yet; return its path.

    Raises UserError where there is a pre-registration, where the code is not that of a commit, where a seed is one of
    tuning, and where something has been run.
    """
    path = path_of(profile)
    if path.exists():
        raise UserError(f"{path} is there: a study is registered once.")
    # a new file in src/ would be executed, too
    changes = (
        ("status", "--porcelain", "--untracked-files=no"),
        ("status", "--porcelain", "--", ":/src"),
    )
    if any(git(*asked) for asked in changes):
        raise UserError("commit your changes first: a study is made by the code of one commit.")
    listed = registered(profile)
    settings = [*profile.runs, *profile.schedules]
    if tuned := [cfg.run_id for cfg in settings if cfg.is_tuning]:
        raise UserError(f"{tuned[0]} has a seed of tuning ({TUNING} or more).")
    if begun := sorted(receipts(profile)):
        raise UserError(f"{begun[0].parent} is there: what is known cannot be registered.")
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


def read(profile: Profile) -> Json | None:
    """Return the pre-registration that binds a profile, if there is one; raises UserError where it is damaged."""
    path = path_of(profile)
    if not path.exists():
        return None
    try:
        body, _, seal = path.read_text(encoding="utf-8").rpartition(f"\n{SEAL}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from git.") from None
    if seal != hashlib.sha256(body.encode()).hexdigest() + "\n":
        raise UserError(f"{path} is not as it was written: restore it from git.")
    content = tomllib.loads(body)
    return content if content["profile"] == profile.name else None


def require_frozen_code(profile: Profile) -> None:
    """Raise UserError where a profile is registered, and this is other code than what it is registered with."""
    content = read(profile)
    if content and content["code"] != code():
        # the commit that has both the code and the pre-registration
        added = git("log", "--diff-filter=A", "-1", "--format=%h", "--", str(path_of(profile)))
        raise UserError(
            f"profile {profile.name!r} is registered with the code of {content['revision'][:12]}, and this is other "
            f"code; run it there, in an environment of its own: git worktree add ../frozen {added} "
            "&& cd ../frozen && make .venv/ready."
        )


def disagreements(profile: Profile) -> list[str]:
    """Return what is not as registered, one sentence each: records, trees, claims and statistics, in their words.

    What is not made yet is no disagreement (`progress`). Code that judges otherwise is one, unless
    results/amendments.toml says why.
    """
    content = read(profile)
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
    if content["judge"] != judge() and judge() not in amendments(profile):
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


def amendments(profile: Profile) -> dict[str, str]:
    """Return why the judging code was changed, by its hash; raises UserError where the file is malformed."""
    path = path_of(profile).with_name("amendments.toml")
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = tomllib.loads(text).get("amendments", [])
        return {row["judge"]: f"{row['date']}: {row['why']}" for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None


def progress(profile: Profile) -> str:
    """Return how much of a registered study is made, as a sentence; empty where none is registered."""
    content = read(profile)
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
