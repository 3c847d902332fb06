"""Own data: a JSONL file of questions, answers and optional style rules, checked line by line."""

from __future__ import annotations

import json
from pathlib import Path

from nslora.tasks import rules
from nslora.tasks.grading import NUMBER, normalise
from nslora.types import Example, Hidden, Item, Need, Rule, UserError

# so that train, dev and test each get two
MIN_ROWS = 10


def read(path: Path) -> list[Item]:
    """Return the items of a JSONL file of {"question", "answer", "rules"?}.

    Raises UserError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    line_of: dict[str, int] = {}
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(line, number)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        # a question that comes twice would be in two splits
        first = line_of.setdefault(normalise(item.example.question), number)
        if first != number:
            raise UserError(f"{path}, line {number}: repeats the question of line {first}.")
        items.append(item)
    if len(items) < MIN_ROWS:
        raise UserError(f"{path} has {len(items)} questions; at least {MIN_ROWS} are needed.")
    return items


def _item(line: str, number: int) -> Item:
    """Parse one line; raises ValueError where it is not JSON, UserError where it is not a row."""
    row = json.loads(line)
    required, optional = {"question", "answer"}, {"rules"}
    if not isinstance(row, dict) or not required <= set(row) <= required | optional:
        raise UserError(
            'a row must be {"question": ..., "answer": ..., "rules": [...]}, rules being optional.'
        )
    question, answer = row["question"], row["answer"]
    # `type`, because isinstance takes true for an int
    if type(answer) in (int, float):
        answer = str(answer)
    if not _has_words(question) or not _has_words(answer):
        raise UserError("question and answer must be text with letters or digits.")
    asked = _rules(row.get("rules", []))

    line_id = f"line:{number}"
    example = Example(f"own:{number}", question, answer, fact=line_id)
    need = Need.BOTH if asked else Need.CONTENT
    # 4 and 4.0 are the same answer
    grader = "number" if NUMBER.fullmatch(answer.strip()) else "contains"
    return Item(example, Hidden(asked, need, line_id, grader))


def _has_words(value: object) -> bool:
    return isinstance(value, str) and normalise(value) != ""


def _rules(listing: object) -> tuple[Rule, ...]:
    problem = UserError('rules must be a list of {"name": ..., "kwargs": {...}}.')
    if not isinstance(listing, list):
        raise problem
    asked = []
    for entry in listing:
        if not isinstance(entry, dict) or not set(entry) <= {"name", "kwargs"}:
            raise problem
        asked.append(rules.make(str(entry.get("name")), entry.get("kwargs")))
    return tuple(asked)
