"""The `nslora` command.

Wrong input ends with one sentence and exit status 2, before anything is downloaded or spent.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nslora import __version__
from nslora.config import TASKS, RunConfig, sentence
from nslora.editor.ledger import price
from nslora.experiments.grid import NOISE, Profile, jobs, load
from nslora.model import checkpoints
from nslora.model.gguf import QUANTISATIONS
from nslora.runs import evaluate, lengths, preflight
from nslora.runs.adapt import adapt, check, foresee
from nslora.runs.bundles import forms
from nslora.runs.limits import Limits
from nslora.runs.show import print_step
from nslora.runs.store import Store, read_json
from nslora.tasks import graders, own
from nslora.types import Json, Prompt, UserError

Command = Callable[[Namespace], int]
# by name, what argparse takes
Options = dict[str, Json]
DEFAULT = RunConfig()
# what a machine answers where a file cannot be read or written
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; return the exit status.

    0: done, 1: something failed, 2: wrong input, 3: what was adapted is not shown to be better, 130:
    interrupted.
    """
    warnings.filterwarnings("ignore", NOISE)
    # a scheduler or `timeout` must not leave processes behind
    signal.signal(signal.SIGTERM, interrupt)
    args = parser().parse_args(argv)
    try:
        return args.command(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        # of this machine, not of this library
        if error.errno not in REFUSALS:
            raise
        print(f"{error.filename or 'the disk'}: {error.strerror}.", file=sys.stderr)
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


def parser() -> ArgumentParser:
    """Build the parser of all commands and their options."""
    top = ArgumentParser(
        prog="nslora", description="Decide when to tune weights and when to rewrite prompts."
    )
    top.add_argument("--version", action="version", version=f"nslora {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    for name, (command, text, example, options) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=text, description=text, epilog=f"example: nslora {name} {example}".rstrip()
        )
        sub.set_defaults(command=command)
        for option, details in options.items():
            sub.add_argument(option, **details)
    return top


def settings(args: Namespace) -> Json:
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
        raise UserError(sentence(error, key)) from None


# ---- single runs


def models(args: Namespace) -> int:
    """Print the table of default backbones."""
    for w in checkpoints.BACKBONES.values():
        state = "cached" if checkpoints.is_cached(w.key) else f"{w.bytes / 1e6:.0f} MB to fetch"
        print(f"{w.key:20} {w.title}; {w.licence}; {w.params / 1e6:.0f}M parameters; {state}")
        print(f"{'':20} {w.note}; {w.source}")
    return 0


def run(args: Namespace) -> int:
    """Make one run; print its final scores and its record's folder."""
    cfg = RunConfig.of({"task": args.task} | settings(args))
    preflight.check([cfg])
    from nslora.runs.run import make_run

    record = make_run(
        cfg,
        Store(args.out / "results", args.out / "runs"),
        watch=print_step,
    )
    print(json.dumps(read_json(record / "run.json")["final"], indent=1))
    print(record)
    return 0


def data_settings(args: Namespace) -> Json:
    """Return the settings of a run on own data as the command line gives them; raises UserError."""
    given = settings(args)
    if args.reward and "reward" in given:
        raise UserError("give --reward file.py:function or --set reward=..., not both.")
    own_data = {"grader": args.grader, "columns": args.map, "test": args.test} | start(args)
    own_data["judge"] = "\n".join(args.judge)
    return own_data | ({"reward": args.reward} if args.reward else {}) | given


def start(args: Namespace) -> Json:
    """Return the prompt to start from, as settings; raises UserError for a file that holds none."""
    if args.prompt is None:
        return {} if args.system is None else {"system": args.system}
    if args.system is not None:
        raise UserError("give --system or --prompt, not both.")
    try:
        text = args.prompt.read_text(encoding="utf-8")
        prompt = (
            TypeAdapter(Prompt).validate_json(text) if text[:1] == "{" else Prompt(text.strip())
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--prompt {args.prompt} holds no prompt ({reason}).") from None
    return {"system": prompt.system, "template": prompt.question}


def check_data(args: Namespace) -> int:
    """Print what is in a data file and all that is wrong with it; exit status 2 if anything is."""
    cfg, data = check(args.data, **data_settings(args))
    lines = own.describe(data)
    if data.items:
        lines.append(lengths.describe(data.items, cfg, lengths.measure(cfg.backbone)))
    print("\n".join([*lines, *data.problems]))
    return 2 if data.problems else 0


def adapt_own(args: Namespace) -> int:
    """Adapt to own data; print whether the result is better, and where it is; exit status 3 if not.

    With `--plan`, print what that would take.
    """
    editor = {"editor_url": args.editor_url, "editor_model": args.editor_model}
    own_limits = limits(args)
    given: Json = editor | data_settings(args)
    given |= {"out": args.out, "limits": own_limits}
    if args.plan:
        from nslora.runs.plan import describe

        cfg, plan = foresee(args.data, **given)
        print("\n".join(describe(plan, cfg)))
        return 0
    result = adapt(args.data, judge_sample=args.judge_sample, **given)
    print(result.verdict.sentence)
    print(result.verdict.forgotten)
    if result.stopped:
        print(result.goes_on)
    print(f"see {result.folder / 'README.md'}")
    return 0 if result.verdict.better else 3


def advise_own(args: Namespace) -> int:
    """Print what adapting to own data would bring, by which moves, and at what cost."""
    # imports pandas and matplotlib
    from nslora.study.advise import advise

    editor = {"editor_url": args.editor_url, "editor_model": args.editor_model}
    given: Json = editor | data_settings(args) | {"schedules": args.schedules}
    advice = advise(args.data, price=price(args.price, "--price"), **given)
    print("\n".join(advice.lines))
    return 0


def limits(args: Namespace) -> Limits:
    """Return the limits of a run as the command line gives them; raises UserError."""
    named = {name: getattr(args, name) for name in ("minutes", "tokens", "money")}
    given = {name: limit for name, limit in named.items() if limit is not None}
    return Limits(**given, price=price(args.price, "--price"))


def grading(args: Namespace) -> Json:
    """Return how the rows of `evaluate` and `compare` are graded, and where the weights are."""
    return {
        "grader": args.grader,
        "columns": args.map,
        "reward": args.reward,
        "backbone": args.backbone,
    }


def evaluate_bundle(args: Namespace) -> int:
    """Print how good a bundle is on rows."""
    score = evaluate.evaluate(args.bundle, args.data, **grading(args))
    print(f"{score.mean:.2f} on {score.n} rows ({score})")
    return 0


def compare_two(args: Namespace) -> int:
    """Print whether the second model is better than the first, and on which rows; exit status 3 if not."""
    compared = evaluate.compare(args.first, args.second, args.data, **grading(args))
    print(compared.sentence)
    print(compared.rows)
    return 0 if compared.better else 3


def chat(args: Namespace) -> int:
    """Print the reply to one question, or to each line of standard input."""
    bundle = evaluate.open_bundle(args.bundle, args.backbone)
    for line in [args.ask] if args.ask else sys.stdin:
        if question := line.strip():
            (reply,) = bundle.replies([question])
            print(reply, flush=True)
    return 0


def export_bundle(args: Namespace) -> int:
    """Write a bundle in a form that other tools load; print where it is."""
    print(forms.export(args.bundle, args.out, args.to, args.quantisation, args.backbone))
    return 0


def probe_needs(args: Namespace) -> int:
    """Probe with the settings of the full profile; fit and package the need classifier."""
    checkpoints.check(args.backbone)
    profile = load("full")
    like = [cfg for cfg in profile.runs if cfg.backbone == args.backbone]
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


def show_plan(args: Namespace) -> int:
    """Print one line per job and the totals of what is left."""
    from nslora.experiments import forecast

    profile = load(args.profile)
    warn_of_unnamed(profile)
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


def cost(row: Json) -> str:
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


def warn_of_unnamed(profile: Profile) -> None:
    """Say which records are of runs that the profile does not name: tables would mix two kinds of settings."""
    if names := profile.unnamed:
        say(
            f"note: {profile.results / 'records'} has {len(names)} of runs that experiments.toml does not name "
            f"(settings changed?), and tables count them, too; move them elsewhere to leave them out: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        )


def require_jobs(args: Namespace) -> None:
    """Raise UserError unless at least one job may run at a time."""
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}.")


def reproduce(args: Namespace) -> int:
    """Run the jobs of a profile, then print the main table."""
    from nslora.experiments import cluster
    from nslora.experiments import jobs as local
    from nslora.experiments.registration import require_frozen_code

    require_jobs(args)
    profile = load(args.profile)
    warn_of_unnamed(profile)
    made = profile.store.accept if args.reuse else profile.store.done
    # what is only read may be read by newer code
    if not all(map(made, profile.runs)):
        require_frozen_code(profile.root, profile.name)
    preflight.check(configs_left(profile))
    if args.cluster:
        failed = cluster.reproduce(profile, args.cluster, args.gpu, args.reuse, say)
    else:
        run = partial(
            local.run_jobs,
            parallel=args.jobs,
            reuse=args.reuse,
            say=say,
        )
        failed = local.reproduce(profile, run, args.reuse, say)
    if failed:
        say(f"failed: {', '.join(failed)}")
        return 1
    say("everything is done.")
    # where no run was scored, there is no table
    scores = profile.results.glob("records/*/scores.csv")
    return table(args) if any(path.stat().st_size for path in scores) else 0


def schedules(args: Namespace) -> int:
    """Grow the schedule trees of a profile."""
    from nslora.experiments.registration import require_frozen_code

    require_jobs(args)
    profile = load(args.profile)
    if not profile.schedules:
        raise UserError(f"profile {args.profile!r} has no schedules in experiments.toml.")
    from nslora.experiments import schedules as trees

    left = trees.left(profile, say)
    if left:
        require_frozen_code(profile.root, profile.name)
    preflight.check(left)
    from nslora.experiments.jobs import end_with

    # each process takes the next tree that nobody grows
    command = [sys.executable, "-m", "nslora.cli", "schedules", "--profile", args.profile]
    # killed or not, this process leaves none behind
    with_us = partial(end_with, os.getpid())
    with preflight.one_engine(list(profile.schedules), args.jobs):
        others = [subprocess.Popen(command, preexec_fn=with_us) for _ in range(args.jobs - 1)]
        try:
            failed = trees.grow_all(profile, say)
            statuses = [other.wait() for other in others]
            return int(bool(failed) or any(statuses))
        finally:
            # where this process was interrupted
            for other in others:
                other.terminate()


def figures(args: Namespace) -> int:
    """Rebuild tables and figures; print the files written."""
    from nslora.experiments import forecast
    from nslora.study import report

    profile = load(args.profile)
    warn_of_unnamed(profile)
    for path in (*report.build(profile.results), forecast.save(profile)):
        print(path)
    return 0


def table(args: Namespace) -> int:
    """Print the main table."""
    from nslora.study import report

    print(report.show_table(load(args.profile).results))
    return 0


def verify(args: Namespace) -> int:
    """Recompute; exit status 1 if anything differs from what is on disk, or from what was registered."""
    from nslora.experiments import preregistration
    from nslora.study import report

    profile = load(args.profile)
    warn_of_unnamed(profile)
    differences = report.verify(profile.results) + preregistration.disagreements(profile)
    agreed = "claims and tables agree with the records"
    if not report.begun(profile.results):
        agreed = f"{profile.results} has no records and no tables yet"
    print("\n".join(differences) or agreed)
    if made := preregistration.progress(profile):
        print(made)
    return int(bool(differences))


def freeze(args: Namespace) -> int:
    """Write the pre-registration of a profile; print its path."""
    from nslora.experiments import preregistration

    print(preregistration.freeze(load(args.profile)))
    return 0


def bench(args: Namespace) -> int:
    """Measure speed and memory; print the files written."""
    from nslora.bench import measure
    from nslora.model.backbone import fastest_device

    whole = measure.GPU if fastest_device() == "cuda" else measure.FULL
    size = measure.SMALL if args.small else whole
    for path in measure.run(args.out, size, args.threads, args.only, say):
        print(path)
    return 0


# ---- what can be asked for

BACKBONE: Options = {
    "--backbone": {
        "default": DEFAULT.backbone,
        "help": "a default, hub:<id>@<revision>, or a folder",
    },
}
SETTINGS: Options = {
    **BACKBONE,
    "--method": {
        "default": DEFAULT.method,
        "help": "such as lora, textgrad, fixed:SNNN or neurosymbolic",
    },
    "--seed": {"type": int, "default": DEFAULT.seed},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "any other setting of a run",
    },
}
RUN: Options = {
    **SETTINGS,
    "--task": {"default": DEFAULT.task, "help": f"{', '.join(TASKS)}, own:<file>"},
    "--out": {
        "type": Path,
        "default": Path("runs/single"),
        "help": "folder of records and checkpoints",
    },
}
ROWS: Options = {
    "data": {"help": "JSONL, JSON, CSV or Parquet of questions and answers, or hub:<owner>/<name>"},
    "--grader": {
        "default": DEFAULT.grader,
        "help": f"auto, {', '.join(graders.GRADERS)}; as in regex:PATTERN, labels:yes|no",
    },
    "--reward": {
        "default": "",
        "metavar": "FILE.py:FUNCTION",
        "help": "your own grader: (question, answer, reply) -> number in [0, 1], or with a critique",
    },
    "--map": {
        "default": DEFAULT.columns,
        "metavar": "FIELD=COLUMN,...",
        "help": "names of the columns, as in question=ask,answer=reply",
    },
}
DATA: Options = {
    **SETTINGS,
    **ROWS,
    "--test": {"default": "", "metavar": "FILE", "help": "other rows to test on"},
    "--judge": {
        "action": "append",
        "default": [],
        "metavar": "CRITERION",
        "help": "the external LLM grades replies by it; several are parts of the reward",
    },
    "--system": {"metavar": "TEXT", "help": "the system prompt to start from"},
    "--prompt": {
        "type": Path,
        "metavar": "FILE",
        "help": "the prompt to start from: a system prompt, or a prompt.json",
    },
}
BUNDLE: Options = {
    "bundle": {"type": Path, "help": "a folder that nslora adapt has written"},
    "--backbone": {"default": "", "help": "where its weights are now, if they have moved"},
}
SCORED: Options = {
    **ROWS,
    # unless they are given, those that the bundle was adapted with
    "--grader": {**ROWS["--grader"], "default": ""},
    "--map": {**ROWS["--map"], "default": None},
}
EVALUATE: Options = {**BUNDLE, **SCORED}
COMPARE: Options = {
    "first": {"help": "a folder that nslora adapt has written, or a backbone"},
    "second": {"help": "another one, or a backbone: is it better than the first?"},
    **SCORED,
    "--backbone": BUNDLE["--backbone"],
}
CHAT: Options = {
    **BUNDLE,
    "--ask": {"metavar": "TEXT", "help": "one question; without it, each line of standard input"},
}
EXPORT: Options = {
    **BUNDLE,
    "--to": {"required": True, "help": f"{', '.join(forms.FORMS)}"},
    "--out": {"type": Path, "required": True, "help": "new folder"},
    "--quantisation": {
        "default": "",
        "metavar": "NAME",
        "help": f"gguf, ollama: {', '.join(QUANTISATIONS)}; merged: {', '.join(forms.DTYPES)}",
    },
}
PAID: Options = {
    **DATA,
    "--editor-url": {"default": DEFAULT.editor_url},
    "--editor-model": {"default": DEFAULT.editor_model},
    "--price": {
        "default": "",
        "metavar": "IN,OUT",
        "help": "US dollars per million tokens in and out; default: NSLORA_EDITOR_PRICE",
    },
}
ADVISE: Options = {
    **PAID,
    "--schedules": {
        "type": Path,
        "default": Path("results/schedules"),
        "help": "folder of schedule trees, for what moves brought elsewhere",
    },
}
ADAPT: Options = {
    **PAID,
    "--out": {"type": Path, "required": True, "help": "new folder for the adapted model"},
    "--judge-sample": {
        "default": "",
        "metavar": "FILE",
        "help": "labelled replies (columns reply and label) on which the judge is tried first",
    },
    "--minutes": {
        "type": float,
        "metavar": "M",
        "help": "end in that time; with more room, the same command goes on from the last move",
    },
    "--tokens": {"type": float, "metavar": "T", "help": "of the external LLM, in and out, at most"},
    "--money": {"type": float, "metavar": "X", "help": "US dollars for those tokens, at most"},
    "--plan": {"action": "store_true", "help": "say what it would take at most, and end"},
}
PROBE: Options = {
    **BACKBONE,
    "--number": {"type": int, "default": 0, "help": "which probe set and style rule"},
}
PROFILE: Options = {"--profile": {"default": "quick"}}
SCHEDULES: Options = {
    **PROFILE,
    "--jobs": {"type": int, "default": 1, "help": "jobs at a time"},
}
REPRODUCE: Options = {
    **SCHEDULES,
    "--reuse": {
        "action": "store_true",
        "help": "finished records in the repository count as done",
    },
    "--cluster": {
        "metavar": "ADDRESS",
        "help": "a dask scheduler, whose workers run the jobs",
    },
    "--gpu": {
        "action": "store_true",
        "help": 'on a cluster: each job takes a resource "GPU"',
    },
}
BENCH: Options = {
    "--small": {
        "action": "store_true",
        "help": "a few minutes' try of everything; not a result",
    },
    "--out": {"type": Path, "default": Path("results/bench")},
    "--only": {"metavar": "PART", "help": "measure one part again and keep the others"},
    "--threads": {"type": int, "default": DEFAULT.threads},
}
# by name: what is done, in words, an example's arguments, and the options
COMMANDS: dict[str, tuple[Command, str, str, Options]] = {
    "models": (models, "list the default backbones, their licences, sizes and sources", "", {}),
    "run": (run, "make one run and print where its record is", "--task facts --method lora", RUN),
    "check": (
        check_data,
        "find all that is wrong with a data file, and say how its replies will be graded",
        "mine.jsonl --map question=ask,answer=reply",
        DATA,
    ),
    "advise": (
        advise_own,
        "say in minutes whether to tune weights, rewrite the prompt, both or neither, and what it costs",
        "mine.jsonl --backbone qwen2.5-coder-0.5b",
        ADVISE,
    ),
    "adapt": (
        adapt_own,
        "adapt a backbone to your own data; exit status 0 if that is better than the start, else 3",
        "mine.jsonl --reward score.py:score --test held_out.jsonl --minutes 30 --out adapted",
        ADAPT,
    ),
    "evaluate": (
        evaluate_bundle,
        "score an adapted model on rows, with an interval",
        "adapted held_out.jsonl",
        EVALUATE,
    ),
    "compare": (
        compare_two,
        "tell whether a second model is better than a first on the same rows; exit status 0 if it is, else 3",
        "qwen2.5-coder-0.5b adapted held_out.jsonl",
        COMPARE,
    ),
    "chat": (chat, "ask an adapted model", 'adapted --ask "What is the capital of Peru?"', CHAT),
    "export": (
        export_bundle,
        "write an adapted model as merged weights, as GGUF, or for Ollama",
        "adapted --to ollama --out for-ollama --quantisation q4_k_m",
        EXPORT,
    ),
    "probe": (
        probe_needs,
        "try both moves on a probe set and fit the need classifier on all probes",
        "--backbone smollm2-135m --number 1",
        PROBE,
    ),
    "plan": (
        show_plan,
        "print the jobs of a profile, which are done, and what the rest will cost",
        "--profile full",
        PROFILE,
    ),
    "reproduce": (
        reproduce,
        "run every job of a profile that is not done",
        "--profile quick --jobs 2",
        REPRODUCE,
    ),
    "schedules": (
        schedules,
        "try every schedule of a profile's instances, each move once",
        "--profile tuning --jobs 2",
        SCHEDULES,
    ),
    "figures": (
        figures,
        "rebuild all tables and figures from the records",
        "--profile quick",
        PROFILE,
    ),
    "verify": (
        verify,
        "recompute claims and tables from the records and compare",
        "--profile quick",
        PROFILE,
    ),
    "freeze": (
        freeze,
        "register a study before anything of it is run: its code, runs and claims",
        "--profile full",
        PROFILE,
    ),
    "table": (table, "print the main table", "--profile quick", PROFILE),
    "bench": (
        bench,
        "measure our parts beside the tools that they replace",
        "--only train",
        BENCH,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
