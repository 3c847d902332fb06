"""Use a bundle: ask it, score it on rows, and compare it with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from nslora.config import RunConfig
from nslora.disk import require_whole
from nslora.model import checkpoints
from nslora.runs import judge, lengths
from nslora.runs.bundles.bundle import best_step
from nslora.runs.store import read_json
from nslora.runs.verdict import DIFFERENCE, WORDS, Estimate, estimate, measure
from nslora.tasks import functions, own, reading
from nslora.types import SLOT, Item, Prompt, UserError

if TYPE_CHECKING:
    from nslora.model.backbone import Backbone

# rows that a comparison names
SHOWN = 50


@dataclass(frozen=True)
class Bundle:
    """An adapted model, loaded: `cfg` are the settings that it was made with."""

    cfg: RunConfig
    prompt: Prompt
    backbone: Backbone

    def replies(self, questions: Sequence[str], max_new_tokens: int = 0) -> list[str]:
        """Return a greedy reply to each question, of `max_new_tokens` (0: as in the run)."""
        texts = [self.backbone.text(self.prompt, question) for question in questions]
        longest = max_new_tokens or self.cfg.max_new_tokens
        return [reply.text for reply in self.backbone.generate(texts, longest)]


def open_bundle(
    folder: str | Path, backbone: str = "", dtype: str = "auto", device: str = "auto"
) -> Bundle:
    """Load a bundle; `backbone` says where its weights are now, if they have moved.

    `dtype` and `device` are those of `backbone.load`; "auto" is what it was adapted in. Raises
    UserError for what is no bundle, and for weights that it was not made on.
    """
    cfg, name, prompt = _placed(Path(folder), backbone)

    # only now: it takes seconds to import, and wrong input is answered at once
    from nslora.model.backbone import load
    from nslora.model.lora import Learner

    dtype = cfg.dtype if dtype == "auto" else dtype
    loaded = load(name, cfg.threads, dtype, device)
    if best_step(Path(folder) / "record")["adapter"]:
        Learner(loaded, cfg).load_weights(Path(folder) / "adapter")
    return Bundle(cfg, prompt, loaded)


def read_bundle(folder: Path) -> tuple[RunConfig, str, Prompt]:
    """Return the settings of a bundle's run, what pins its weights, and its prompt; raises UserError."""
    record = folder / "record"
    if not record.is_dir():
        raise UserError(f"{folder} is no folder that nslora adapt has written.")
    require_whole(record, "make the bundle again with nslora adapt")
    receipt = read_json(record / "run.json")
    prompt = _prompt(folder / "prompt.json")
    return RunConfig.of(receipt["config"]), receipt["weights"], prompt


def _prompt(path: Path) -> Prompt:
    """Return the prompt of a bundle, which its owner may have changed; raises UserError."""
    try:
        prompt = Prompt(**TypeAdapter(dict[str, str]).validate_json(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} holds no prompt ({' '.join(str(error).split())}).") from None
    if prompt.question.count(SLOT) != 1:
        raise UserError(f"{path} must hold {SLOT} once, where the question goes.")
    return prompt


def _placed(folder: Path, backbone: str) -> tuple[RunConfig, str, Prompt]:
    """Return the settings of a bundle's run, where its weights are, and its prompt; raises UserError."""
    cfg, weights, prompt = read_bundle(folder)
    name = backbone or cfg.backbone
    if checkpoints.identity(name) != weights:
        raise UserError(f"{folder} was made on other weights than those of {name}.")
    return cfg, name, prompt


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    grader: str = "",
    columns: str | None = None,
    reward: str | Callable[..., Any] = "",
    backbone: str = "",
) -> Estimate:
    """Return the share of rows that a bundle gets right (a function's mean reward), and its interval.

    Args:
        data: a file or `hub:<owner>/<name>`, as `adapt` takes it.
        grader, columns, reward: as of `adapt`; those of the bundle's run where they are not given.
        backbone: as of `open_bundle`.

    Raises UserError for wrong input before any weights are loaded.
    """
    cfg, _, _ = _placed(Path(bundle), backbone)
    grader = _grader([cfg], grader, reward)
    rows = _rows(data, grader, cfg.columns if columns is None else columns)
    longest = max(cfg.max_new_tokens, lengths.longest_reply(rows.items))
    with judge.attached(cfg, grader):
        return estimate(_values(open_bundle(bundle, backbone), rows.items, grader, longest))


def _grader(configs: Sequence[RunConfig], grader: str, reward: str | Callable[..., Any]) -> str:
    """Return the grader that is given, or else that of the bundles' runs; raises UserError."""
    if reward and grader:
        raise UserError("give a reward or a grader, not both.")
    if reward:
        return functions.register(reward)
    names = {grader} if grader else {_grader_of(cfg) for cfg in configs}
    if len(names) > 1:
        raise UserError(f"the two were graded by {' and '.join(sorted(names))}: give one --grader.")
    return names.pop()


