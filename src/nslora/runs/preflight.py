"""Look, before anything is downloaded or spent, for whatever would stop runs later."""

import os
from collections.abc import Collection

from nslora.cache import require_disk
from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.model.download import Weights
from nslora.runs import lengths


def check(configs: Collection[RunConfig], ask: bool = True) -> None:
    """Raise UserError for an unknown backbone, bad data, a full disk, or a useless editor (`ask`)."""
    for backbone in {cfg.backbone for cfg in configs}:
        checkpoints.check(backbone)
    for cfg in {cfg.task: cfg for cfg in configs}.values():
        if cfg.is_own:
            from nslora.tasks.build import build

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
    # imports httpx, for which no other command should wait
    from nslora.editor.client import Editor

    for model, url in {(c.editor_model, c.editor_url) for c in configs if asks_editor(c)}:
        with Editor(model, url) as editor:
            editor.check()


def asks_editor(cfg: RunConfig) -> bool:
    """Tell whether a run may call the external LLM: `frozen` makes no edits, a replay no calls."""
    replayed = os.environ.get("NSLORA_EDITOR_MODE") == "replay"
    return cfg.row.decision != "stop" and not replayed


def weights(configs: Collection[RunConfig]) -> list[Weights]:
    """Return the default weights that runs use: backbones, and the local editor's model."""
    names = set()
    for cfg in configs:
        names.add(cfg.backbone)
        if cfg.editor_url == "local" and asks_editor(cfg):
            names.add(cfg.editor_model)
    return [checkpoints.BACKBONES[name] for name in sorted(names) if name in checkpoints.BACKBONES]


def downloads(configs: Collection[RunConfig]) -> int:
    """Return the bytes of default weights that these runs still have to fetch."""
    missing = (w for w in weights(configs) if not checkpoints.is_cached(w.key))
    return sum(w.bytes for w in missing)
