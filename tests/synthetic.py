"""Writes small run records of schema 2, for the tests of everything that reads them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nslora.editor.ledger import Ledger

# Chance of (content right, style kept) after adaptation.
SKILL = {
    "frozen": (0.1, 0.05),
    "lora": (0.9, 0.15),
    "lora-rft": (0.9, 0.2),
    "lora-remade": (0.9, 0.3),
    "textgrad": (0.1, 0.85),
    "gepa": (0.1, 0.8),
    "alternate": (0.6, 0.6),
    "random": (0.55, 0.5),
    "monitor": (0.7, 0.7),
    "needs-only": (0.7, 0.75),
    "neurosymbolic": (0.9, 0.9),
    "oracle": (0.95, 0.9),
    "lora-demonstrated": (0.9, 0.95),
    "fixed:SNNN": (0.8, 0.8),
    "fixed:NNSN": (0.7, 0.6),
}
START = {"system": "Answer briefly. Be kind.", "question": "{question}"}
REWRITTEN = {
    "system": 'Answer briefly. End with "Is there anything else?" & nothing more.',
    "question": "{question}",
}
PROMPT_DIFF = [["=", "Answer briefly. "], ["-", "Be kind."], ["+", "End with <b> & nothing more."]]
MEASURES = ("success", "value", "content", "content_strict", "style")
HEADER: Sequence[str] = ("split", "id", "fact", "need", "question", "answer", *MEASURES, "output")
FACTORIAL = ("frozen+initial", "tuned+initial", "frozen+final", "tuned+final")
MOVE = {"N": "numerical", "S": "symbolic"}
# Settings of a run unless a test says otherwise; `targets` and `needs` are those of the method.
DEFAULTS: dict[str, Any] = {
    "study": "main",
    "task": "mixed",
    "backbone": "smollm2-135m",
    "method": "neurosymbolic",
    "seed": 0,
    "rule": "end_phrase",
    "moves": 6,
    "items": 24,
    "test_items": 12,
    "epochs": 1,
    "rank": 16,
    "lr": 5e-4,
    "replay": 1.0,
    "bake": False,
    "returned": "best",
    "control": "none",
    "gate": True,
    "c1_eps": 0.1,
    "c2_eps": 0.5,
    "gain_eps": 0.02,
}
TARGETS = {
    "frozen": "gold",
    "lora": "gold",
    "lora-rft": "sampled",
    "textgrad": "gold",
    "gepa": "gold",
    "lora-demonstrated": "demonstrated",
}
NEEDS = {"needs-only": "classifier", "neurosymbolic": "classifier", "oracle": "hidden"}
Skill = tuple[float, float]
Row = dict[str, Any]


def settings_of(**settings: Any) -> dict[str, Any]:
    """Every setting of a run."""
    config = DEFAULTS | settings
    method = config["method"]
    config.setdefault("targets", TARGETS.get(method, "remade"))
    config.setdefault("needs", NEEDS.get(method, "none"))
    return config


def name_of(config: dict[str, Any]) -> str:
    """A folder name that is unique per configuration."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    parts = (config["task"], config["backbone"], config["method"], f"s{config['seed']}", digest)
    return "-".join(parts).replace(":", "_")


def schedule_of(config: dict[str, Any]) -> str:
    """The moves that the method makes within its budget."""
    method, moves = config["method"], config["moves"]
    if method == "frozen":
        return ""
    if method.startswith("fixed:"):
        return method.removeprefix("fixed:")[:moves]
    if method.startswith("lora"):
        return "N" * moves
    if method in ("textgrad", "gepa"):
        return "S" * moves
    pattern = "NNNSSN" if method == "neurosymbolic" else "SNSNSN"
    return (pattern * moves)[:moves]


def graded(split: str, item: str, need: str, right: float, kept: float, output: str = "NA") -> Row:
    """One row of scores.csv."""
    fact = item.rpartition(":")[0] or item
    return {
        "split": split,
        "id": item,
        "fact": fact,
        "need": need,
        "question": f"What is {fact}?",
        "answer": "NA",
        "success": right * kept,
        "value": (right + kept) / 2,
        "content": right,
        "content_strict": right,
        "style": kept,
        "output": output,
    }


