"""Tell beforehand what a run on own data will take: time, and the external LLM's tokens and money."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from nslora.algorithm.remake import POLICIES, REWRITES, remade, rewrite_answer
from nslora.algorithm.symbolic import metric_calls
from nslora.algorithm.textgrad_compat import SHOWN, propose_edits
from nslora.config import RunConfig
from nslora.editor.client import Editor, Request, dollars, most_tokens
from nslora.editor.ledger import Ledger, Price
from nslora.model import checkpoints
from nslora.model.backbone import load
from nslora.model.lora import Learner
from nslora.runs.limits import CELLS
from nslora.tasks.build import Task
from nslora.types import LETTERS, Example, Move, Pair, Prompt, Reward, Scored, UserError

# rows that speed is measured on
SAMPLE = 8
# the kinds of move that a decision makes, as letters; others make both, or follow a schedule
KINDS = {"stop": "", "numerical": "N", "symbolic": "S"}
# stands for a token where a text is as long as it may be
TOKEN = "word "


@dataclass(frozen=True)
class Rates:
    """What this machine takes.

    Attributes:
        load_s: seconds to load the backbone.
        reply_s: of a reply of the backbone, those of a batch together.
        pair_s: of a training pair.
    """

    load_s: float
    reply_s: float
    pair_s: float


@dataclass(frozen=True)
class Plan:
    """What a run takes at most; the editor's retries, and the seconds it thinks, come on top.

    Attributes:
        moves: how many there may be.
        seconds: by part of the run; of "numerical move" and "symbolic move" one of each. None: the
            backbone is not in the cache, so nothing was measured.
        calls, tokens: of the external LLM.
        money: US dollars for them; None: no price is known.
    """

    moves: int
    seconds: Mapping[str, float] | None
    calls: int
    tokens: int
    money: float | None

    @property
    def whole_s(self) -> float | None:
        """Seconds of the whole run; None where nothing was measured."""
        if self.seconds is None:
            return None
        moves = [self.seconds[name] for name in self.seconds if name.endswith("move")]
        others = sum(self.seconds.values()) - sum(moves)
        return others + self.moves * max(moves, default=0.0)


def plan(cfg: RunConfig, task: Task, price: Price | None, rates: Rates | None) -> Plan:
    """Return what a run takes at most; nothing is asked of anybody.

    Raises UserError for a method whose editor's calls nobody knows beforehand.
    """
    if cfg.row.edits != "textgrad":
        raise UserError(f"what {cfg.row.edits} asks of the editor is not known beforehand.")
    kinds = cfg.schedule or KINDS.get(cfg.row.decision, "NS")
    bills = {letter: editor_bill(cfg, task, LETTERS[letter]) for letter in set(kinds)}
    made = cfg.schedule
    if not made and kinds:
        # any move may be the dearest
        made = cfg.most_moves * max(bills, key=lambda letter: bills[letter].tokens)
    calls, tokens_in, tokens_out = (
        sum(getattr(bills[letter], name) for letter in made)
        for name in ("calls", "tokens_in", "tokens_out")
    )
    known: Price | None = (0.0, 0.0) if cfg.editor_url == "local" or not calls else price
    return Plan(
        moves=len(made),
        seconds=rates and seconds(cfg, task, kinds, rates),
        calls=calls,
        tokens=tokens_in + tokens_out,
        money=known and dollars(tokens_in, tokens_out, known),
    )


def seconds(cfg: RunConfig, task: Task, kinds: str, rates: Rates) -> dict[str, float]:
    """Return the seconds of a run's parts, the editor's left out; of `kinds` of moves one each."""
    scored = len(task.dev) + len(task.feedback)
    kept = len(task.locality) + len(task.promptability)
    pairs = cfg.epochs * len(task.train) * (1 + cfg.replay)
    parts = {"loading": rates.load_s, "start": (scored + kept) * rates.reply_s}
    if "N" in kinds:
        parts["replay"] = bool(cfg.replay) * len(task.replay) * rates.reply_s
        # replies with the answer as a hint are asked for as well, and dev of the scaled adapter
        replies = scored + len(task.feedback) + cfg.shrink * len(task.dev)
        parts["numerical move"] = pairs * rates.pair_s + replies * rates.reply_s
    if "S" in kinds:
        parts["symbolic move"] = metric_calls(cfg, task) * rates.reply_s
    return parts | {"evaluation": (CELLS * len(task.test) + kept) * rates.reply_s}


class Counter:
    """An editor that only counts what it is asked, each reply as long as it may be.

    Attributes:
        bill: calls and tokens so far.
    """

    def __init__(self) -> None:
        self.bill = Ledger()

    def complete_all(self, requests: Sequence[Request]) -> list[str]:
        """Count requests; return texts that are no edits."""
        for request in requests:
            self.bill.calls += 1
            self.bill.tokens_in += most_tokens(request)
            self.bill.tokens_out += request.max_tokens
        return [TOKEN * request.max_tokens for request in requests]

    def complete(self, request: Request) -> str:
        """Count one request."""
        return self.complete_all([request])[0]


def editor_bill(cfg: RunConfig, task: Task, move: Move) -> Ledger:
    """Return what a move asks of the editor at most: prompt, rows and critiques as long as they are shown."""
    counter = Counter()
    editor = cast(Editor, counter)
    if move is Move.SYMBOLIC:
        longest = max(task.train, key=lambda example: len(example.question))
        failures = [
            # other critiques make other requests
            Scored(longest, TOKEN * SHOWN, Reward(0.0, f"{i} {TOKEN * SHOWN}"))
            for i in range(cfg.feedback)
        ]
        prompt = Prompt(TOKEN * cfg.prompt_tokens)
        propose_edits(prompt, failures, editor, cfg, count=len, seed=0)
    elif POLICIES[cfg.row.targets] is remade:
        # a judge cannot be asked here
        asking = [e for e in task.train if cfg.judge or task.reward(e, e.answer).success < 1]
        # only the critique of the bare answer is asked for
        run: Any = SimpleNamespace(editor=editor, gold_reward=critical, timed=lambda ask: ask())
        for example in sorted(asking, key=lambda e: -len(e.answer))[:REWRITES]:
            rewrite_answer(run, example, seed=0)
    return counter.bill


def critical(example: Example) -> Reward:
    """Return a reward whose critique is as long as it is shown."""
    return Reward(0.0, TOKEN * SHOWN)


def measure(cfg: RunConfig, task: Task) -> Rates | None:
    """Measure this machine on a few training rows; None where the backbone is not in the cache."""
    if checkpoints.cached_folder(cfg.backbone) is None:
        return None
    started = time.perf_counter()
    backbone = load(cfg.backbone, cfg.threads, cfg.dtype)
    load_s = time.perf_counter() - started
    rows = task.train[:SAMPLE]
    texts = [backbone.text(task.initial_prompt, example.question) for example in rows]
    pairs = [Pair(task.initial_prompt, e.question, e.gold, "gold", e.id) for e in rows]
    learner, rng = Learner(backbone, cfg), np.random.default_rng(0)
    # the first calls of a process take longer
    backbone.generate(texts, 1)
    learner.epoch(pairs, rng)
    started = time.perf_counter()
    backbone.generate(texts, cfg.max_new_tokens)
    reply_s = (time.perf_counter() - started) / len(rows)
    return Rates(load_s, reply_s, learner.epoch(pairs, rng).seconds / len(rows))


def describe(plan: Plan, cfg: RunConfig) -> list[str]:
    """Return a plan in words, a sentence each."""
    lines = [f"{cfg.method} on {cfg.backbone}: at most {plan.moves} moves."]
    if plan.seconds is None:
        lines.append(f"time: not known before {cfg.backbone} is in the cache.")
    else:
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan.seconds.items())
        whole = plan.whole_s or 0.0
        lines.append(
            f"time here: at most {whole / 60:.1f} minutes ({parts}), measured on a few rows; "
            "the external LLM's time comes on top."
        )
    money = "of unknown price: give --price IN,OUT"
    if plan.money is not None:
        money = f"{plan.money:.2f} dollars"
    lines.append(
        f"external LLM: at most {plan.calls} calls and {plan.tokens} tokens, {money}; "
        "what it must be asked again comes on top."
    )
    return lines
