"""Look, before anything is downloaded or spent, for whatever would stop runs later."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.model.download import Weights
from nslora.types import UserError

GB = 1e9


def check(configs: Sequence[RunConfig]) -> None:
    """Raise UserError for an unknown backbone, bad data, a missing editor key or a full disk."""
    from nslora.editor.client import Editor

    for backbone in {cfg.backbone for cfg in configs}:
        checkpoints.check(backbone)
    for model, url in {(cfg.editor_model, cfg.editor_url) for cfg in configs}:
        # opening one looks at name, address and key; it starts nothing
        Editor(model, url).close()
    for cfg in {cfg.task: cfg for cfg in configs}.values():
        if cfg.task.startswith("own:"):
            from nslora.tasks.build import build

            build(cfg)
    _check_disk(configs)


def _check_disk(configs: Sequence[RunConfig]) -> None:
    # the file, its parts while they are joined, and the converted copy
    need = 3 * downloads(configs)
    cache = checkpoints.cache_dir()
    # the cache may not exist yet; its nearest existing parent is on the same disk
    folder = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"the models need {need / GB:.1f} GB in {cache}, which has {free / GB:.1f} GB free."
        )


def weights(configs: Sequence[RunConfig]) -> list[Weights]:
    """Return the default weights that runs use: backbones, and the local editor's model.

    `frozen` makes no edits, so it needs no editor.
    """
    names = set()
    for cfg in configs:
        names.add(cfg.backbone)
        if cfg.editor_url == "local" and cfg.method != "frozen":
            names.add(cfg.editor_model)
    return [checkpoints.BACKBONES[name] for name in sorted(names) if name in checkpoints.BACKBONES]


def downloads(configs: Sequence[RunConfig]) -> int:
    """Return the bytes of default weights that these runs still have to fetch."""
    missing = (w for w in weights(configs) if not checkpoints.is_cached(w.key))
    return sum(w.bytes for w in missing)