def score_rows(config: dict[str, Any], rng: np.random.Generator, skill: Skill) -> list[Row]:
    """Test items by need, the 2 x 2 on the same items, and what the frozen backbone could do."""
    content, style = skill
    one_need = {"facts": ["content"], "style": ["style"], "math": ["content"]}
    needs = one_need.get(config["task"], ["content", "style", "both"])
    cells = {
        "test": skill,
        "frozen+initial": SKILL["frozen"],
        "tuned+initial": (content, 0.05),
        "frozen+final": (0.1, style),
        "tuned+final": skill,
    }
    rows = []
    for split, (right, kept) in cells.items():
        for i in range(config["test_items"] * len(needs)):
            need = needs[i % len(needs)]
            correct = float(need == "style" or rng.random() < right)
            obeyed = float(need == "content" or rng.random() < kept)
            output = "NA" if i else 'two\nlines, "quoted"'
            rows.append(graded(split, f"{need} {i // 2}:{i % 2}", need, correct, obeyed, output))
    for split, metric in (("locality", content), ("promptability", style)):
        for i in range(8):
            fine = float(rng.random() < 1 - metric / 3)
            rows.append(graded(split, f"{split} {i}:0", "content", fine, fine))
    return rows


def step_rows(
    config: dict[str, Any], rng: np.random.Generator, skill: Skill
) -> tuple[list[Row], list[Row], list[Row]]:
    """The start and all moves, which approach the skill: rows of steps.jsonl, clock.jsonl and hidden.jsonl."""
    content, style = np.clip(np.array(skill) + rng.normal(0, 0.04, 2), 0, 1).tolist()
    now, loss = {"content": 0.05, "style": 0.05}, 3.0
    steps, clock, hidden = [], [], []
    for step, letter in enumerate(f"-{schedule_of(config)}"):
        signal: dict[str, float | None] = {"c1": None, "c2": None, "gain": None}
        evidence: Row = {}
        bill = dict.fromkeys(
            ("train_tokens", "generated_tokens", "editor_calls", "editor_tokens"), 0
        )
        if letter == "N":
            new = loss * (0.45 if step < 3 else 0.97)
            signal |= {"c1": None if step == 1 else (new - loss) / loss, "c2": new + 0.1}
            loss, now["content"] = new, now["content"] + (content - now["content"]) * 0.75
            evidence = {"loss": loss, "grad_norm": new + 0.1, "pairs": {"gold": config["items"]}}
            bill["train_tokens"] = 2000
        elif letter == "S":
            now["style"] += (style - now["style"]) * 0.6
            signal["gain"] = 0.3
            edit = REWRITTEN | {"problem": "", "screen_value": 0.5, "accepted": True, "diff": []}
            evidence = {"edits": [edit]}
            bill |= {"editor_calls": 5, "editor_tokens": 2000}
        value, success = (now["content"] + now["style"]) / 2, now["content"] * now["style"]
        dev = {"success": success, "value": value, "n": 12}
        steps.append(
            {
                "step": step,
                "move": MOVE.get(letter, "start"),
                "reason": {"N": "not saturated", "S": "saturated"}.get(letter, ""),
                "prompt": START,
                "adapter": None,
                "dev": dev,
                "train": dev,
                "signal": signal,
                "demand": {"content": 0.5, "style": 0.5} if config["needs"] != "none" else {},
                "evidence": evidence,
                "bill": bill,
            }
        )
        clock.append({"step": step, "seconds": 12.0 + rng.random() if step else 0.0})
        parts = {"content": now["content"], "content_strict": 0.0, "style": now["style"]}
        hidden.append({"step": step, "dev": parts, "needs": need_rows(config, rng)})
    return steps, clock, hidden


