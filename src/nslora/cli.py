"""The `nslora` command. Wrong input ends with one sentence and exit status 2 before anything is downloaded or spent."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from nslora.config import RunConfig
from nslora.experiments.grid import jobs, load, needed, plan, save_expectation
from nslora.model import checkpoints
from nslora.runs.store import Store
from nslora.types import UserError

GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; the exit status (0 done, 1 something failed, 2 wrong input, 130 interrupted)."""
    signal.signal(signal.SIGTERM, interrupt)
    args = parser().parse_args(argv)
    try:
        return args.command(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command goes on from the last finished run.", file=sys.stderr
        )
        return 130


def interrupt(*_: object) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="nslora", description="Decide when to tune weights and when to rewrite prompts."
    )
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=function)
        return sub

    command("models", models, "list the default backbones, their licences, sizes and sources")
    for name, function, help in (
        ("run", run, "make one run and print where its record is"),
        (
            "adapt",
            adapt,
            "adapt a backbone to your own JSONL; writes a PEFT adapter and a plain prompt",
        ),
    ):
        sub = command(name, function, help)
        sub.add_argument(
            "--backbone",
            default=RunConfig.backbone,
            help="a default, hub:<id>@<revision>, or a folder",
        )
        sub.add_argument("--method", default=RunConfig.method)
        sub.add_argument("--seed", type=int, default=RunConfig.seed)
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="any other setting of a run",
        )
        if name == "run":
            sub.add_argument(
                "--task",
                default=RunConfig.task,
                help="facts, style, math, mixed, stream, own:<file.jsonl>",
            )
            sub.add_argument(
                "--out",
                type=Path,
                default=Path("runs/single"),
                help="folder of records and checkpoints",
            )
        else:
            sub.add_argument("data", type=Path, help='JSONL of {"question", "answer", "rules"?}')
            sub.add_argument(
                "--out", type=Path, required=True, help="new folder for the adapted model"
            )
            sub.add_argument("--editor-url", default=RunConfig.editor_url)
            sub.add_argument("--editor-model", default=RunConfig.editor_model)
    sub = command(
        "probe",
        probe_needs,
        "try both moves on a probe set and fit the need classifier on all probes",
    )
    sub.add_argument("--backbone", default=RunConfig.backbone)
    sub.add_argument("--number", type=int, default=0, help="which probe set and style rule")
    for name, function, help in (
        (
            "plan",
            show_plan,
            "print the jobs of a profile, which are done, and what the rest will cost",
        ),
        ("reproduce", reproduce, "run every job of a profile that is not done"),
        ("figures", figures, "rebuild all tables and figures from the records"),
        ("verify", verify, "recompute claims and tables from the records and compare"),
        ("table", table, "print the main table"),
    ):
        sub = command(name, function, help)
        sub.add_argument("--profile", default="quick")
        if name == "reproduce":
            sub.add_argument("--jobs", type=int, default=1, help="jobs at a time")
            sub.add_argument(
                "--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the jobs"
            )
            sub.add_argument(
                "--reuse",
                action="store_true",
                help="finished records in the repository count as done",
            )
            sub.add_argument(
                "--cluster", metavar="ADDRESS", help="a dask scheduler, whose workers run the jobs"
            )
            sub.add_argument(
                "--gpu", action="store_true", help='on a cluster: each job takes a resource "GPU"'
            )
    sub = command("bench", bench, "measure our parts beside the tools that they replace")
    sub.add_argument(
        "--small", action="store_true", help="a few minutes' try of everything; not a result"
    )
    sub.add_argument("--out", type=Path, default=Path("results/bench"))
    sub.add_argument("--only", metavar="PART", help="measure one part again and keep the others")
    sub.add_argument("--threads", type=int, default=RunConfig.threads)
    return top


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse KEY=VALUE settings by the types of RunConfig; raises UserError."""
    hints, parsed = get_type_hints(RunConfig), {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in {f.name for f in fields(RunConfig)}:
            raise UserError(
                f"--set {pair!r} must be KEY=VALUE with KEY one of {', '.join(f.name for f in fields(RunConfig))}."
            )
        try:
            parsed[key] = (
                {"true": True, "false": False}[text.lower()]
                if hints[key] is bool
                else hints[key](text)
            )
        except (ValueError, KeyError):
            raise UserError(
                f"setting {key} must be of type {hints[key].__name__}, not {text!r}."
            ) from None
    return parsed


def config(args: argparse.Namespace, **more: Any) -> RunConfig:
    """The checked RunConfig of a command line: settings, backbone, data, editor key, room for the download."""
    chosen = {"backbone": args.backbone, "method": args.method, "seed": args.seed} | more
    cfg = RunConfig.of(chosen | settings(args.set))
    check([cfg])
    return cfg


def check(configs: Sequence[RunConfig]) -> None:
    """Raise UserError for whatever would stop these runs later: a backbone, data, a key, a full disk."""
    from nslora.editor.client import Editor

    for backbone in {cfg.backbone for cfg in configs}:
        checkpoints.check(backbone)
    for model, url in {(cfg.editor_model, cfg.editor_url) for cfg in configs}:
        Editor(model, url).close()  # looks at the name, the address and the key; starts nothing
    for cfg in {cfg.task: cfg for cfg in configs if cfg.task.startswith("own:")}.values():
        from nslora.tasks.build import build

        build(cfg)
    need = 3 * downloads(
        configs
    )  # the file, its parts while they are joined, and the converted copy
    folder = next(
        f for f in (checkpoints.cache_dir(), *checkpoints.cache_dir().parents) if f.exists()
    )
    if need > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"the models need {need / GB:.1f} GB in {checkpoints.cache_dir()}, which has {free / GB:.1f} GB free."
        )


def downloads(configs: Sequence[RunConfig]) -> int:
    """Bytes of default weights that these runs still have to fetch."""
    return sum(w.bytes for w in needed(configs) if not checkpoints.is_cached(w.key))


def models(args: argparse.Namespace) -> int:
    """Print the table of default backbones."""
    for w in checkpoints.BACKBONES.values():
        state = "cached" if checkpoints.is_cached(w.key) else f"{w.bytes / 1e6:.0f} MB to fetch"
        print(
            f"{w.key:20} {w.title}; {w.licence}; {w.params / 1e6:.0f}M parameters; {state}\n"
            f"{'':20} {w.note}; {w.source}"
        )
    return 0


def run(args: argparse.Namespace) -> int:
    """Make one run."""
    cfg = config(args, task=args.task)
    from nslora.runs.run import make_run

    record = make_run(cfg, Store(args.out / "results", args.out / "runs"), watch=say_step)
    print(json.dumps(json.loads((record / "run.json").read_text())["final"], indent=1))
    print(record)
    return 0


def say_step(step: Any) -> None:
    """One line per move on standard error."""
    print(
        f"move {step.step}: {step.move.value}, dev {step.dev['value']:.2f}",
        file=sys.stderr,
        flush=True,
    )


def adapt(args: argparse.Namespace) -> int:
    """Adapt to own data, then copy the best candidate out as files that need only transformers and peft."""
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"folder {args.out} is not empty; choose a new one.")
    if not args.data.is_file():
        raise UserError(f"there is no file {args.data}.")
    editor = {"editor_url": args.editor_url, "editor_model": args.editor_model}
    cfg = config(args, task=f"own:{args.data.resolve()}", **editor)
    from nslora.runs.export import bundle
    from nslora.runs.run import make_run

    work = args.out.with_name(f".{args.out.name}.part")
    shutil.rmtree(work, ignore_errors=True)  # the data may have changed since an interrupted try
    store = Store(work / "record", work / "runs")
    make_run(cfg, store, watch=say_step)
    bundle(cfg, store, args.out)
    shutil.rmtree(work)
    result = json.loads((args.out / "record" / "run.json").read_text())
    print(f"test success {result['final']['test']['success']:.2f}; see {args.out / 'README.md'}")
    return 0


def probe_needs(args: argparse.Namespace) -> int:
    """Probe with the settings of the full profile; writes results/classifier/ and the packaged classifier."""
    checkpoints.check(args.backbone)
    profile = load("full")
    like = [
        cfg for runs in profile.notebooks.values() for cfg in runs if cfg.backbone == args.backbone
    ]
    if not like:
        raise UserError(
            f"profile 'full' has no runs on {args.backbone!r} whose settings a probe could share."
        )
    from nslora.experiments import probe

    cfg = probe.configure(like[0], args.number)
    check([cfg])
    folder = profile.results / "classifier"
    print(probe.run(cfg, Store(folder, profile.work / "probe")))
    print(json.dumps(probe.train(folder), indent=1))
    return 0


def show_plan(args: argparse.Namespace) -> int:
    """Print one line per job and the totals of what is left."""
    profile = load(args.profile)
    rows = plan(profile)
    for row in rows:
        left = f"{row['left']} of {row['runs']} runs left{cost(row)}" if row["runs"] else "to do"
        print(f"{row['job']:36} {'done' if row['done'] else left}")
    total = {key: sum(row[key] for row in rows) for key in ("left", "seconds", "tokens", "unknown")}
    fetch = downloads([cfg for job in jobs(profile) if not job.done() for cfg in job.configs])
    print(f"total: {total['left']} runs left{cost(total)}; {fetch / 1e6:.0f} MB of models to fetch")
    return 0


def cost(row: dict[str, Any]) -> str:
    """What is left of a job, in words; runs without a like record are counted, not guessed."""
    known = (
        f", about {row['seconds'] / 60:.0f} min and {row['tokens'] / 1000:.0f}k editor tokens"
        if row["seconds"]
        else ""
    )
    return known + (f", {row['unknown']} of unknown cost" if row["unknown"] else "")


def reproduce(args: argparse.Namespace) -> int:
    """Run the jobs of a profile."""
    from nslora.experiments import cluster
    from nslora.experiments.jobs import reproduce

    part, _, parts = args.shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard must be I/N with 1 <= I <= N, not {args.shard!r}.")
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}.")
    profile = load(args.profile)
    check([cfg for job in jobs(profile) if not job.done() for cfg in job.configs])
    if args.cluster:
        failed = cluster.reproduce(profile, args.cluster, args.gpu, args.reuse, say)
    else:
        failed = reproduce(profile, args.jobs, (int(part), int(parts)), args.reuse, say)
    if failed:
        say(f"failed: {', '.join(failed)}")
        return 1
    say("everything is done." if int(parts) == 1 else "everything of this shard is done.")
    return table(args) if list(profile.results.glob("records/*/scores.csv")) else 0


def say(line: str) -> None:
    """Progress goes to standard error at once."""
    print(line, file=sys.stderr, flush=True)


def figures(args: argparse.Namespace) -> int:
    """Rebuild tables and figures."""
    from nslora.study import report

    profile = load(args.profile)
    print(*report.build(profile.results), save_expectation(profile), sep="\n")
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

    print(
        *measure.run(
            args.out, measure.SMALL if args.small else measure.Size(), args.threads, args.only, say
        ),
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
