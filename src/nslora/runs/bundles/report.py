"""Show an adaptation on one page, report.html: no network, no script, and every text of the data escaped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from nslora.runs.store import read_json, read_jsonl, read_scores, write_text
from nslora.runs.verdict import WORDS, Verdict
from nslora.types import Json, Prompt, diff

# of the picture, in pixels: its size, and the room for labels left, right, above and below the curve
WIDTH, HEIGHT = 720, 230
LEFT, RIGHT, TOP, BOTTOM = 40, 20, 22, 34
# rows of each kind that are shown; all are in record/scores.csv
MOST_ROWS = 200
KINDS = {"start": "start", "numerical": "weights", "symbolic": "prompt", "stop": "stop"}


def write(out: Path, record: Path, verdict: Verdict) -> None:
    """Write the report of a finished record to the file `out`."""
    write_text(out, page(record, verdict))


def page(record: Path, verdict: Verdict) -> str:
    """Return the report of a finished record as HTML."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = files(__package__ or "").joinpath("report.html").read_text(encoding="utf-8")
    run, steps = read_json(record / "run.json"), read_jsonl(record / "steps.jsonl")
    final = Prompt(**run["best"]["prompt"])
    return environment.from_string(text).render(
        verdict=verdict,
        what=WORDS[verdict.measure],
        interval=interval(verdict),
        run=run,
        moves=moves(record, steps, verdict.measure),
        chart=chart(steps, verdict.measure, run["best"]["step"]),
        changes=changes(Prompt(**steps[0]["prompt"]), final),
        groups=groups(record, verdict.measure),
        most=MOST_ROWS,
        costs=costs(run),
        size=(WIDTH, HEIGHT),
    )


def interval(verdict: Verdict) -> Json:
    """Return where the difference and its interval are on a line from -1 to 1, in percent of its length."""
    difference = verdict.difference
    places = {name: getattr(difference, name) for name in ("low", "mean", "high")}
    # of one row there is no interval
    return {name: 50 * (1 + value) if value == value else 50 for name, value in places.items()}


# ---- moves


def moves(record: Path, steps: Sequence[Json], measure: str) -> list[Json]:
    """Return a row per move: what it was and why, the score after it, its signal and its bill."""
    clock = {row["step"]: row["seconds"] for row in read_jsonl(record / "clock.jsonl")}
    rows = []
    for step in steps:
        bill = step["bill"]
        tokens = {name: bill.get(f"{name}_tokens", 0) for name in ("train", "generated", "editor")}
        rows.append(
            {
                "number": step["step"],
                "kind": KINDS.get(step["move"], step["move"]),
                "reason": step["reason"],
                "dev": step["dev"][measure],
                "loss": step["evidence"].get("loss"),
                "signal": step["signal"],
                "seconds": clock.get(step["step"], 0.0),
                "tokens": tokens,
            }
        )
    return rows


def chart(steps: Sequence[Json], measure: str, best: int) -> Json:
    """Return the curve of the dev score over the moves, in pixels."""
    across = (WIDTH - LEFT - RIGHT) / max(1, len(steps) - 1)
    points = []
    for place, step in enumerate(steps):
        value = step["dev"][measure]
        points.append(
            {
                "x": round(LEFT + place * across, 1),
                "y": round(height(value), 1),
                "value": value,
                "number": step["step"],
                "kind": KINDS.get(step["move"], step["move"]),
                "best": step["step"] == best,
            }
        )
    lines = [{"value": share / 4, "y": round(height(share / 4), 1)} for share in range(5)]
    return {"points": points, "lines": lines, "left": LEFT, "right": WIDTH - RIGHT}


def height(value: float) -> float:
    """Return how far below the picture's upper edge a share is drawn."""
    return TOP + (1 - value) * (HEIGHT - TOP - BOTTOM)


# ---- the prompt and the rows


def changes(initial: Prompt, final: Prompt) -> list[Json]:
    """Return, of both texts of the prompt, the parts that are kept, taken out and put in."""
    pairs = {
        "System prompt": (initial.system, final.system),
        "Question template": (initial.question, final.question),
    }
    return [
        {"name": name, "changed": old != new, "parts": runs(diff(old, new))}
        for name, (old, new) in pairs.items()
    ]


def runs(tokens: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join neighbours of one kind."""
    grouped = groupby(tokens, key=lambda token: token[0])
    return [(op, "".join(text for _, text in part)) for op, part in grouped]


def groups(record: Path, measure: str) -> list[Json]:
    """Return the test rows by what became of them, each with both replies."""
    before, after = read_scores(record, "frozen+initial"), read_scores(record, "test")
    rows = [pair(before[name], after[name], measure) for name in before]
    kinds = {
        "fixed": [row for row in rows if row["after"] > row["before"]],
        "broken": [row for row in rows if row["after"] < row["before"]],
        "right before and after": [row for row in rows if row["after"] == row["before"] == 1],
        "as wrong as before": [row for row in rows if row["after"] == row["before"] < 1],
    }
    return [{"name": name, "rows": rows} for name, rows in kinds.items()]


def pair(before: Json, after: Json, measure: str) -> Json:
    """Return a question with its answer and both replies."""
    return {
        "question": before["question"],
        "answer": before["answer"],
        "old": before["output"],
        "new": after["output"],
        "before": before[measure],
        "after": after[measure],
    }


# ---- what it cost


def costs(run: Json) -> list[tuple[str, str]]:
    """Return what a run cost, as names and amounts."""
    cost, editor = run["cost"], run["editor"]
    requests = editor["calls"] + editor["replayed"] + editor["retries"]
    amounts = [
        ("time", f"{duration(cost['wall_s'])}, of which {duration(cost['moves_s'])} in moves"),
        ("tokens trained on", f"{cost['train_tokens']:,.0f}"),
        ("tokens generated", f"{cost['generated_tokens']:,.0f}"),
        ("requests to the external LLM", f"{requests:,}, of which {editor['lost']:,} lost"),
        ("its tokens", f"{editor['tokens_in']:,} in, {editor['tokens_out']:,} out"),
        ("its price", f"${editor['money']:.2f}" if editor["money"] else "none set"),
        ("memory at most", f"{cost['peak_mb'] / 1000:.1f} GB"),
    ]
    if "reward_calls" in cost:
        amounts.append(("calls of the reward", f"{cost['reward_calls']:,}"))
    return amounts


def duration(seconds: float) -> str:
    """Return a time in words: "1 h 02 min", "3 min 05 s" or "4 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
