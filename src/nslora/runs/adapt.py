"""Adapt a backbone to somebody's own data: `nslora.adapt`, and the command of the same name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.runs import lengths, preflight
from nslora.runs.export import best_step, bundle
from nslora.runs.store import Store
from nslora.tasks import graders, own, reading
from nslora.types import Prompt, StepRecord, UserError


@dataclass(frozen=True)
class Result:
    """What an adaptation leaves.

    Attributes:
        folder: prompt.json, adapter/ (if weights were tuned), README.md on their use, record/.
        prompt: the adapted prompt.
        final: scores of the run's end, as in its receipt; `final["test"]["success"]` is a share.
    """

    folder: Path
    prompt: Prompt
    final: dict[str, Any]


def print_step(step: StepRecord) -> None:
    """Print one line per move to standard error."""
    reason = f" ({step.reason})" if step.reason else ""
    line = f"move {step.step}: {step.move}{reason}, dev {step.dev['value']:.2f}"
    print(line, file=sys.stderr, flush=True)


def adapt(
    data: str | Path,
    *,
    out: str | Path,
    watch: Callable[[StepRecord], None] = print_step,
    **settings: Any,
) -> Result:
    """Adapt a backbone to the questions and answers of a file; write a bundle to `out`.

    Args:
        data: a file as `tasks.reading` takes it, or `hub:<owner>/<name>` of the model hub.
        out: a new or empty folder.
        watch: is called after each move.
        settings: of `RunConfig`, such as backbone, method, seed or editor_url.

    Raises UserError, before anything is downloaded or spent, for wrong input.
    """
    out = Path(out).absolute()
    # cheap checks first, then those that read the data
    if "task" in settings:
        raise UserError("setting task cannot be given here: the task is your data.")
    _check_out(out)
    cfg, checked = check(data, **settings)
    own.require(checked.problems)
    preflight.check([cfg])
    work = _make_work(out)
    for line in own.describe(checked):
        print(line, file=sys.stderr, flush=True)

    # only now: it takes seconds to import, and wrong input is answered at once
    from nslora.runs.run import make_run

    store = Store(work / "record", work / "runs")
    record = make_run(cfg, store, watch=watch)
    run = json.loads((record / "run.json").read_text(encoding="utf-8"))
    result = Result(out, Prompt(**best_step(record)["prompt"]), run["final"])
    # renamed when it is whole: `out` holds an adapted model or nothing
    bundle(cfg, store, work / "bundle")
    (work / "bundle").replace(out)
    shutil.rmtree(work)
    return result


def check(data: str | Path, **settings: Any) -> tuple[RunConfig, own.Data]:
    """Return the settings of an adaptation to a file, and the file's rows with all its problems.

    Unless it is set, the reply limit follows from the answers. Raises UserError for a wrong setting
    and for a file that cannot be read at all.
    """
    # wrong settings are answered before a file is fetched
    cfg = RunConfig(**settings)
    grader = graders.complete(cfg.grader)
    path = reading.fetch(str(data))
    cfg = cfg.but(task=f"own:{path}", grader=grader)
    checkpoints.check(cfg.backbone)
    checked = own.inspect(path, cfg.grader, cfg.columns)
    if "max_new_tokens" not in settings:
        longest = max(cfg.max_new_tokens, lengths.longest_reply(checked.items))
        cfg = cfg.but(max_new_tokens=longest)
    if how := lengths.measure(cfg.backbone):
        for line, problem in lengths.problems(checked.items, cfg, how):
            checked.refuse(line, problem)
    return cfg, checked


def _check_out(out: Path) -> None:
    """Raise UserError unless `out` can become a folder of its own."""
    if out.resolve() == Path.cwd():
        raise UserError("the adapted model needs a folder of its own, not the working directory.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose a new folder.")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"folder {out} is not empty; choose a new one.")


def _make_work(out: Path) -> Path:
    """Make the folder of the run beside `out`, empty: data may differ from an interrupted try's."""
    work = out.with_name(f".{out.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"folder {out} cannot be written ({error.strerror}).") from None
    return work
