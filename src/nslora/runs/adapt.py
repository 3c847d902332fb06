"""Adapt a backbone to somebody's own data: `nslora.adapt`, and the command of the same name."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from nslora.config import RunConfig
from nslora.disk import saving
from nslora.model import checkpoints
from nslora.runs import judge as judges
from nslora.runs import lengths, preflight, show
from nslora.runs.bundles.bundle import best_step, bundle
from nslora.runs.evaluate import Bundle, open_bundle
from nslora.runs.limits import Limits
from nslora.runs.store import Store, read_json, read_jsonl
from nslora.runs.verdict import Verdict
from nslora.tasks import functions, graders, own, reading
from nslora.types import Json, Prompt, UserError

if TYPE_CHECKING:
    from nslora.runs.plan import Plan
    from nslora.runs.run import Watch

# what a run starts from unless it is told another
INITIAL = Prompt(RunConfig().system, RunConfig().template)


@dataclass(frozen=True)
class Result:
    """What an adaptation leaves.

    Attributes:
        folder: prompt.json, tokenizer/, adapter/ (if weights were tuned), README.md on their use,
            metrics.json, record/.
        prompt: the adapted prompt.
        final: scores of the run's end, as in its receipt; `final["test"]["success"]` is a share.
        verdict: whether it is better than the start, and by how much.
        stopped: which limit ended it, as in "10 minutes"; "" where none did.
    """

    folder: Path
    prompt: Prompt
    final: dict[str, Any]
    verdict: Verdict
    stopped: str = ""

    def chat(self, text: str) -> str:
        """Return the adapted model's reply to a question; the first call loads the model."""
        (reply,) = self._bundle.replies([text])
        return reply

    @cached_property
    def _bundle(self) -> Bundle:
        return open_bundle(self.folder)

    @property
    def goes_on(self) -> str:
        """Which limit ended it and how it goes on, in a sentence; "" where none did."""
        if not self.stopped:
            return ""
        return (
            f"stopped by the limit of {self.stopped} after {self.moves} moves; "
            "called again with more room, it goes on from there."
        )

    @property
    def moves(self) -> int:
        """How many moves were made."""
        return len(read_jsonl(self.folder / "record" / "steps.jsonl")) - 1

    def _repr_html_(self) -> str:
        """Show verdict, prompt and moves in a notebook."""
        record = self.folder / "record"
        steps, clock = (read_jsonl(record / name) for name in ("steps.jsonl", "clock.jsonl"))
        moves = [
            show.row(s["step"], s["move"], s["reason"], s["dev"]["value"], row["seconds"])
            for s, row in zip(steps, clock, strict=True)
        ]
        said = (self.verdict.sentence, self.verdict.forgotten, self.goes_on)
        texts = (("system", self.prompt.system), ("question", self.prompt.question))
        parts = [f"<p>{escape(sentence)}</p>" for sentence in said if sentence]
        return "".join([*parts, show.table(("prompt", ""), texts), show.table(show.HEAD, moves)])


