"""Compare the lengths of own data with what a backbone takes and what a run lets it reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.runs.store import read_json
from nslora.tasks import own, rules
from nslora.types import Item, Prompt, UserError

# tokens of a chat format around prompt and question, generously
MARKUP = 64
# replies are allowed a multiple of so many tokens
STEP = 16
# letters of a token, where no tokenizer counts them: few, so that the guess is no less than the truth
LETTERS = 3


@dataclass(frozen=True)
class Measure:
    """How a backbone counts.

    Attributes:
        count: tokens of a text.
        context: tokens of prompt and reply together that it takes; None: not known.
    """

    count: Callable[[str], int]
    context: int | None


def measure(backbone: str) -> Measure | None:
    """Return how a cached backbone counts, without loading it; None where it is not cached."""
    folder = checkpoints.cached_folder(backbone)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = _tokenizer(folder / "tokenizer.json")
    config = read_json(folder / "config.json")
    return Measure(
        count=lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
        context=config.get("max_position_embeddings"),
    )


@cache
def _tokenizer(path: Path) -> Any:
    """Return the tokenizer of a file; reading it takes longer than counting."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def longest_prompt(prompt: Prompt, cfg: RunConfig) -> int:
    """Return a prompt limit that leaves a start prompt as much room to grow as the default has."""
    return cfg.prompt_tokens + _guess(prompt.both)


def longest_reply(items: Sequence[Item]) -> int:
    """Return a reply limit for these answers, each written in the style of its rules, in tokens.

    It is guessed from their letters, so that it is the same wherever a run is prepared.
    """
    needed = max((_guess(_reply(item)) for item in items), default=0)
    return STEP * ceil((needed + 1) / STEP)


def _reply(item: Item) -> str:
    return rules.demonstrate(item.hidden.rules, item.example.answer)


def _guess(text: str) -> int:
    """Return no fewer tokens than most tokenizers make of a text."""
    plain = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    # digits and signs are tokens by themselves, and other scripts have a token a byte at worst
    others = len(text.encode()) - plain
    return ceil(plain / LETTERS) + others


def problems(items: Sequence[Item], cfg: RunConfig, how: Measure) -> Iterator[tuple[Item, str]]:
    """Yield (item, sentence) for each row that is too long for the backbone or the reply limit."""
    for item in items:
        question = how.count(item.example.question)
        answer = how.count(_reply(item))
        room = cfg.prompt_tokens + MARKUP + max(answer, cfg.max_new_tokens)
        # a token ends the reply
        if answer >= cfg.max_new_tokens:
            yield (
                item,
                f"the answer has {answer} tokens, and a reply ends after "
                f"{cfg.max_new_tokens}; set max_new_tokens to {answer + 1} or more.",
            )
        if how.context and question + room > how.context:
            yield (
                item,
                f"the question has {question} tokens, and {cfg.backbone} takes "
                f"{max(0, how.context - room)} beside prompt and reply; shorten it or leave it out.",
            )


def require(items: Sequence[Item], cfg: RunConfig, how: Measure) -> None:
    """Raise UserError for the first row that is too long."""
    for item, problem in problems(items, cfg, how):
        file = cfg.test if own.is_test(item) else cfg.task.removeprefix("own:")
        raise UserError(f"{file}, line {own.line(item)}: {problem}")


def describe(items: Sequence[Item], cfg: RunConfig, how: Measure | None) -> str:
    """Return how long questions and answers are in tokens, in a sentence."""
    if how is None:
        return f"tokens are not counted: {cfg.backbone} is not in the cache."
    parts = []
    for name in ("question", "answer"):
        counts = [how.count(getattr(item.example, name)) for item in items]
        parts.append(f"{name}s {min(counts)} to {max(counts)} (median {median(counts):.0f})")
    limit = f"a reply may have {cfg.max_new_tokens}"
    if how.context:
        limit += f", and prompt and reply together {how.context}"
    return f"tokens of {cfg.backbone}: {', '.join(parts)}; {limit}."
