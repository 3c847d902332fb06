"""The `nslora` command.

Wrong input ends with one sentence and exit status 2, before anything is downloaded or spent.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nslora import __version__
from nslora.config import TASKS, RunConfig
from nslora.experiments.grid import Profile, jobs, load
from nslora.model import checkpoints
from nslora.runs import lengths, preflight
from nslora.runs.adapt import adapt, check, print_step
from nslora.runs.store import Store
from nslora.tasks import graders, own
from nslora.types import UserError

Command = Callable[[argparse.Namespace], int]
DEFAULT = RunConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; return the exit status.

    0: done, 1: something failed, 2: wrong input, 130: interrupted.
    """
    # a scheduler or `timeout` must not leave processes behind
    signal.signal(signal.SIGTERM, interrupt)
    args = parser().parse_args(argv)
    try:
        return args.command(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("\ninterrupted; the same command goes on from the last finished move.")
        return 130


def interrupt(*_: object) -> None:
    """Make SIGTERM clean up as Ctrl-C does."""
    raise KeyboardInterrupt


def say(line: str) -> None:
    """Print progress to standard error at once."""
    print(line, file=sys.stderr, flush=True)


# ---- what can be asked for


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands and their options."""
    top = argparse.ArgumentParser(
        prog="nslora", description="Decide when to tune weights and when to rewrite prompts."
    )
    top.add_argument("--version", action="version", version=f"nslora {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    add("models", models, "list the default backbones, their licences, sizes and sources")
    add_run(add("run", run, "make one run and print where its record is"))
    text = "find all that is wrong with a data file, and say how its replies will be graded"
    add_data(add("check", check_data, text))
    text = "adapt a backbone to your own data; writes a PEFT adapter and a plain prompt"
    add_adapt(add("adapt", adapt_own, text))
    text = "try both moves on a probe set and fit the need classifier on all probes"
    add_probe(add("probe", probe_needs, text))
    text = "print the jobs of a profile, which are done, and what the rest will cost"
    add_profile(add("plan", show_plan, text))
    add_reproduce(add("reproduce", reproduce, "run every job of a profile that is not done"))
    text = "try every schedule of a profile's instances, each move once"
    add_profile(add("schedules", schedules, text))
    text = "rebuild all tables and figures from the records"
    add_profile(add("figures", figures, text))
    text = "recompute claims and tables from the records and compare"
    add_profile(add("verify", verify, text))
    add_profile(add("table", table, "print the main table"))
    add_bench(add("bench", bench, "measure our parts beside the tools that they replace"))
    return top


def add_settings(sub: argparse.ArgumentParser) -> None:
    """Add the options that choose the settings of a run."""
    text = "a default, hub:<id>@<revision>, or a folder"
    sub.add_argument("--backbone", default=DEFAULT.backbone, help=text)
    text = "such as lora, textgrad, fixed:SNNN or neurosymbolic"
    sub.add_argument("--method", default=DEFAULT.method, help=text)
    sub.add_argument("--seed", type=int, default=DEFAULT.seed)
    text = "any other setting of a run"
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def add_run(sub: argparse.ArgumentParser) -> None:
    """Add the options of `nslora run`."""
    add_settings(sub)
    text = f"{', '.join(TASKS)}, own:<file>"
    sub.add_argument("--task", default=DEFAULT.task, help=text)
    text = "folder of records and checkpoints"
    sub.add_argument("--out", type=Path, default=Path("runs/single"), help=text)


def add_data(sub: argparse.ArgumentParser) -> None:
    """Add the options of `nslora check`: the data, and the settings of a run on them."""
    add_settings(sub)
    text = "JSONL, JSON, CSV or Parquet of questions and answers, or hub:<owner>/<name>"
    sub.add_argument("data", help=text)
    text = f"auto, {', '.join(graders.GRADERS)}; as in regex:PATTERN, labels:yes|no"
    sub.add_argument("--grader", default=DEFAULT.grader, help=text)
    text = "names of the columns, as in question=ask,answer=reply"
    sub.add_argument("--map", default=DEFAULT.columns, metavar="FIELD=COLUMN,...", help=text)


def add_adapt(sub: argparse.ArgumentParser) -> None:
    """Add the options of `nslora adapt`."""
    add_data(sub)
    sub.add_argument("--out", type=Path, required=True, help="new folder for the adapted model")
    sub.add_argument("--editor-url", default=DEFAULT.editor_url)
    sub.add_argument("--editor-model", default=DEFAULT.editor_model)


def add_probe(sub: argparse.ArgumentParser) -> None:
    """Add the options of `nslora probe`."""
    sub.add_argument("--backbone", default=DEFAULT.backbone)
    sub.add_argument("--number", type=int, default=0, help="which probe set and style rule")


def add_profile(sub: argparse.ArgumentParser) -> None:
    """Add the option that chooses a profile of experiments.toml."""
    sub.add_argument("--profile", default="quick")


def add_reproduce(sub: argparse.ArgumentParser) -> None:
    """Add the options of `nslora reproduce`."""
    add_profile(sub)
    sub.add_argument("--jobs", type=int, default=1, help="jobs at a time")
    text = "finished records in the repository count as done"
    sub.add_argument("--reuse", action="store_true", help=text)
    text = "a dask scheduler, whose workers run the jobs"
    sub.add_argument("--cluster", metavar="ADDRESS", help=text)
    text = 'on a cluster: each job takes a resource "GPU"'
    sub.add_argument("--gpu", action="store_true", help=text)


def add_bench(sub: argparse.ArgumentParser) -> None:
    """Add the options of `nslora bench`."""
    text = "a few minutes' try of everything; not a result"
    sub.add_argument("--small", action="store_true", help=text)
    sub.add_argument("--out", type=Path, default=Path("results/bench"))
    text = "measure one part again and keep the others"
    sub.add_argument("--only", metavar="PART", help=text)
    sub.add_argument("--threads", type=int, default=DEFAULT.threads)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a run as the command line gives them; raises UserError."""
    named = {"backbone": args.backbone, "method": args.method, "seed": args.seed}
    return named | dict(map(parse, args.set))


def parse(pair: str) -> tuple[str, Any]:
    """Parse KEY=VALUE by the type of RunConfig's setting; raises UserError."""
    key, equals, text = pair.partition("=")
    fields = RunConfig.model_fields
    if not equals or key not in fields:
        raise UserError(f"--set {pair!r} must be KEY=VALUE with KEY one of {', '.join(fields)}.")
    kind: Any = fields[key].annotation
    try:
        # the type only; bounds are checked with the other settings
        return key, TypeAdapter(kind).validate_strings(text)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f"setting {key} = {text!r}: {problem[:1].lower()}{problem[1:]}.") from None


