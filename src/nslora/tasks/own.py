"""Own data: a JSONL file of questions, answers and optional style rules, checked line by line."""

from __future__ import annotations

import json
from pathlib import Path

from nslora.tasks import rules
from nslora.tasks.grading import NUMBER, normalise
from nslora.types import Example, Hidden, Item, Need, UserError

MIN_ROWS = 10  # so that train, dev and test each get two


def read(path: Path) -> list[Item]:
    """Return the items of a JSONL file of {"question", "answer", "rules"?}; raises UserError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    seen: dict[str, int] = {}
    rows = []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, n))
        except ValueError as error:
            raise UserError(f"{path}, line {n}: not valid JSON ({error}).") from None
        except UserError as error:
            raise UserError(f"{path}, line {n}: {error}") from None
        question = normalise(rows[-1].example.question)
        if question in seen:
            raise UserError(f"{path}, line {n}: repeats the question of line {seen[question]}.")
        seen[question] = n
    if len(rows) < MIN_ROWS:
        raise UserError(f"{path} has {len(rows)} questions; at least {MIN_ROWS} are needed.")
    return rows


def _row(line: str, n: int) -> Item:
    row = json.loads(line)
    if not isinstance(row, dict) or not {"question", "answer"} <= set(row) <= {
        "question",
        "answer",
        "rules",
    }:
        raise UserError(
            'a row must be {"question": ..., "answer": ..., "rules": [...]}, rules being optional.'
        )
    question, answer, asked = row["question"], row["answer"], row.get("rules", [])
    if type(answer) in (int, float):
        answer = str(answer)
    if not (
        isinstance(question, str)
        and isinstance(answer, str)
        and normalise(question)
        and normalise(answer)
    ):
        raise UserError("question and answer must be text with letters or digits.")
    if not isinstance(asked, list) or not all(
        isinstance(r, dict) and set(r) <= {"name", "kwargs"} for r in asked
    ):
        raise UserError('rules must be a list of {"name": ..., "kwargs": {...}}.')
    kept = tuple(rules.make(str(rule.get("name")), rule.get("kwargs")) for rule in asked)
    grader = "number" if NUMBER.fullmatch(answer.strip()) else "contains"
    need = Need.BOTH if kept else Need.CONTENT
    row_id = f"line:{n}"
    example = Example(f"own:{n}", question, answer, fact=row_id)
    return Item(example, Hidden(kept, need, row_id, grader))
