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
from typing import Any, TypeVar

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


@contextmanager
def side(spec: Row) -> Iterator[Callable[..., Row]]:
    """A process for what `spec` describes; a call makes one repetition and gives its row.

    Raises UserError with its sentence when the process refuses the spec, RuntimeError with its log when it breaks.
    """
    named = {key: spec[key] for key in ("side", "setting", "backbone") if key in spec}
    env = {
        "OMP_NUM_THREADS": str(spec["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    env |= CACHES if spec.get("side", OURS) != OURS else {}
    command = [sys.executable, "-m", "nslora.bench.sides", json.dumps(spec)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | env,
        )

        def answer() -> Row:
            assert process.stdout
            if line := process.stdout.readline():
                return json.loads(line)
            status = process.wait()
            log.seek(0)
            said = log.read().decode(errors="replace").strip()
            if status == 2:
                raise UserError(said.splitlines()[-1])
            raise RuntimeError(f"{spec} ended with status {status}: {said[-2000:]}")

        def repeat(**ask: Any) -> Row:
            print(json.dumps(ask or spec.get("ask", {})), file=process.stdin, flush=True)
            return {**named, **about, **answer()}

        try:
            about = answer()
            yield repeat
        finally:
            process.kill()  # an editor's server ends with its pipe to this process
            process.communicate()


def turns(sides: Sequence[T], repetitions: int) -> list[tuple[int, T]]:
    """The order of measuring, A B A B, as (repetition, side)."""
    return [(i, side) for i in range(repetitions) for side in sides]


def measure(specs: Sequence[Row], repetitions: int, **tags: Any) -> list[Row]:
    """Rows of `repetitions` turns of each spec, after one of each that is not counted."""
    with ExitStack() as stack:
        sides = [stack.enter_context(side(spec)) for spec in specs]
        for repeat, spec in zip(sides, specs, strict=True):
            repeat(**spec.get("warm", {}))
        return [{**tags, "repetition": i, **repeat()} for i, repeat in turns(sides, repetitions)]


def same(a: Row, b: Row) -> float:
    """Share of equal replies."""
    return sum(x == y for x, y in zip(a["texts"], b["texts"], strict=True)) / len(a["texts"])


def train(size: Size, common: Row) -> Iterator[Row]:
    """Our numerical move against the best of TRL's settings, each tried on half of the items."""
    for backbone, (case, items, tokens, batch) in product(size.backbones, size.learn):
        spec = {
            **common,
            "backbone": backbone,
            "items": items,
            "tokens": tokens,
            "batch": batch,
            "spread": 0.3,
        }
        spec["steps"] = case == "long"
        theirs = [
            {"run": "trl_epochs", "side": "TRL", "setting": k, "settings": v}
            for k, v in TRL.items()
        ]
        few = {"items": items // 2, "warm": {"steps": 1}}
        tried = [tried_once(spec | one | few, f"train, {case}") for one in theirs]
        yield from tried
        best = max(zip(tried, theirs, strict=True), key=lambda pair: rate(pair[0]))[1]
        pair = [spec | {"run": "epochs", "side": OURS}, spec | best]
        yield from measure(pair, size.repetitions, part="train", case=case)


def tried_once(spec: Row, case: str) -> Row:
    """One turn of a setting of the other side; no work done, with the reason, where it breaks or lacks memory."""
    try:
        return measure([spec], 1, part="tried", case=case)[0]
    except RuntimeError as error:
        named = {key: spec[key] for key in ("side", "setting", "backbone")}
        return {
            **named,
            "part": "tried",
            "case": case,
            "work": 0,
            "seconds": 1.0,
            "broke": str(error)[-300:],
        }


def evaluate(size: Size, common: Row) -> Iterator[Row]:
    """Our generation against `model.generate` at its best batch size; in float32 the texts must be the same."""
    for backbone, (case, items, new) in product(size.backbones, size.answer):
        spec = {
            **common,
            "backbone": backbone,
            "items": items,
            "new_tokens": new,
            "chains": case == "chains",
        }
        ours, theirs = (
            {**spec, "run": "replies", "side": OURS},
            {**spec, "run": "padded_replies", "side": "transformers"},
        )
        few = {"dtype": "float32", "items": size.checked}
        check = [ours | few, theirs | few | {"ask": {"batch": size.checked}}]
        yield from with_share(measure(check, 1, part="float32", case=case), least=1.0)
        with side(theirs) as repeat:
            repeat(batch=items)
            sizes = [n for n in size.batches if n <= items]
            tried = [repeat(batch=n) | {"setting": f"batches of {n}", "batch": n} for n in sizes]
        yield from [
            without_texts(row) | {"part": "tried", "case": f"evaluate, {case}"} for row in tried
        ]
        best = max(tried, key=rate)
        pair = [ours, theirs | {"setting": best["setting"], "ask": {"batch": best["batch"]}}]
        yield from with_share(
            measure(pair, size.repetitions, part="evaluate", case=case), least=0.0
        )


def with_share(rows: Sequence[Row], least: float) -> Iterator[Row]:
    """The rows of two sides with the share of equal replies instead of the replies; RuntimeError if it is too low."""
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        if same(a, b) < least:
            raise RuntimeError(f"the texts differ in {a['dtype']}: {a['texts']} and {b['texts']}")
        yield from [without_texts(row) | {"identical": same(a, b)} for row in (a, b)]


def without_texts(row: Row) -> Row:
    """The row as it is kept."""
    return {key: value for key, value in row.items() if key != "texts"}


def load(size: Size, common: Row) -> Iterator[Row]:
    """Our loading of a cached backbone against the GGUF loader of transformers, the file already read once."""
    for backbone in size.backbones:
        spec = {**common, "run": "loads", "backbone": backbone}
        pair = [spec | {"side": OURS, "gguf": False}, spec | {"side": "GGUF loader", "gguf": True}]
        yield from measure(pair, size.repetitions, part="load", case="cached backbone")


def editor(size: Size, common: Row) -> Iterator[Row]:
    """Our editor against the bare server, on a new prompt each time and on the same one."""
    for case in ("new prompt", "same prompt"):
        spec = {
            **common,
            "editor": size.editor,
            "lines": 8,
            "again": case == "same prompt",
            "new_tokens": size.written,
        }
        pair = [
            spec | {"run": "edits", "side": OURS},
            spec | {"run": "bare_edits", "side": "llama.cpp"},
        ]
        yield from measure(pair, size.repetitions, part="editor", case=case, backbone=size.editor)


def arithmetic(size: Size, common: Row) -> Iterator[Row]:
    """Operations per second of training and of reading prompts, against large matrix products.

    In float32, and in bfloat16 where the hardware computes in it: emulated, one product takes a minute.
    """
    square = {**common, "run": "product", "size": size.matrix}
    native = fast_bfloat16(fastest_device())
    dtypes = ("bfloat16", "float32") if native else ("float32",)
    products = [square | {"dtype": dtype, "side": f"{dtype} matmul"} for dtype in dtypes]
    for backbone, (case, run) in product(
        size.backbones, (("training", "epochs"), ("prefill", "prefill"))
    ):
        spec = {
            **common,
            "run": run,
            "side": OURS,
            "backbone": backbone,
            "items": size.batch,
            "spread": 0.0,
        }
        ours = spec | {"tokens": size.learn[-1][2], "steps": case == "training"}
        for row in measure([ours, *products], size.repetitions, part="arithmetic", case=case):
            yield row | {"backbone": backbone, "work": row["flop"] / 1e9}


def growth(size: Size, common: Row) -> Iterator[Row]:
    """An epoch by number of items and by length of the examples, in a fresh process each, warmed up."""
    few = 2 * size.batch
    plan = [("items", n, {"items": n, "tokens": size.tokens[0]}) for n in size.items]
    plan += [("tokens", n, {"items": few, "tokens": n}) for n in size.tokens]
    for backbone, (axis, n, much) in product(size.backbones, plan):
        spec = {
            **common,
            **much,
            "run": "epochs",
            "side": OURS,
            "backbone": backbone,
            "spread": 0.0,
            "steps": True,
        }
        spec["warm"] = {"first": few, "times": size.warm if axis == "items" else 1}
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
    kept, paths = out / "bench.json", []
    parts = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    common = {"threads": threads, "batch": size.batch}
    for name in [only] if only else PARTS:
        say(f"bench: {name}")
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
    """What a part was measured on and with."""
    environment = store.environment(threads, row["device"], row["dtype"])
    try:
        environment["versions"]["trl"] = metadata.version("trl")
    except metadata.PackageNotFoundError:
        environment["versions"]["trl"] = "not installed"
    return environment | {"cores": os.cpu_count(), "accelerator": row.get("accelerator")}
