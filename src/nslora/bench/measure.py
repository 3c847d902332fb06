"""`nslora bench`: our parts and the tools they replace, measured side by side, every repetition kept.

Each side is a process of its own (bench_sides). The sides of a comparison are up together and take turns, A B A B, so
that a slow minute of the machine falls on both; the first turn of each warms up and is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import IO, Any, TypeVar

from nslora.bench import report
from nslora.bench.report import OURS, Row, rate
from nslora.model.backbone import fast_bfloat16, fastest_device
from nslora.runs import store
from nslora.types import UserError

T = TypeVar("T")
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


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        learn, answer: per case, the number of items and the tokens of each (of its reply, at most); `learn` also the
            batch size, smaller for long items lest the other side's memory exceed that of a common machine.
        batches: sizes tried for padded generation. checked: replies compared in float32.
        items, tokens: of the epochs whose cost is followed. warm: epochs over two batches before those by number of
            items; memory rises for some ten steps, whatever the number, until caches of compiled products are full.
        matrix: side of the square that is multiplied.
        written: tokens of an editor's reply.
    """

    backbones: tuple[str, ...] = ("smollm2-135m", "qwen2.5-coder-0.5b")
    editor: str = "qwen2.5-coder-1.5b"
    repetitions: int = 3
    batch: int = 8
    learn: tuple[tuple[str, int, int, int], ...] = (("short", 32, 60, 8), ("long", 8, 400, 4))
    answer: tuple[tuple[str, int, int], ...] = (("short", 64, 24), ("chains", 16, 200))
    batches: tuple[int, ...] = (8, 16, 32, 64)
    items: tuple[int, ...] = (16, 64, 256, 512)
    tokens: tuple[int, ...] = (64, 128, 256, 512)
    warm: int = 6
    matrix: int = 4096
    checked: int = 6
    written: int = 64


SMALL = Size(
    backbones=("smollm2-135m",),
    editor="smollm2-135m",
    repetitions=2,
    batch=4,
    learn=(("short", 8, 60, 4), ("long", 4, 300, 2)),
    answer=(("short", 8, 12), ("chains", 4, 40)),
    batches=(4, 8),
    items=(8, 16),
    tokens=(64, 128),
    warm=1,
    matrix=1024,
    checked=2,
    written=16,
)


def labels(spec: Row) -> Row:
    """Return what names a side in its rows."""
    return {key: spec[key] for key in ("side", "setting", "backbone") if key in spec}


