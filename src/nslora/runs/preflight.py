"""Look, before anything is downloaded or spent, for whatever would stop runs later."""

import os
from collections.abc import Collection
from contextlib import AbstractContextManager

from nslora.cache import require_disk
from nslora.config import RunConfig
from nslora.editor.client import Editor
from nslora.editor.engine import chosen_for
from nslora.model import checkpoints
from nslora.model.download import Weights
from nslora.runs import lengths
from nslora.runs.limits import Limits
from nslora.runs.store import Store
from nslora.tasks import functions
from nslora.types import UserError


def check(configs: Collection[RunConfig], ask: bool = True) -> None:
    """Raise UserError for an unknown backbone, bad data, a full disk, or a useless editor (`ask`)."""
    for backbone in {cfg.backbone for cfg in configs}:
        checkpoints.check(backbone)
    for cfg in {cfg.task: cfg for cfg in configs}.values():
        if cfg.is_own:
            from nslora.tasks.build import build

            if cfg.judge and functions.of(cfg.grader) is None:
                raise UserError("a judge grades in nslora adapt and nslora.adapt only.")

            # reads the data and refuses what no run could use
            task = build(cfg)
            if how := lengths.measure(cfg.backbone):
                lengths.require(task.items, cfg, how)
    # the file, its parts while they are joined, and the converted copy
    require_disk(3 * downloads(configs), "fetching the models")
    if ask:
        # last, since it spends something
        ask_editors(configs)


def ask_editors(configs: Collection[RunConfig]) -> None:
    """Make one small call to each editor; raises UserError for a useless one."""
    for model, url in {(c.editor_model, c.editor_url) for c in configs if asks_editor(c)}:
        with Editor(model, url) as editor:
            editor.check()


def open_editor(cfg: RunConfig, place: Store | None = None, limits: Limits | None = None) -> Editor:
    """Open the run's external LLM, replaying from and recording to the results folder.

    NSLORA_EDITOR_MODE says how (default: auto), NSLORA_EDITOR_BUDGET what all runs of the working
    folder may spend together (default: anything). A spent budget costs edits; with `limits`, it ends
    the run. Without a `place` nothing is kept.
    """
    mode = os.environ.get("NSLORA_EDITOR_MODE", "auto")
    return Editor(
        cfg.editor_model,
        cfg.editor_url,
        mode,
        recordings=place.results / "recordings" if place else None,
        budget=(limits or Limits()).budget,
        threads=cfg.threads,
        engine=cfg.editor_engine,
        spent=place.work / "editor-spent.json" if place else None,
        price=limits and limits.price,
        ends=limits is not None,
    )


def asks_editor(cfg: RunConfig) -> bool:
    """Tell whether a run may call the external LLM: `frozen` makes no edits, a replay no calls."""
    replayed = os.environ.get("NSLORA_EDITOR_MODE") == "replay"
    return (cfg.row.decision != "stop" or bool(cfg.judge)) and not replayed


def one_engine(configs: Collection[RunConfig], parallel: int) -> AbstractContextManager[None]:
    """Choose the local editor's engine once for runs of which so many are made at a time."""
    return chosen_for(local_editors(configs), parallel)


def local_editors(configs: Collection[RunConfig]) -> set[str]:
    """Return the models that runs may ask as the local editor."""
    return {cfg.editor_model for cfg in configs if cfg.editor_url == "local" and asks_editor(cfg)}


def weights(configs: Collection[RunConfig]) -> list[Weights]:
    """Return the default weights that runs use: backbones, and the local editor's model."""
    names = {cfg.backbone for cfg in configs} | local_editors(configs)
    return [checkpoints.BACKBONES[name] for name in sorted(names) if name in checkpoints.BACKBONES]


def downloads(configs: Collection[RunConfig]) -> int:
    """Return the bytes of default weights that these runs still have to fetch."""
    missing = (w for w in weights(configs) if not checkpoints.is_cached(w.key))
    return sum(w.bytes for w in missing)