def adapt(
    data: str | Path,
    *,
    out: str | Path,
    watch: Watch | None = None,
    reward: str | Callable[..., Any] = "",
    judge_sample: str = "",
    limits: Limits | None = None,
    **settings: Any,
) -> Result:
    """Adapt a backbone to the questions and answers of a file; write a bundle to `out`.

    Args:
        data: a file as `tasks.reading` takes it, or `hub:<owner>/<name>` of the model hub.
        out: a new or empty folder, or one where a limit has ended the same run, which goes on.
        watch: is called after each move; without one, they are shown.
        reward: grades replies in place of `grader`: a function `(question, answer, reply)` that
            returns a number in [0, 1], or (number, critique), or {"value": number, "critique": text,
            and numbers as parts}; or "file.py:function". `RunConfig`'s setting of that name, too.
        judge_sample: a file of labelled replies, on which a judge is tried before the run.
        limits: what it may take; what was found until then is evaluated and written.
        settings: of `RunConfig`, such as backbone, method, seed, editor_url, test (a file of other
            rows to test on), judge (criteria by which the external LLM grades, one a line), or
            system and template (the prompt to start from).

    Raises UserError, before anything is downloaded or spent, for wrong input.
    """
    limits = replace(limits or Limits(), since=time.perf_counter())
    out = Path(out).absolute()
    cfg, checked = _ready(data, out, reward, limits, settings)
    if judge_sample and not cfg.judge:
        raise UserError("a labelled sample is for a judge: give its criterion, too.")
    labelled = judges.samples(checked.path, judge_sample, cfg.columns) if cfg.judge else []
    preflight.ask_editors([cfg])
    with _alone(out) as work:
        _tell(own.describe(checked))
        store = Store(work / "record", work / "runs")
        _tell(judges.agreement(cfg, store, labelled))
        return _adapt(cfg, store, out, work, watch or show.watcher(), limits)


