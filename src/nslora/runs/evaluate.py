"""Use a bundle: ask it, and score it on rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from nslora.config import RunConfig
from nslora.disk import require_whole
from nslora.model import checkpoints
from nslora.runs import judge, lengths
from nslora.runs.export import best_step
from nslora.runs.store import read_json
from nslora.runs.verdict import Estimate, estimate, measure
from nslora.tasks import functions, own, reading
from nslora.types import SLOT, Prompt, UserError

if TYPE_CHECKING:
    from nslora.model.backbone import Backbone


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

    `dtype` and `device` are those of `backbone.load`. Raises UserError for what is no bundle, and
    for weights that it was not made on.
    """
    cfg, weights, prompt = read_bundle(Path(folder))
    name = backbone or cfg.backbone
    if checkpoints.identity(name) != weights:
        raise UserError(f"{folder} was made on other weights than those of {name}.")

    # only now: it takes seconds to import, and wrong input is answered at once
    from nslora.model.backbone import load
    from nslora.model.lora import Learner

    loaded = load(name, threads=cfg.threads, dtype=dtype, device=device)
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
    cfg, _, _ = read_bundle(Path(bundle))
    if reward and grader:
        raise UserError("give a reward or a grader, not both.")
    if cfg.judge and not (reward or grader):
        grader = judge.register(cfg.judge)
    grader = functions.register(reward) if reward else grader or cfg.grader
    columns = cfg.columns if columns is None else columns
    path = reading.fetch(str(data))
    checked = own.inspect(path, grader, columns, least=own.LEAST_TEST_ROWS)
    own.require(checked.problems)
    items = checked.items
    longest = max(cfg.max_new_tokens, lengths.longest_reply(items))
    questions = [item.example.question for item in items]
    with judge.attached(cfg, grader):
        replies = open_bundle(bundle, backbone).replies(questions, longest)
        pairs = list(zip(items, replies, strict=True))
        own.expect(pairs)
        rewards = [own.reward(item, reply) for item, reply in pairs]
    by = measure(grader)
    return estimate([getattr(reward, by) for reward in rewards])
