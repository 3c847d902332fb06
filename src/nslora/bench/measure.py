"""`nslora bench`: our parts and the tools they replace, measured side by side, every repetition kept.

Each side is a process of its own (`serve`). The sides of a comparison are up together and take turns, A B A B, so
that a slow minute of the machine falls on both; the first turn of each warms up and is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import metadata
from importlib.resources import files
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from nslora.bench import report
from nslora.bench.report import OURS, Row, rate
from nslora.model.backbone import fast_bfloat16, fastest_device
from nslora.runs import store
from nslora.types import UserError

# torch's own defaults, which `kernels` lowers to bound our memory: other sides keep as many compiled products as ever
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
# Settings of SFTTrainer: its own defaults, then what its guides advise for speed, on a base in the dtype that we use.
# The fastest is compared with.
FAST = {"gradient_checkpointing": False}
TRL: dict[str, Row] = {
    "defaults": {"base": "float32"},
    "no checkpointing, by length": FAST | {"train_sampling_strategy": "group_by_length"},
    "no checkpointing, padding-free": FAST | {"padding_free": True, "max_length": None},
    "no checkpointing, packing": FAST | {"packing": True},
}

Size = SimpleNamespace
SIZES = tomllib.loads(files("nslora.bench").joinpath("sizes.toml").read_text(encoding="utf-8"))
FULL, GPU, SMALL = (Size(**SIZES[name]) for name in ("full", "gpu", "small"))
# sides that start at once; a GPU's machine has the cores for it
STARTS = {"cpu": 1, "cuda": 8}
# what names a side in its rows
LABELS = ("part", "case", "size", "side", "setting", "backbone", "threads")
# who answers the editor's requests: ours is the engine that the machine allows
ENGINES: tuple[Row, ...] = (
    {"side": OURS, "engine": "auto"},
    {"side": "llama.cpp", "engine": "llama.cpp"},
)
# our epoch over items of equal length, with all their steps
EPOCH: Row = {"run": "sides.epochs", "side": OURS, "steps": True, "spread": 0.0}


def labels(spec: Row) -> Row:
    """Return what names a side in its rows."""
    return {key: spec[key] for key in LABELS if key in spec}


def environ(spec: Row) -> dict[str, str]:
    """Return the environment of a side's process."""
    own = {
        "OMP_NUM_THREADS": str(spec["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    # the other side runs as its users would run it; moves are ours on both
    ours = spec.get("side", OURS) == OURS or spec["run"].startswith("moves.")
    return {**os.environ, **own, **({} if ours else CACHES)}


@contextmanager
def side(spec: Row) -> Iterator[Callable[..., Row]]:
    """Start a process for what `spec` describes; a call makes one repetition and returns its row.

    Raises UserError with its sentence when the process refuses the spec, RuntimeError with its log when it breaks.
    """
    # a file, for a pipe that nobody reads would stop a talkative side; a folder for what a killed side leaves
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "nslora.bench.serve", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environ(spec) | {"TMPDIR": folder},
        )
        try:
            # the first line says that all is loaded, before any clock runs
            about = labels(spec) | read_row(process, log, spec)

            def repeat(**ask: Any) -> Row:
                line = json.dumps(ask or spec.get("ask", {}))
                print(line, file=process.stdin, flush=True)
                return about | read_row(process, log, spec)

            yield repeat
        finally:
            # an editor's server ends with its pipe to this process
            process.kill()
            process.communicate()


def read_row(process: subprocess.Popen[str], log: IO[bytes], spec: Row) -> Row:
    """Read the next row of a side's process; where it ended instead, raise what its log says."""
    assert process.stdout
    if line := process.stdout.readline():
        return json.loads(line)
    status = process.wait()
    log.seek(0)
    text = log.read().decode(errors="replace").strip()
    if status == 2:
        # the last line is the sentence, libraries may have warned before
        raise UserError(text.splitlines()[-1])
    raise RuntimeError(f"{spec} ended with status {status}: {text[-2000:]}")


def once(spec: Row) -> Row:
    """Return one turn of a side by itself, the first that its process takes."""
    with side(spec) as repeat:
        return repeat(**spec.get("ask", {}))


def measure(specs: Sequence[Row], repetitions: int) -> list[Row]:
    """Return rows of `repetitions` turns of each spec, after one of each that is not counted."""
    with ExitStack() as stack:
        # all are up together, so that they can take turns
        sides = at_once(lambda spec: stack.enter_context(side(spec)), specs)
        for repeat, spec in zip(sides, specs, strict=True):
            repeat(**spec.get("warm", {}))
        turns = product(range(repetitions), sides)
        return [repeat() | {"repetition": i} for i, repeat in turns]


def at_once(call: Callable[[Row], Any], specs: Sequence[Row]) -> list[Any]:
    """Return what `call` returns of each spec, several at once where the machine has room."""
    with ThreadPoolExecutor(STARTS[fastest_device()]) as pool:
        return list(pool.map(call, specs))


def train(size: Size, common: Row) -> Iterator[Row]:
    """Measure our numerical move against the best of TRL's settings, each tried on half of the items."""
    for backbone, case in product(size.backbones, size.learn):
        spec = {**common, **case, "part": "train", "backbone": backbone, "spread": 0.3}
        theirs = [
            spec | {"run": "sides.trl_epochs", "side": "TRL", "setting": name, "settings": settings}
            for name, settings in TRL.items()
        ]
        # one step warms up what an epoch of half the items then measures
        few = {"items": case["items"] // 2, "warm": {"steps": 1}}
        tried = at_once(tried_once, [one | few for one in theirs])
        yield from tried
        rates = list(map(rate, tried))
        best = theirs[rates.index(max(rates))]
        ours = spec | {"run": "sides.epochs", "side": OURS}
        yield from measure([ours, best], size.repetitions)


def on_trial(spec: Row) -> Row:
    """Return the spec of a side whose settings are tried."""
    return spec | {"part": "tried", "case": f"{spec['part']}, {spec['case']}"}


def tried_once(spec: Row) -> Row:
    """Return one turn of a setting of the other side; no work done, with the reason, where it breaks."""
    spec = on_trial(spec)
    try:
        return measure([spec], 1)[0]
    except RuntimeError as error:
        # no rate, so it is never the best; lack of memory is among the reasons
        return labels(spec) | {"work": 0, "seconds": 1.0, "broke": str(error)[-300:]}


def evaluate(size: Size, common: Row) -> Iterator[Row]:
    """Measure our generation against `model.generate` at its best batch size; in float32 texts must be the same."""
    for backbone, case in product(size.backbones, size.answer):
        spec = {**common, **case, "part": "evaluate", "backbone": backbone}
        ours = spec | {"run": "sides.replies", "side": OURS}
        theirs = spec | {"run": "sides.padded_replies", "side": "transformers"}
        # greedy replies differ in bfloat16 by rounding alone, in float32 they would by a mistake
        few = {"part": "float32", "dtype": "float32", "items": size.checked}
        check = [ours | few, theirs | few | {"ask": {"batch": size.checked}}]
        yield from with_share(measure(check, 1), least=1.0)
        tried = list(batch_sizes(theirs, size.batches))
        yield from tried
        best = max(tried, key=rate)
        theirs |= {"setting": best["setting"], "ask": {"batch": best["batch"]}}
        yield from with_share(measure([ours, theirs], size.repetitions), least=0.0)


def batch_sizes(theirs: Row, sizes: Sequence[int]) -> Iterator[Row]:
    """Measure padded generation once at each batch size that its items fill."""
    items = theirs["items"]
    with side(on_trial(theirs)) as repeat:
        repeat(batch=items)
        for n in sizes:
            if n <= items:
                row = repeat(batch=n) | {"setting": f"batches of {n}", "batch": n}
                yield without_texts(row)


def with_share(rows: Sequence[Row], least: float) -> Iterator[Row]:
    """Yield rows of two sides with the share of equal replies for the replies; RuntimeError if it is too low."""
    # sides take turns, so every other row is ours
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        same = [x == y for x, y in zip(a["texts"], b["texts"], strict=True)]
        share = sum(same) / len(same)
        if share < least:
            raise RuntimeError(f"the texts differ in {a['dtype']}: {a['texts']} and {b['texts']}")
        for row in (a, b):
            yield without_texts(row) | {"identical": share}


def without_texts(row: Row) -> Row:
    """Return the row as it is kept."""
    return {key: value for key, value in row.items() if key != "texts"}


def load(size: Size, common: Row) -> Iterator[Row]:
    """Measure our loading of a cached backbone against the GGUF loader of transformers, the file already read once."""
    spec = {**common, "run": "sides.loads", "part": "load", "case": "cached backbone"}
    # one file, read by two loaders
    loaders = ({"side": OURS, "gguf": False}, {"side": "GGUF loader", "gguf": True})
    for backbone in size.backbones:
        specs = [spec | {"backbone": backbone, **loader} for loader in loaders]
        yield from measure(specs, size.repetitions)


def editor(size: Size, common: Row) -> Iterator[Row]:
    """Measure our editor against the bare server, on a new prompt each time and on the same one."""
    servers = (
        {"side": OURS, "run": "sides.edits"},
        {"side": "llama.cpp", "run": "sides.bare_edits"},
    )
    spec = {**common, "part": "editor", "backbone": size.editor, "new_tokens": size.written}
    for case in ("new prompt", "same prompt"):
        specs = [spec | {"case": case, **server} for server in servers]
        yield from measure(specs, size.repetitions)


def arithmetic(size: Size, common: Row) -> Iterator[Row]:
    """Measure operations per second of training and of reading prompts, against large matrix products.

    In float32, and in bfloat16 where the hardware computes in it: emulated, one product takes a minute.
    """
    native = fast_bfloat16(fastest_device())
    dtypes = ("bfloat16", "float32") if native else ("float32",)
    square = {"run": "sides.product", "square": size.matrix}
    products = [square | {"dtype": dtype, "side": f"{dtype} matmul"} for dtype in dtypes]
    # the longest items, which leave least to overhead
    epoch = EPOCH | {"items": size.batch, "tokens": size.learn[-1]["tokens"]}
    prefill = epoch | {"run": "sides.prefill", "steps": False}
    cases = {"training": epoch, "prefill": prefill}
    for backbone, (case, ours) in product(size.backbones, cases.items()):
        what = {**common, "part": "arithmetic", "case": case, "backbone": backbone}
        specs = [what | own for own in (ours, *products)]
        for row in measure(specs, size.repetitions):
            yield row | {"work": row["flop"] / 1e9}


def growth(size: Size, common: Row) -> Iterator[Row]:
    """Measure an epoch by number of items and by length of the examples, in a fresh process each, warmed up."""
    few = 2 * size.batch
    # axis, size along it, items, tokens of each, epochs before
    plan = [("items", n, n, size.tokens[0], size.warm) for n in size.items]
    plan += [("tokens", n, few, n, 1) for n in size.tokens]
    for backbone, (axis, n, items, tokens, times) in product(size.backbones, plan):
        what = {"part": "growth", "case": axis, "size": n, "backbone": backbone}
        warm = {"first": few, "times": times}
        spec = {**common, **EPOCH, **what, "items": items, "tokens": tokens, "warm": warm}
        yield from measure([spec], 1)


def symbolic(size: Size, common: Row) -> Iterator[Row]:
    """Measure a symbolic move, its editor on our engine (where it fits) or llama.cpp: the calls alone, then all of it.

    In float32 replies of our engine must be the same in a batch and one by one; in bfloat16 rounding may tell.
    """
    smallest = size.backbones[0]
    common = common | {"candidates": size.candidates, "new_tokens": size.written}
    checks = [("float32", smallest, 1.0), ("bfloat16", size.editor, 0.0)]
    for dtype, backbone, least in checks:
        what = {"part": "alone", "case": "a move's requests alone and together"}
        spec = {**common, **what, "run": "moves.batches", "side": OURS}
        with side(spec | {"dtype": dtype, "backbone": backbone}) as repeat:
            yield from with_share([repeat(), repeat(alone=True)], least)
    spec = {**common, "part": "symbolic", "editor": size.editor}
    cases = [
        {
            "case": f"calls, threads: {n}",
            "run": "moves.calls",
            "backbone": size.editor,
            "threads": n,
        }
        for n in size.threads
    ]
    cases.append({"case": "whole", "run": "moves.whole", "backbone": smallest, "items": size.few})
    for case in cases:
        specs = [spec | case | engine for engine in ENGINES]
        yield from measure(specs, size.repetitions)


def tree(size: Size, common: Row) -> Iterator[Row]:
    """Measure a tree of schedules against a run per schedule; on a processor their nodes must be the same."""
    spec = {
        **common,
        "part": "tree",
        "case": f"depth {size.depth}",
        "backbone": size.backbones[0],
        "editor": size.backbones[-1],
        "engine": "auto",
        "items": size.few,
        "candidates": size.candidates,
        "depth": size.depth,
        "warm": {"depth": 1},
    }
    makers = ({"side": OURS, "run": "moves.tree"}, {"side": "single runs", "run": "moves.runs"})
    rows = measure([spec | maker for maker in makers], size.trees)
    # kernels of an accelerator add in any order
    yield from with_share(rows, least=float(fastest_device() == "cpu"))


def peers(size: Size, common: Row) -> Iterator[Row]:
    """Measure an adaptation to the mixed task against GEPA's, with one backbone, editor and reward.

    The time that counts is that to the dev reward which both reach.
    """
    backbone = size.backbones[-1]
    spec = {
        **common,
        "part": "peers",
        "case": "to equal dev reward",
        "run": "moves.adaptation",
        "backbone": backbone,
        "editor": size.editor,
        "engine": "auto",
        "items": size.few,
        "candidates": size.candidates,
        "moves": size.moves,
        "lr": size.lr,
    }
    methods = (
        {"side": OURS, "method": "neurosymbolic"},
        {"side": "GEPA", "method": "gepa"},
    )
    for i in range(size.trees):
        # one after the other: memory seldom holds two editors. Over minutes, warming up is no matter
        turn: list[Row] = [once(spec | method) | {"repetition": i} for method in methods]
        bests = [max(value for *_, value in row["course"]) for row in turn]
        equal = min(bests)
        for row, best in zip(turn, bests, strict=True):
            seconds, tokens, _ = next(mark for mark in row["course"] if mark[2] >= equal)
            reached = {"equal": equal, "best": best, "tokens": tokens, "whole_s": row["seconds"]}
            # reached by the start, it took no time that could be compared
            yield row | reached | {"seconds": max(seconds, 1e-3)}


PARTS = (train, evaluate, load, editor, arithmetic, growth, symbolic, tree, peers)
MEASURED = {part.__name__: part for part in PARTS}


def run(
    out: Path,
    size: Size,
    threads: int,
    only: str | None,
    say: Callable[[str], None],
) -> list[Path]:
    """Measure all of MEASURED, or `only` one part, and write `out` after each; returns the files written last.

    What `out` holds of other parts stays. Raises UserError for an unknown part or what a side refuses.
    """
    if only is not None and only not in MEASURED:
        parts = ", ".join(MEASURED)
        raise UserError(f"unknown part {only!r} of the benchmark; choose from {parts}.")
    if threads < 1:
        raise UserError(f"--threads must be at least 1, not {threads}.")
    kept = out / "bench.json"
    paths = []
    parts = store.read_json(kept) if kept.exists() else {}
    common = {"threads": threads, "batch": size.batch}
    for name in [only] if only else MEASURED:
        say(f"bench: {name}")
        # a busy machine shows in its load
        before = os.getloadavg()[0]
        rows = []
        for row in MEASURED[name](size, common):
            # what was measured is told at once: it is kept when all of the part is there
            say(f"{' '.join(str(value) for value in labels(row).values())}: {row['seconds']:.2f} s")
            rows.append(row)
        # the first row that counts, not one of a check before
        counted = next(row for row in rows if row["part"] == name)
        load = {"load_before": before, "load_after": os.getloadavg()[0]}
        environment = surroundings(counted, threads) | load
        # a part may have counts of its own
        used = {row.get("threads", threads) for row in rows if row["part"] == name}
        environment["threads"] = " and ".join(map(str, sorted(used)))
        parts[name] = {"environment": environment, "size": vars(size), "rows": rows}
        paths = report.write(out, {key: parts[key] for key in MEASURED if key in parts})
    return paths


def surroundings(row: Row, threads: int) -> Row:
    """Return what a part was measured on and with."""
    environment = store.environment(threads, row["device"], row["dtype"])
    # an extra: only one side of one part needs it
    try:
        environment["versions"]["trl"] = metadata.version("trl")
    except metadata.PackageNotFoundError:
        environment["versions"]["trl"] = "not installed"
    return environment | {"cores": os.cpu_count(), "accelerator": row.get("accelerator")}
