"""Advise before anything is spent: what would adapting a backbone to own data bring, and by which moves?

The base's replies are graded on a few rows, one small move of each kind is tried on them, and trees of
schedules say what moves brought elsewhere. Test rows are not looked at. Nothing is left behind but
replies: those of the frozen weights and of the external LLM, so that the same advice costs them once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nslora.cache import cache_dir
from nslora.config import RunConfig
from nslora.editor.ledger import Price, known_price
from nslora.model import checkpoints
from nslora.runs import preflight
from nslora.runs.adapt import check
from nslora.runs.store import Store, peak_megabytes
from nslora.runs.verdict import Estimate, estimate, measure
from nslora.study.records import estimate as over_instances
from nslora.study.schedules.answers import style_share
from nslora.study.schedules.trees import NODE, Trees, chosen_on_dev, difference, load
from nslora.study.stats import DIFFERENCE, Interval, seed_interval
from nslora.tasks import own
from nslora.types import Candidate, Example, Scored, UserError

if TYPE_CHECKING:
    from nslora.algorithm.needs import Needs
    from nslora.algorithm.session import Session, State
    from nslora.editor.client import Editor
    from nslora.runs.plan import Plan

# rows of train that are graded, and of dev
GRADED, DEV = 28, 12
# rows that weights are tuned on, and passes over them
TUNED, PASSES = 12, 4
# estimators of needs: the one that decides, and the methods' own, which takes a form that the bare
# answer has for none
ESTIMATORS = ("recall", "asked")
# trees count as alike whose share of style needs, or of followed instructions, differs by no more
NEAR = 0.25
# share right from which there is little to gain
WELL = 0.9
# share of rows below which a need is no need
FLOOR = 0.1
# share of instructions from which a backbone follows prompts, as for the method that decides
FOLLOWS = RunConfig().follows_floor
# what does as a verdict says
METHODS_OF = {
    "not worth it": "",
    "prompt suffices": "textgrad",
    "weights": "lora-remade",
    "both, prompt first": "neurosymbolic",
    "both, weights first": "numerical-first",
}
# of a difference of log-likelihoods
ANY = (-np.inf, np.inf)
# relative fall of the loss on rows that were not trained on, from which weights learn what carries over
FALL = 0.02


@dataclass(frozen=True)
class Trial:
    """One small move, and what it brought on dev rows.

    Attributes:
        n: how many dev rows.
        before, after: mean reward.
        right: share right after it.
        loss: before and after, mean NLL of gold answers in nats per token; None for prompts.
        content: how much more likely than another row's answer the gold answer became, in nats per
            token: a form alone makes both likely. None for prompts.
        seconds, calls, tokens: what the move took; calls and tokens are the external LLM's.
    """

    n: int
    before: float
    after: float
    right: float
    seconds: float
    calls: int = 0
    tokens: int = 0
    loss: tuple[float, float] | None = None
    content: Interval | None = None


@dataclass(frozen=True)
class Expected:
    """What schedules brought elsewhere, in test success over the start.

    Attributes:
        instances: which ones were alike, in words.
        weights, prompt: one move of a kind.
        prompt_first: schedules that begin with the prompt less those that begin with weights.
    """

    instances: str
    weights: Interval
    prompt: Interval
    prompt_first: Interval


@dataclass(frozen=True)
class Advice:
    """What was measured, and the verdict.

    Attributes:
        right: share of graded rows that the base gets right, as it is.
        needs: by estimator, the shares of training rows that fail and need content, or style.
        followed, instructions: how many rules the base kept of those that it was told.
        weights: a numerical move.
        prompt: a symbolic move; None where none was tried.
        untried: why not, in words.
        expected: by schedule trees; None where none is alike.
        trees: how many finished trees there are.
        plan: of a whole adaptation.
        peak_mb: memory that the moves took at most.
    """

    cfg: RunConfig
    right: Estimate
    needs: Mapping[str, Mapping[str, float]]
    followed: int
    instructions: int
    weights: Trial
    prompt: Trial | None
    untried: str
    expected: Expected | None
    trees: int
    plan: Plan
    peak_mb: float

    @property
    def follows(self) -> float:
        """Share of told rules that the base kept; 0 where there was none to tell."""
        return self.followed / max(self.instructions, 1)

    @property
    def prompts_help(self) -> bool:
        """Whether a symbolic move gained; where none was tried, whether the base follows prompts."""
        if self.prompt is None:
            return self.follows >= FOLLOWS
        return self.prompt.after > self.prompt.before

    @property
    def content(self) -> float:
        """Share of rows that lack content."""
        return self.needs[ESTIMATORS[0]].get("content", 0.0)

    @property
    def style(self) -> float:
        """Share of rows that lack form."""
        return self.needs[ESTIMATORS[0]].get("style", 0.0)

    @property
    def weights_help(self) -> bool:
        """Whether a numerical move gained on rows that it did not train on, in what they lack."""
        before, after = self.weights.loss or (0.0, 0.0)
        form = self.style >= FLOOR and after < before * (1 - FALL)
        content = self.weights.content is not None and self.weights.content.low > 0
        return self.weights.after > self.weights.before or form or content

    @property
    def verdict(self) -> tuple[str, str]:
        """What to do, and the rule that says so with its numbers: the first that holds."""
        weights = f"tuned weights {'gain' if self.weights_help else 'gain nothing'} on other rows"
        prompt = f"an edit {'gains' if self.prompts_help else 'gains nothing'}"
        if self.prompt is None:
            prompt = f"{self.follows:.0%} of instructions are followed ({FOLLOWS:.0%} would do)"
        numbers = f"content {self.content:.0%}, form {self.style:.0%} of rows"
        if self.right.mean >= WELL:
            return "not worth it", f"the base is right on {self.right.mean:.0%}, {WELL:.0%} or more"
        if not self.prompts_help and not self.weights_help:
            return "not worth it", f"{weights}, and {prompt}"
        if not self.weights_help:
            return "prompt suffices", f"{prompt}, and {weights}"
        if not self.prompts_help:
            return "weights", f"{weights}, and {prompt}"
        if self.content < FLOOR:
            return "prompt suffices", f"{prompt}, and little content is missing ({numbers})"
        if self.style < FLOOR:
            return "weights", f"{weights}, and little form is missing ({numbers})"
        if self.expected and self.expected.prompt_first.low > 0:
            return "both, prompt first", f"schedule data: {said(self.expected.prompt_first)}"
        if self.expected and self.expected.prompt_first.high < 0:
            return "both, weights first", f"schedule data: {said(self.expected.prompt_first)}"
        follows = f"both gain, and {self.follows:.0%} of instructions are followed"
        if self.follows >= FOLLOWS:
            return "both, prompt first", f"{follows}, {FOLLOWS:.0%} or more"
        return "both, weights first", f"{follows}, less than {FOLLOWS:.0%}"

    @property
    def method(self) -> str:
        """The method that does what the verdict says; empty where nothing is to be done."""
        verdict = self.verdict[0]
        if verdict == "both, prompt first" and self.follows < FOLLOWS:
            # neurosymbolic would leave the prompt as it is
            return "alternate"
        return METHODS_OF[verdict]

    @property
    def lines(self) -> list[str]:
        """The advice in words, a sentence each; at the end the verdict, and how to do it."""
        from nslora.runs.plan import describe

        name, (verdict, rule) = self.cfg.backbone, self.verdict
        lines = [
            f"base: right on {self.right.mean:.0%} of {self.right.n} rows ({self.right}).",
            *(
                f"misses: {found.get('content', 0):.0%} of rows lack content, "
                f"{found.get('style', 0):.0%} form (estimated by {estimator})."
                for estimator, found in self.needs.items()
            ),
            f"prompts: {name} follows {self.followed} of {self.instructions} instructions.",
            f"weights, {PASSES} passes over {TUNED} rows at most: {trial(self.weights)}.",
            f"prompt, one edit: {trial(self.prompt) if self.prompt else self.untried}.",
            f"expected gain: {self._expected()}.",
            *(f"adapt: {line}" for line in describe(self.plan, self.cfg)),
            f"memory: {self.peak_mb:.0f} MB, the local editor's own not counted.",
        ]
        lines.append(f"verdict: {verdict}, because {rule}.")
        if self.method:
            lines.append(f"to do that: nslora adapt --method {self.method}.")
        return lines

    def _expected(self) -> str:
        """What the schedule data say, in words."""
        if self.expected is None:
            return (
                "no schedule data yet" if not self.trees else "no schedule data of such needs yet"
            )
        e = self.expected
        return (
            f"by {e.instances}, in test success: weights {said(e.weights)}, prompt {said(e.prompt)}, "
            f"prompt first rather than weights {said(e.prompt_first)}"
        )


def said(interval: Interval) -> str:
    """Return an interval in words."""
    return f"{interval.mean:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"


def trial(tried: Trial) -> str:
    """Return what a move brought and took, in words."""
    loss = f", loss {tried.loss[0]:.2f} to {tried.loss[1]:.2f} nats a token" if tried.loss else ""
    if tried.content:
        loss += f", gold against others' answers {said(tried.content)}"
    calls = "1 call" if tried.calls == 1 else f"{tried.calls} calls"
    asked = f", {calls}, {tried.tokens} tokens" if tried.calls else ""
    gain = f"reward {tried.before:.2f} to {tried.after:.2f} on {tried.n} other rows"
    return f"{gain}{loss}, in {tried.seconds:.0f} s{asked}"


# ---- measuring


def advise(
    data: str | Path,
    *,
    reward: str | Callable[..., Any] = "",
    price: Price | None = None,
    schedules: str | Path = "results/schedules",
    **settings: Any,
) -> Advice:
    """Measure what adapting a backbone to own data would bring; minutes at most.

    Args:
        data, reward, settings: as of `nslora.adapt`.
        price: US dollars per million tokens of the external LLM, in and out.
        schedules: folder of trees of schedules; there may be none.

    Raises UserError, before anything is downloaded or spent, for wrong input.
    """
    if "task" in settings:
        raise UserError("setting task cannot be given here: the task is your data.")
    cfg, checked = check(data, reward, **settings)
    own.require(checked.problems)
    if cfg.judge:
        raise UserError("advise grades by a grader or a reward: what a judge asks is not known.")
    if cfg.row.edits != "textgrad":
        raise UserError(f"advise tries the moves of neurosymbolic, not those of {cfg.method}.")
    price = known_price(price)
    trees = load(schedules)
    untried = _untried(cfg)
    preflight.check([cfg.but(method="frozen") if untried else cfg])

    place = Store(cache_dir() / "advise", cache_dir() / "advise")
    with preflight.open_editor(cfg, place) as editor, tempfile.TemporaryDirectory() as scratch:
        if not untried:
            editor.check()
        return _measure(cfg, place, editor, Path(scratch), trees, untried, price)


def _untried(cfg: RunConfig) -> str:
    """Say why no symbolic move can be tried; "" if one can."""
    if cfg.editor_url == "local" and not checkpoints.is_cached(cfg.editor_model):
        return f"not tried: the editor {cfg.editor_model} is not in the cache"
    return ""


def _measure(
    cfg: RunConfig,
    place: Store,
    editor: Editor,
    scratch: Path,
    trees: Trees,
    untried: str,
    price: Price | None,
) -> Advice:
    """Load the backbone, grade its replies, and try both moves."""
    from nslora.algorithm import loop, needs
    from nslora.algorithm.session import Session, State
    from nslora.model import backbone as backbones
    from nslora.runs import plan, run
    from nslora.tasks.build import build

    started = time.perf_counter()
    backbone = backbones.load(cfg.backbone, cfg.threads, cfg.dtype)
    load_s = time.perf_counter() - started
    task = build(cfg)
    run.require_lengths(cfg, task, backbone)
    # small moves, and no call where nobody answers
    targets = "gold" if untried else cfg.targets
    alike = {"epochs": PASSES, "replay": 0.0, "candidates": 1}
    # so few rows tell no scale from another
    small = cfg.but(**alike, targets=targets, shrink=False)
    train = task.feedback[:GRADED]
    few = replace(task, train=train, feedback=train, dev=task.dev[:DEV])
    session = Session(small, few, backbone, editor, scratch, place.memo)
    state = loop.begin(session, State(Candidate(few.initial_prompt)))
    rows = [*state.train, *state.dev]
    reply_s = session.work_s / len(rows)
    by = measure(cfg.grader)
    found = {name: needs.ESTIMATORS[name](session, state) for name in ESTIMATORS}
    demand = {name: one.demand for name, one in found.items()}
    # those that a run measures before its first move
    followed, told = len(session.abilities["promptability"]), len(few.promptability)

    # the prompt first: tuned weights stay
    before = replace(editor.ledger)
    prompt = None if untried else _try_prompt(session, state, found[ESTIMATORS[0]])
    asked = editor.ledger - before
    if asked.lost and asked.lost == asked.calls + asked.replayed:
        prompt, untried = None, f"not tried: {asked.error}"
    weights, pair_s = _try_weights(session, state)
    rates = plan.Rates(load_s, reply_s, pair_s)
    return Advice(
        cfg=cfg,
        right=estimate([getattr(s.reward, by) for s in rows]),
        needs=demand,
        followed=followed,
        instructions=told,
        weights=weights,
        prompt=prompt,
        untried=untried,
        expected=expected(trees, cfg.backbone, followed / max(told, 1), demand[ESTIMATORS[0]]),
        trees=len(trees.instances),
        plan=plan.plan(cfg, task, price, rates),
        peak_mb=peak_megabytes(),
    )


def _try_prompt(run: Session, state: State, needs: Needs) -> Trial:
    """Make one symbolic move with a single candidate."""
    from nslora.algorithm.symbolic import symbolic

    started, before = time.perf_counter(), run.spent
    outcome = symbolic(run, state, needs)
    dev = run.score(outcome.candidate.prompt, run.task.dev)
    seconds, spent = time.perf_counter() - started, run.spent - before
    calls, tokens = int(spent.editor_calls), int(spent.editor_tokens)
    return _trial(state, dev, seconds, calls=calls, tokens=tokens)


def _try_weights(run: Session, state: State) -> tuple[Trial, float]:
    """Make one numerical move on few rows, those that fail first; return it and the seconds of a pair."""
    from nslora.algorithm.needs import ESTIMATORS
    from nslora.algorithm.numerical import numerical

    rows = sorted(state.train, key=lambda s: s.reward.success)[:TUNED]
    examples = tuple(s.example for s in rows)
    run.enter(replace(run.task, train=examples, feedback=examples))
    few, prompt, dev = replace(state, train=rows), state.candidate.prompt, run.task.dev

    def losses() -> tuple[np.ndarray, np.ndarray]:
        gold = run.nll(prompt, dev)
        return np.array(gold), np.array(run.nll(prompt, others(dev))) - gold

    loss_before, margin_before = losses()
    started, worked, spent = time.perf_counter(), run.work_s, run.spent
    numerical(run, few, ESTIMATORS["none"](run, few))
    pair_s = (run.work_s - worked) / (PASSES * len(rows))
    scored, (loss, margin) = run.score(prompt, dev), losses()
    bill = run.spent - spent
    tried = _trial(
        state,
        scored,
        time.perf_counter() - started,
        calls=int(bill.editor_calls),
        tokens=int(bill.editor_tokens),
        loss=(float(loss_before.mean()), float(loss.mean())),
        content=seed_interval(margin - margin_before, bounds=ANY),
    )
    return tried, pair_s


def others(examples: Sequence[Example]) -> list[Example]:
    """Return the questions, each with the answer of the next row that has another one."""
    turned = []
    for i, example in enumerate(examples):
        answers = [other.answer for other in [*examples[i:], *examples[:i]]]
        other = next((a for a in answers if a != example.answer), example.answer)
        turned.append(replace(example, id=f"{example.id}, another answer", answer=other))
    return turned


def _trial(state: State, dev: Sequence[Scored], seconds: float, **more: Any) -> Trial:
    before, after = (float(np.mean([s.reward.value for s in rows])) for rows in (state.dev, dev))
    right = float(np.mean([s.reward.success for s in dev]))
    return Trial(len(dev), before, after, right, seconds, **more)


# ---- what schedules brought elsewhere


def expected(
    trees: Trees, backbone: str, follows: float, demand: Mapping[str, float]
) -> Expected | None:
    """Return what moves brought to instances that are alike; None where none is.

    Alike is the same backbone, or where it has no trees those that follow as many instructions, with
    as large a share of style needs.
    """
    missing = sum(demand.values())
    if trees.instances.empty or not missing:
        return None
    about = trees.instances
    same = about.backbone == backbone
    words = f"of {backbone}"
    if not same.any():
        same = (about.follows.astype(float) - follows).abs() <= NEAR
        words = "of backbones that follow prompts as far"
    style = demand["style"] / missing
    alike = trees.where(same & ((style_share(trees) - style).abs() <= NEAR))
    if alike.instances.empty:
        return None
    start, one_n, one_s = (_ends(alike, schedule) for schedule in ("", "N", "S"))
    by_weights, by_prompt = (chosen_on_dev(alike, letter) for letter in "NS")
    pairs = {"weights": (one_n, start), "prompt": (one_s, start)}
    pairs["prompt_first"] = (by_prompt, by_weights)
    intervals = {
        name: over_instances(difference(alike, *ends), DIFFERENCE) for name, ends in pairs.items()
    }
    return Expected(f"{len(alike.instances)} schedule trees {words}", **intervals)


def _ends(trees: Trees, schedule: str) -> pd.DataFrame:
    """Return ends at one schedule of every instance."""
    return pd.DataFrame(
        {NODE[0]: trees.instances.index, NODE[1]: schedule, "weight": 1.0, "why": ""}
    )