def _tell(lines: Sequence[str]) -> None:
    """Print to standard error."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _adapt(
    cfg: RunConfig, store: Store, out: Path, work: Path, watch: Watch, limits: Limits
) -> Result:
    """Make the run in the folder `work`, and write its bundle to `out`."""
    # only now: it takes seconds to import, and wrong input is answered at once
    from nslora.runs.run import make_run

    record = make_run(cfg, store, watch=watch, limits=limits)
    run = read_json(record / "run.json")
    step = best_step(record)
    prompt = Prompt(**step["prompt"])
    changed = bool(step["adapter"]) or prompt != Prompt(cfg.system, cfg.template)
    verdict = Verdict.of(cfg, record, changed)
    # renamed when it is whole: `out` holds an adapted model or nothing
    bundle(cfg, store, work / "bundle", verdict)
    with saving(out):
        if out.exists():
            out.replace(work / "before")
        (work / "bundle").replace(out)
        shutil.rmtree(work / "before", ignore_errors=True)
        if not run["stopped"]:
            shutil.rmtree(work)
    return Result(out, prompt, run["final"], verdict, run["stopped"])


def foresee(
    data: str | Path,
    *,
    out: str | Path,
    reward: str | Callable[..., Any] = "",
    limits: Limits | None = None,
    **settings: Any,
) -> tuple[RunConfig, Plan]:
    """Return the settings of an adaptation and what it will take at most; arguments as of `adapt`.

    Nothing is fetched, asked for or written. Raises UserError for wrong input.
    """
    limits = limits or Limits()
    cfg, checked = _ready(data, Path(out).absolute(), reward, limits, settings)
    if cfg.judge:
        raise UserError("what a judge asks is not known beforehand: limit its run by minutes.")
    _tell(own.describe(checked))

    # only now: it takes seconds to import
    from nslora.runs.plan import measure, plan
    from nslora.tasks.build import build

    task = build(cfg)
    # what cannot be known is said before anything is measured
    unmeasured = plan(cfg, task, limits.known_price, None)
    rates = measure(cfg, task)
    return cfg, plan(cfg, task, limits.known_price, rates) if rates else unmeasured


def _ready(
    data: str | Path,
    out: Path,
    reward: str | Callable[..., Any],
    limits: Limits,
    settings: Json,
) -> tuple[RunConfig, own.Data]:
    """Return the settings of an adaptation whose input is sound, and its rows; raises UserError."""
    # cheap checks first, then those that read the data
    if "task" in settings:
        raise UserError("setting task cannot be given here: the task is your data.")
    goes_on = _stopped(out)
    if not goes_on:
        if out.name and out.is_dir() and any(out.iterdir()):
            # left by a try that was killed when it had only this to do
            shutil.rmtree(_work(out), ignore_errors=True)
        check_out(out)
    cfg, checked = check(data, reward, **settings)
    own.require(checked.problems)
    if goes_on not in ("", cfg.run_id):
        raise UserError(
            f"folder {out} holds another run, which a limit has ended; choose a new one."
        )
    limits.require_price(cfg)
    preflight.check([cfg], ask=False)
    return cfg, checked


def check(
    data: str | Path, reward: str | Callable[..., Any] = "", **settings: Any
) -> tuple[RunConfig, own.Data]:
    """Return the settings of an adaptation to a file, and the file's rows with all its problems.

    Unless they are set, the reply limit follows from the answers, and the prompt limit from the start
    prompt. Raises UserError for a wrong setting and for a file that cannot be read at all.
    """
    settings = _graded(reward, settings)
    # wrong settings are answered before a file is fetched
    cfg = RunConfig(**{**settings, "task": f"own:{data}"})
    grader = graders.complete(cfg.grader)
    path = reading.fetch(str(data))
    test = cfg.test and str(reading.fetch(cfg.test))
    cfg = cfg.but(task=f"own:{path}", grader=grader, test=test)
    checkpoints.check(cfg.backbone)
    checked = own.inspect(path, cfg.grader, cfg.columns, cfg.test)
    parts = [part for part in (checked, checked.test) if part]
    if "max_new_tokens" not in settings:
        longest = max(lengths.longest_reply(part.items) for part in parts)
        cfg = cfg.but(max_new_tokens=max(cfg.max_new_tokens, longest))
    start = Prompt(cfg.system, cfg.template)
    if "prompt_tokens" not in settings and start != INITIAL:
        cfg = cfg.but(prompt_tokens=lengths.longest_prompt(start, cfg))
    if how := lengths.measure(cfg.backbone):
        for part in parts:
            for item, problem in lengths.problems(part.items, cfg, how):
                part.refuse(own.line(item), problem)
    return cfg, checked


def _graded(reward: str | Callable[..., Any], settings: Json) -> Json:
    """Return settings whose grader is the function `reward`, or the judge, if it is one; raises UserError."""
    if reward in ("number", "parts"):
        # what methods see of a reward
        return settings | {"reward": reward}
    judge = settings.get("judge", "")
    if not isinstance(judge, str):
        # several criteria, one a line
        judge = "\n".join(judge)
        settings = settings | {"judge": judge}
    others = [bool(reward), bool(judge), settings.get("grader", "auto") != "auto"]
    if sum(others) > 1:
        raise UserError("give one of a reward, a judge and a grader.")
    if judge:
        return settings | {"grader": judges.register(judge)}
    if not reward:
        return settings
    return settings | {"grader": functions.register(reward)}


def check_out(out: Path) -> None:
    """Raise UserError unless `out` can become a folder of its own."""
    if not out.name:
        raise UserError(f"{out} cannot be a folder of its own; choose a new one.")
    if out.resolve() == Path.cwd():
        raise UserError("the adapted model needs a folder of its own, not the working directory.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a new folder.")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"folder {out} is not empty; choose a new one.")


def _stopped(out: Path) -> str:
    """Return the run that a limit has ended in `out`, by its id; "" where there is none."""
    try:
        receipt = read_json(out / "record" / "run.json")
    except (OSError, ValueError):
        receipt = {}
    return receipt["run_id"] if isinstance(receipt, dict) and receipt.get("stopped") else ""


def _work(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


@contextmanager
def _alone(out: Path) -> Iterator[Path]:
    """Yield the folder of the run beside `out`; an interrupted or ended run goes on.

    Raises UserError where another process adapts to `out`.
    """
    work = _work(out)
    with saving(out):
        work.mkdir(parents=True, exist_ok=True)
        (work / "lock").touch()
    try:
        # it goes with the folder, once the bundle is there
        with FileLock(work / "lock", timeout=0):
            if not _stopped(out):
                check_out(out)
            for name in ("bundle", "before"):
                shutil.rmtree(work / name, ignore_errors=True)
            yield work
    except Timeout:
        raise UserError(
            f"another process adapts to {out}; wait for it, or choose another folder."
        ) from None