def need_rows(config: dict[str, Any], rng: np.random.Generator) -> list[list[Any]]:
    """Hidden needs of failing items with estimates that mostly tell them apart, where the method estimates needs."""
    if config["needs"] == "none":
        return []
    needs = ("content", "style", "both")
    chances = np.clip(rng.normal(0.8 - 0.5 * (np.arange(12) % 3), 0.2), 0, 1).tolist()
    return [[f"t{i}", needs[i % 3], 0.0, chance] for i, chance in enumerate(chances)]


def write_record(
    results: Path, skill: Skill | None = None, run_id: str = "", **settings: Any
) -> Path:
    """Write one finished run with random replies at the method's skill (or the given one); returns its folder."""
    config = settings_of(**settings)
    run_id = run_id or name_of(config)
    folder = results / "records" / run_id
    folder.mkdir(parents=True)
    names = ("seed", "task", "rule", "backbone", "method", "targets")
    seed = hashlib.sha256(json.dumps([config[name] for name in names]).encode()).digest()
    rng = np.random.default_rng(list(seed[:8]))
    skill = skill or SKILL.get(config["method"], (0.7, 0.7))
    scores, steps = score_rows(config, rng, skill), step_rows(config, rng, skill)
    write_scores(folder, scores)
    for name, rows in zip(("steps", "clock", "hidden"), steps, strict=True):
        write_lines(folder / f"{name}.jsonl", rows)
    (folder / "run.json").write_text(json.dumps(receipt(config, run_id, scores)))
    (folder / "remade.jsonl").touch()
    return folder


def receipt(config: dict[str, Any], run_id: str, scores: Sequence[Row]) -> Row:
    """What run.json holds."""
    splits = dict.fromkeys(row["split"] for row in scores)
    means = {split: split_means([r for r in scores if r["split"] == split]) for split in splits}
    requests = {"neurosymbolic": 10, "textgrad": 30}.get(config["method"], 15) + config["seed"]
    edited = "S" in schedule_of(config)
    return {
        "schema": 2,
        "study": config["study"],
        "run_id": run_id,
        "config": config,
        "weights": "0" * 64,
        "environment": {"revision": "0" * 40, "versions": {"torch": "2"}},
        "schedule": schedule_of(config),
        "final": {split: mean for split, mean in means.items() if split not in FACTORIAL},
        "factorial": {split: mean for split, mean in means.items() if split in FACTORIAL},
        "best": {
            "step": min(3, len(schedule_of(config))),
            "prompt": REWRITTEN if edited else START,
            "prompt_diff": PROMPT_DIFF if edited else [["=", "Answer briefly. Be kind."]],
        },
        "editor": asdict(
            Ledger(calls=requests - 4, replayed=4, tokens_in=900, tokens_out=100, seconds=9.0)
        ),
        "remade": 5,
        "cost": {
            "wall_s": 80.0,
            "saved_s": 0.0,
            "work_s": 78.0,
            "moves_s": 75.0,
            "train_tokens": 12000.0,
            "generated_tokens": 900.0,
            "peak_mb": 900.0,
        },
    }


def split_means(rows: Sequence[Row]) -> dict[str, float]:
    """The summary of a split as run.json holds it."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in MEASURES}
    return {**means, "n": len(rows)}


def write_scores(folder: Path, rows: Sequence[Row]) -> None:
    """Write scores.csv."""
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, HEADER, lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_grid(results: Path, seeds: int = 3) -> None:
    """A small study: facts, style and math by four methods, mixed by twelve, ablations and data efficiency."""
    pure = ("frozen", "lora-remade", "textgrad", "neurosymbolic")
    left_out = {"lora-rft", "gepa", "lora-demonstrated"}
    for backbone in ("smollm2-135m", "qwen2.5-coder-0.5b"):
        for seed in range(seeds):
            shared: dict[str, Any] = {"backbone": backbone, "seed": seed}
            for task in ("facts", "style", "math"):
                for method in pure:
                    write_record(results, task=task, method=method, **shared)
            for method in SKILL.keys() - left_out:
                write_record(results, task="mixed", method=method, **shared)
            write_record(results, study="ablations", rank=4, **shared)
            for targets in ("gold", "verified"):
                arm = {"study": "data-efficiency", "task": "math", "method": "alternate"}
                write_record(results, targets=targets, **arm, **shared)