# ---- single runs


def models(args: argparse.Namespace) -> int:
    """Print the table of default backbones."""
    for w in checkpoints.BACKBONES.values():
        state = "cached" if checkpoints.is_cached(w.key) else f"{w.bytes / 1e6:.0f} MB to fetch"
        print(f"{w.key:20} {w.title}; {w.licence}; {w.params / 1e6:.0f}M parameters; {state}")
        print(f"{'':20} {w.note}; {w.source}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Make one run; print its final scores and its record's folder."""
    cfg = RunConfig.of({"task": args.task} | settings(args))
    preflight.check([cfg])
    from nslora.runs.run import make_run

    record = make_run(cfg, Store(args.out / "results", args.out / "runs"), watch=print_step)
    receipt = json.loads((record / "run.json").read_text(encoding="utf-8"))
    print(json.dumps(receipt["final"], indent=1))
    print(record)
    return 0


def data_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a run on own data as the command line gives them; raises UserError."""
    return {"grader": args.grader, "columns": args.map} | settings(args)


def check_data(args: argparse.Namespace) -> int:
    """Print what is in a data file and all that is wrong with it; exit status 2 if anything is."""
    cfg, data = check(args.data, **data_settings(args))
    lines = own.describe(data)
    if data.items:
        lines.append(lengths.describe(data.items, cfg, lengths.measure(cfg.backbone)))
    print("\n".join([*lines, *data.problems]))
    return 2 if data.problems else 0


def adapt_own(args: argparse.Namespace) -> int:
    """Adapt to own data; print how good the result is and where it is."""
    editor = {"editor_url": args.editor_url, "editor_model": args.editor_model}
    result = adapt(args.data, out=args.out, **(editor | data_settings(args)))
    success = result.final["test"]["success"]
    print(f"test success {success:.2f}; see {result.folder / 'README.md'}")
    return 0


def probe_needs(args: argparse.Namespace) -> int:
    """Probe with the settings of the full profile; fit and package the need classifier."""
    checkpoints.check(args.backbone)
    profile = load("full")
    runs = [cfg for configs in profile.notebooks.values() for cfg in configs]
    like = [cfg for cfg in runs if cfg.backbone == args.backbone]
    if not like:
        raise UserError(
            f"profile 'full' has no runs on {args.backbone!r} whose settings a probe could share."
        )
    # needs torch
    from nslora.experiments import probe

    cfg = probe.configure(like[0], args.number)
    preflight.check([cfg])
    folder = profile.root / "results" / "classifier"
    print(probe.run(cfg, Store(folder, profile.work / "probe")))
    print(json.dumps(probe.train(folder), indent=1))
    return 0


# ---- the grid


def show_plan(args: argparse.Namespace) -> int:
    """Print one line per job and the totals of what is left."""
    from nslora.experiments import forecast

    profile = load(args.profile)
    rows = forecast.plan(profile)
    for row in rows:
        state = "to do"
        if row["done"]:
            state = "done"
        elif row["runs"]:
            state = f"{row['left']} of {row['runs']} runs left{cost(row)}"
        print(f"{row['job']:36} {state}")
    keys = ("left", "seconds", "tokens", "unknown")
    total = {key: sum(row[key] for row in rows) for key in keys}
    fetch = preflight.downloads(configs_left(profile)) / 1e6
    print(f"total: {total['left']} runs left{cost(total)}; {fetch:.0f} MB of models to fetch")
    return 0


def cost(row: dict[str, Any]) -> str:
    """Say what is left of a job; runs without a like record are counted, not guessed."""
    text = ""
    if row["seconds"]:
        minutes, thousands = row["seconds"] / 60, row["tokens"] / 1000
        text += f", about {minutes:.0f} min and {thousands:.0f}k editor tokens"
    if row["unknown"]:
        text += f", {row['unknown']} of unknown cost"
    return text


def configs_left(profile: Profile) -> list[RunConfig]:
    """Return the runs of the jobs that are not done."""
    return [cfg for job in jobs(profile) if not job.done() for cfg in job.configs]


def reproduce(args: argparse.Namespace) -> int:
    """Run the jobs of a profile, then print the main table."""
    from nslora.experiments import cluster
    from nslora.experiments import jobs as local

    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}.")
    profile = load(args.profile)
    preflight.check(configs_left(profile))
    if args.cluster:
        failed = cluster.reproduce(profile, args.cluster, args.gpu, args.reuse, say)
    else:
        failed = local.reproduce(profile, args.jobs, args.reuse, say)
    if failed:
        say(f"failed: {', '.join(failed)}")
        return 1
    say("everything is done.")
    # where no run was scored, there is no table
    scores = profile.results.glob("records/*/scores.csv")
    return table(args) if any(path.stat().st_size for path in scores) else 0


def schedules(args: argparse.Namespace) -> int:
    """Grow the schedule trees of a profile."""
    profile = load(args.profile)
    if not profile.schedules:
        raise UserError(f"profile {args.profile!r} has no schedules in experiments.toml.")
    preflight.check(list(profile.schedules))
    from nslora.experiments import schedules as trees

    trees.grow_all(profile, say)
    return 0


def figures(args: argparse.Namespace) -> int:
    """Rebuild tables and figures; print the files written."""
    from nslora.experiments import forecast
    from nslora.study import report

    profile = load(args.profile)
    for path in (*report.build(profile.results), forecast.save(profile)):
        print(path)
    return 0


def table(args: argparse.Namespace) -> int:
    """Print the main table."""
    from nslora.study import report

    print(report.show_table(load(args.profile).results))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Recompute; exit status 1 if anything differs from what is on disk."""
    from nslora.study import report

    differences = report.verify(load(args.profile).results)
    print("\n".join(differences) or "claims and tables agree with the records")
    return int(bool(differences))


def bench(args: argparse.Namespace) -> int:
    """Measure speed and memory; print the files written."""
    from nslora.bench import measure

    size = measure.SMALL if args.small else measure.Size()
    for path in measure.run(args.out, size, args.threads, args.only, say):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