def _grader_of(cfg: RunConfig) -> str:
    """Return the grader of a bundle's run; a judge is known to this process from here on."""
    return judge.register(cfg.judge) if cfg.judge else cfg.grader


def _rows(data: str | Path, grader: str, columns: str) -> own.Data:
    """Return the sound rows of a file; raises UserError for the first of its problems."""
    path = reading.fetch(str(data))
    checked = own.inspect(path, grader, columns, least=own.LEAST_TEST_ROWS)
    own.require(checked.problems)
    return checked


def _values(bundle: Bundle, items: Sequence[Item], grader: str, longest: int) -> list[float]:
    """Return for each row whether its reply is right, or what a function says it is worth."""
    replies = bundle.replies([item.example.question for item in items], longest)
    by = measure(grader)
    pairs = list(zip(items, replies, strict=True))
    own.expect(pairs)
    return [getattr(own.reward(item, reply), by) for item, reply in pairs]


# ---- two of them


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows: is the second better?

    Attributes:
        names: as they were given.
        measure: of a row, "success" or "value".
        means: of the first, and of the second.
        difference: of the same rows, second less first.
        won, lost: where the rows are that the second gets better, or worse, in words.
    """

    names: tuple[str, str]
    measure: str
    means: tuple[float, float]
    difference: Estimate
    won: str
    lost: str

    @property
    def better(self) -> bool:
        """Whether the whole interval of the difference is above 0."""
        return self.difference.low > 0

    @property
    def sentence(self) -> str:
        """The comparison in a sentence."""
        first, second = self.names
        words = "not shown to be better than"
        if self.better:
            words = "better than"
        elif self.difference.high < 0:
            words = "worse than"
        before, after = self.means
        return (
            f"{second} is {words} {first}: {WORDS[self.measure]} {before:.2f} and {after:.2f} on the "
            f"same {self.difference.n} rows, difference {self.difference.mean:+.2f} "
            f"({self.difference})."
        )

    @property
    def rows(self) -> str:
        """The rows that differ, in a sentence."""
        return f"won by {self.names[1]}: {self.won or 'no row'}; lost: {self.lost or 'no row'}."


def compare(
    first: str | Path,
    second: str | Path,
    data: str | Path,
    *,
    grader: str = "",
    columns: str | None = None,
    reward: str | Callable[..., Any] = "",
    backbone: str = "",
) -> Comparison:
    """Compare two bundles on the same rows, or a bundle with a bare backbone under its start prompt.

    Args:
        first, second: bundles; one of them may be the name of a backbone.
        data, grader, columns, reward, backbone: as of `evaluate`.

    Raises UserError for wrong input before any weights are loaded.
    """
    sides = (str(first), str(second))
    bundles = [side for side in sides if _is_bundle(side)]
    for side in set(sides) - set(bundles):
        checkpoints.check(side)
    if not bundles:
        raise UserError(f"{first} and {second} are no folders that nslora adapt has written.")
    configs = [_placed(Path(side), backbone)[0] for side in bundles]
    start = configs[0]
    grader = _grader(configs, grader, reward)
    rows = _rows(data, grader, start.columns if columns is None else columns)
    items = rows.items
    longest = max([lengths.longest_reply(items), *(cfg.max_new_tokens for cfg in configs)])

    def values(side: str) -> list[float]:
        opened = open_bundle(side, backbone) if side in bundles else _bare(side, start)
        return _values(opened, items, grader, longest)

    # one after the other: memory holds one of them
    with judge.attached(start, grader):
        before, after = (np.array(values(side)) for side in sides)
    difference = after - before

    def where(chosen: np.ndarray) -> str:
        lines = [own.line(item) for item, is_one in zip(items, chosen, strict=True) if is_one]
        return f"{len(lines)} ({reading.listed(lines, rows.unit, SHOWN)})" if lines else ""

    return Comparison(
        names=sides,
        measure=measure(grader),
        means=(float(before.mean()), float(after.mean())),
        difference=estimate(difference.tolist(), DIFFERENCE),
        won=where(difference > 0),
        lost=where(difference < 0),
    )


def _is_bundle(name: str) -> bool:
    return (Path(name) / "record" / "run.json").is_file()


def _bare(backbone: str, cfg: RunConfig) -> Bundle:
    """Load a backbone without an adapter, under the prompt that a run started from."""
    from nslora.model.backbone import load

    return Bundle(cfg, Prompt(cfg.system, cfg.template), load(backbone, cfg.threads, cfg.dtype))
