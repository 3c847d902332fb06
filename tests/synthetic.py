"""Writes small run records in the format of finished runs, for the tests of everything that reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nslora.config import RunConfig

SKILL = {  # chance of (content right, style kept) after adaptation
    "frozen": (0.1, 0.05),
    "lora": (0.9, 0.15),
    "textgrad": (0.1, 0.85),
    "alternate": (0.6, 0.6),
    "random": (0.55, 0.5),
    "monitor": (0.7, 0.7),
    "classifier": (0.7, 0.75),
    "neurosymbolic": (0.9, 0.9),
    "oracle": (0.95, 0.9),
    "lora-demonstrated": (0.9, 0.95),
}
START = {"system": "Answer briefly. Be kind.", "question": "{question}"}
REWRITTEN = {
    "system": 'Answer briefly. End with "Is there anything else?" & nothing more.',
    "question": "{question}",
}
HEADER = ("split", "id", "need", "success", "content", "content_strict", "style", "output")


Skill = tuple[float, float]


def score_rows(cfg: RunConfig, rng: np.random.Generator, skill: Skill) -> list[tuple[object, ...]]:
    """Test items by need, then what the frozen backbone could do."""
    content, style = skill
    needs = {"facts": ["content"], "style": ["style"], "math": ["content"]}.get(
        cfg.task, ["content", "style", "both"]
    )
    rows: list[tuple[object, ...]] = []
    for i in range(cfg.test_items * len(needs)):
        need = needs[i % len(needs)]
        right = float(need == "style" or rng.random() < content)
        kept = float(need == "content" or rng.random() < style)
        rows.append(
            (
                "test",
                f"t{i}",
                need,
                right * kept,
                right,
                right,
                kept,
                "NA" if i else 'two\nlines, "quoted"',
            )
        )
    for split, metric in (("locality", content), ("promptability", style)):
        for i in range(8):
            fine = float(rng.random() < (1 - metric / 3))
            rows.append((split, f"{split}{i}", "content", fine, fine, fine, fine, ""))
    return rows


def step_rows(cfg: RunConfig, rng: np.random.Generator) -> list[dict[str, object]]:
    """The start and `cfg.moves` moves that approach the method's skill, in the shape of StepRecord."""
    content, style = np.clip(SKILL[cfg.method] + rng.normal(0, 0.04, 2), 0, 1)
    kinds = {"lora": "nnnnnn", "textgrad": "ssssss", "neurosymbolic": "nnnssn"}.get(
        cfg.method, "snsnsn"
    )
    rows: list[dict[str, object]] = []
    loss, now, calls = 3.0, {"content": 0.05, "style": 0.05}, 40.0
    for step in range(0 if cfg.method == "frozen" else cfg.moves + 1):
        move = "stop" if step == 0 else {"n": "numerical", "s": "symbolic"}[kinds[(step - 1) % 6]]
        cost = {"seconds": 0.0 if step == 0 else 12.0 + rng.random(), "dev_change": 0.0}
        signal: dict[str, float | None] = {"c1": None, "c2": None, "gain": None}
        if move == "numerical":
            new = loss * (0.45 if step < 3 else 0.97)
            signal |= {"c1": None if step == 1 else (new - loss) / loss, "c2": new + 0.1}
            loss, now["content"] = new, now["content"] + (content - now["content"]) * 0.75
            cost |= {"loss": loss, "grad_norm": new + 0.1, "train_tokens": 2000.0}
        elif move == "symbolic":
            now["style"] += (style - now["style"]) * 0.6
            signal["gain"], calls = 0.3, calls + 5
        cost |= {"editor_calls": calls, "editor_tokens": 400 * calls}
        dev = {
            **now,
            "value": (now["content"] + now["style"]) / 2,
            "success": now["content"] * now["style"],
            "n": 12,
        }
        needs = (
            [
                [
                    f"t{i}",
                    ("content", "style", "both")[i % 3],
                    0.0,
                    float(np.clip(rng.normal(0.8 - 0.5 * (i % 3), 0.2), 0, 1)),
                ]
                for i in range(12)
            ]
            if step
            else []
        )
        rows.append(
            {
                "step": step,
                "move": move,
                "prompt": START,
                "adapter": None,
                "dev": dev,
                "train": dev,
                "signal": signal,
                "demand": {},
                "detail": {"needs": needs},
                "cost": cost,
            }
        )
    return rows or step_rows(RunConfig.of({**asdict(cfg), "method": "random"}), rng)[:1]


def write_record(results: Path, skill: Skill | None = None, **settings: object) -> Path:
    """One finished run with random replies at the method's skill (or the given one); returns its folder."""
    cfg = RunConfig.of({"moves": 6, "test_items": 12, **settings})
    folder = results / "records" / cfg.run_id
    folder.mkdir(parents=True)
    rng = cfg.rng(f"synthetic {cfg.method} {cfg.backbone} {cfg.targets}")
    rows, steps = score_rows(cfg, rng, skill or SKILL[cfg.method]), step_rows(cfg, rng)
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])
    (folder / "steps.jsonl").write_text(
        "".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8"
    )
    splits = dict.fromkeys(row[0] for row in rows)
    final = {split: split_means([row for row in rows if row[0] == split]) for split in splits}
    requests = {"neurosymbolic": 10, "textgrad": 30}.get(cfg.method, 15) + cfg.seed
    run = {
        "run_id": cfg.run_id,
        "config": asdict(cfg),
        "weights": "0" * 64,
        "environment": {"versions": {"torch": "2"}},
        "start": {"dev": steps[0]["dev"]},
        "final": final,
        "best": {
            "step": 3,
            "prompt": START if cfg.method in ("frozen", "lora") else REWRITTEN,
            "prompt_diff": [],
        },
        "editor": {
            "calls": requests - 4,
            "replayed": 4,
            "failed": 0,
            "tokens_in": 900,
            "tokens_out": 100,
            "seconds": 9.0,
            "money": 0.0,
        },
        "remade": 5,
        "cost": {
            "wall_s": 80.0,
            "moves_s": 75.0,
            "train_tokens": 12000.0,
            "generated_tokens": 900.0,
            "peak_mb": 900.0,
        },
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "remade.jsonl").touch()
    return folder


def split_means(rows: list[tuple[object, ...]]) -> Mapping[str, float]:
    """The summary of a split as run.json holds it."""
    means = {
        name: float(np.mean([float(str(row[i])) for row in rows]))
        for i, name in enumerate(HEADER)
        if 3 <= i <= 6
    }  # type: ignore[misc]
    return {**means, "value": (means["content"] + means["style"]) / 2, "n": len(rows)}


def write_grid(results: Path, seeds: int = 3) -> None:
    """A small main comparison: facts, style (two rules) and math by four methods, mixed by all, and two ablations."""
    for backbone in ("smollm2-135m", "qwen2.5-coder-0.5b"):
        for seed in range(seeds):
            shared = {"backbone": backbone, "seed": seed}
            for method in ("frozen", "lora", "textgrad", "neurosymbolic"):
                write_record(results, task="facts", method=method, **shared)
                write_record(results, task="math", method=method, **shared)
                for rule in ("end_phrase", "json"):
                    write_record(results, task="style", rule=rule, method=method, **shared)
            for method in SKILL:
                write_record(results, task="mixed", method=method, **shared)
            write_record(results, task="mixed", method="neurosymbolic", rank=4, **shared)
            for targets in ("gold", "verified"):
                write_record(results, task="math", method="alternate", targets=targets, **shared)