def environ(spec: Row) -> dict[str, str]:
    """Return the environment of a side's process."""
    own = {
        "OMP_NUM_THREADS": str(spec["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    # the other side runs as its users would run it
    caches = CACHES if spec.get("side", OURS) != OURS else {}
    return {**os.environ, **own, **caches}


@contextmanager
def side(spec: Row) -> Iterator[Callable[..., Row]]:
    """Start a process for what `spec` describes; a call makes one repetition and returns its row.

    Raises UserError with its sentence when the process refuses the spec, RuntimeError with its log when it breaks.
    """
    # a file, for a pipe that nobody reads would stop a talkative side
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nslora.bench.sides", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environ(spec),
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


def turns(sides: Sequence[T], repetitions: int) -> list[tuple[int, T]]:
    """Return the order of measuring, A B A B, as (repetition, side)."""
    return [(i, side) for i in range(repetitions) for side in sides]


def measure(specs: Sequence[Row], repetitions: int, **tags: Any) -> list[Row]:
    """Return rows of `repetitions` turns of each spec, after one of each that is not counted."""
    with ExitStack() as stack:
        # all are up together, so that they can take turns
        sides = [stack.enter_context(side(spec)) for spec in specs]
        for repeat, spec in zip(sides, specs, strict=True):
            repeat(**spec.get("warm", {}))
        return [{**tags, "repetition": i, **repeat()} for i, repeat in turns(sides, repetitions)]


def train(size: Size, common: Row) -> Iterator[Row]:
    """Measure our numerical move against the best of TRL's settings, each tried on half of the items."""
    for backbone, (case, items, tokens, batch) in product(size.backbones, size.learn):
        spec = {
            **common,
            "backbone": backbone,
            "items": items,
            "tokens": tokens,
            "batch": batch,
            "spread": 0.3,
            "steps": case == "long",
        }
        theirs = [
            spec | {"run": "trl_epochs", "side": "TRL", "setting": name, "settings": settings}
            for name, settings in TRL.items()
        ]
        # one step warms up what an epoch of half the items then measures
        few = {"items": items // 2, "warm": {"steps": 1}}
        tried = [tried_once(one | few, f"train, {case}") for one in theirs]
        yield from tried
        rates = list(map(rate, tried))
        best = theirs[rates.index(max(rates))]
        ours = spec | {"run": "epochs", "side": OURS}
        yield from measure([ours, best], size.repetitions, part="train", case=case)


def tried_once(spec: Row, case: str) -> Row:
    """Return one turn of a setting of the other side; no work done, with the reason, where it breaks."""
    tags = {"part": "tried", "case": case}
    try:
        return measure([spec], 1, **tags)[0]
    except RuntimeError as error:
        # no rate, so it is never the best; lack of memory is among the reasons
        return labels(spec) | tags | {"work": 0, "seconds": 1.0, "broke": str(error)[-300:]}


def evaluate(size: Size, common: Row) -> Iterator[Row]:
    """Measure our generation against `model.generate` at its best batch size; in float32 texts must be the same."""
    for backbone, (case, items, new) in product(size.backbones, size.answer):
        spec = {
            **common,
            "backbone": backbone,
            "items": items,
            "new_tokens": new,
            "chains": case == "chains",
        }
        ours = spec | {"run": "replies", "side": OURS}
        theirs = spec | {"run": "padded_replies", "side": "transformers"}
        # greedy replies differ in bfloat16 by rounding alone, in float32 they would by a mistake
        few = {"dtype": "float32", "items": size.checked}
        check = [ours | few, theirs | few | {"ask": {"batch": size.checked}}]
        yield from with_share(measure(check, 1, part="float32", case=case), least=1.0)
        tried = [without_texts(row) for row in batch_sizes(theirs, size, case)]
        yield from tried
        best = max(tried, key=rate)
        theirs |= {"setting": best["setting"], "ask": {"batch": best["batch"]}}
        turns = measure([ours, theirs], size.repetitions, part="evaluate", case=case)
        yield from with_share(turns, least=0.0)


def batch_sizes(theirs: Row, size: Size, case: str) -> Iterator[Row]:
    """Measure padded generation once at each batch size that its items fill."""
    items = theirs["items"]
    with side(theirs) as repeat:
        repeat(batch=items)
        for n in size.batches:
            if n <= items:
                tags = {"part": "tried", "case": f"evaluate, {case}"}
                yield repeat(batch=n) | tags | {"setting": f"batches of {n}", "batch": n}


def with_share(rows: Sequence[Row], least: float) -> Iterator[Row]:
    """Yield rows of two sides with the share of equal replies for the replies; RuntimeError if it is too low."""
    # sides take turns, so every other row is ours
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        same = [x == y for x, y in zip(a["texts"], b["texts"], strict=True)]
        share = sum(same) / len(same)
        if share < least:
            raise RuntimeError(f"the texts differ in {a['dtype']}: {a['texts']} and {b['texts']}")
        yield without_texts(a) | {"identical": share}
        yield without_texts(b) | {"identical": share}


def without_texts(row: Row) -> Row:
    """Return the row as it is kept."""
    return {key: value for key, value in row.items() if key != "texts"}


def load(size: Size, common: Row) -> Iterator[Row]:
    """Measure our loading of a cached backbone against the GGUF loader of transformers, the file already read once."""
    for backbone in size.backbones:
        spec = {**common, "run": "loads", "backbone": backbone}
        # one file, read by two loaders
        ours = spec | {"side": OURS, "gguf": False}
        theirs = spec | {"side": "GGUF loader", "gguf": True}
        yield from measure([ours, theirs], size.repetitions, part="load", case="cached backbone")


def editor(size: Size, common: Row) -> Iterator[Row]:
    """Measure our editor against the bare server, on a new prompt each time and on the same one."""
    for case in ("new prompt", "same prompt"):
        spec = {
            **common,
            "editor": size.editor,
            "lines": 8,
            "again": case == "same prompt",
            "new_tokens": size.written,
        }
        ours = spec | {"run": "edits", "side": OURS}
        theirs = spec | {"run": "bare_edits", "side": "llama.cpp"}
        yield from measure(
            [ours, theirs], size.repetitions, part="editor", case=case, backbone=size.editor
        )


def arithmetic(size: Size, common: Row) -> Iterator[Row]:
    """Measure operations per second of training and of reading prompts, against large matrix products.

    In float32, and in bfloat16 where the hardware computes in it: emulated, one product takes a minute.
    """
    square = {**common, "run": "product", "size": size.matrix}
    native = fast_bfloat16(fastest_device())
    dtypes = ("bfloat16", "float32") if native else ("float32",)
    products = [square | {"dtype": dtype, "side": f"{dtype} matmul"} for dtype in dtypes]
    # the longest items, which leave least to overhead
    longest = size.learn[-1][2]
    cases = (("training", "epochs"), ("prefill", "prefill"))
    for backbone, (case, run) in product(size.backbones, cases):
        ours = epoch_of(common, backbone, size.batch, longest, case == "training")
        ours["run"] = run
        for row in measure([ours, *products], size.repetitions, part="arithmetic", case=case):
            yield row | {"backbone": backbone, "work": row["flop"] / 1e9}


def epoch_of(common: Row, backbone: str, items: int, tokens: int, steps: bool = True) -> Row:
    """Return the spec of our epoch over items of equal length."""
    return {
        **common,
        "run": "epochs",
        "side": OURS,
        "backbone": backbone,
        "items": items,
        "tokens": tokens,
        "spread": 0.0,
        "steps": steps,
    }


def growth(size: Size, common: Row) -> Iterator[Row]:
    """Measure an epoch by number of items and by length of the examples, in a fresh process each, warmed up."""
    few = 2 * size.batch
    # axis, size along it, items, tokens of each
    plan = [("items", n, n, size.tokens[0]) for n in size.items]
    plan += [("tokens", n, few, n) for n in size.tokens]
    for backbone, (axis, n, items, tokens) in product(size.backbones, plan):
        times = size.warm if axis == "items" else 1
        spec = epoch_of(common, backbone, items, tokens)
        spec["warm"] = {"first": few, "times": times}
        yield from measure([spec], 1, part="growth", case=axis, size=n)


MEASURED = {part.__name__: part for part in (train, evaluate, load, editor, arithmetic, growth)}
PARTS = tuple(MEASURED)


def run(
    out: Path,
    size: Size,
    threads: int,
    only: str | None,
    say: Callable[[str], None],
) -> list[Path]:
    """Measure all parts, or `only` one of PARTS, and write `out` after each; returns the files written last.

    What `out` holds of other parts stays. Raises UserError for an unknown part or what a side refuses.
    """
    if only is not None and only not in PARTS:
        raise UserError(f"unknown part {only!r} of the benchmark; choose from {', '.join(PARTS)}.")
    if threads < 1:
        raise UserError(f"--threads must be at least 1, not {threads}.")
    kept = out / "bench.json"
    paths = []
    parts = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    common = {"threads": threads, "batch": size.batch}
    for name in [only] if only else PARTS:
        say(f"bench: {name}")
        # a busy machine shows in its load
        before = os.getloadavg()[0]
        rows = list(MEASURED[name](size, common))
        # the first row that counts, not one of a check before
        counted = next(row for row in rows if row["part"] == name)
        load = {"load_before": before, "load_after": os.getloadavg()[0]}
        environment = surroundings(counted, threads) | load
        parts[name] = {"environment": environment, "size": asdict(size), "rows": rows}
        paths = report.write(out, {key: parts[key] for key in PARTS if key in parts})
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
