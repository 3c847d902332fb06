"""Look, before anything is downloaded or spent, for whatever would stop runs later."""

from collections.abc import Collection

from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.model.download import Weights


def check(configs: Collection[RunConfig]) -> None:
    """Raise UserError for an unknown backbone, bad data, a missing editor key or a full disk."""
    # imports openai, for which no other command should wait
    from nslora.editor.client import Editor

    for backbone in {cfg.backbone for cfg in configs}:
        checkpoints.check(backbone)
    for model, url in {(cfg.editor_model, cfg.editor_url) for cfg in configs}:
        # opening one looks at name, address and key; it starts nothing
        Editor(model, url).close()
    for cfg in {cfg.task: cfg for cfg in configs}.values():
        if cfg.task.startswith("own:"):
            from nslora.tasks.build import build

            # reads the data and refuses what no run could use
            build(cfg)
    # the file, its parts while they are joined, and the converted copy
    checkpoints.require_disk(3 * downloads(configs), "fetching the models")


def weights(configs: Collection[RunConfig]) -> list[Weights]:
    """Return the default weights that runs use: backbones, and the local editor's model.

    `frozen` makes no edits, so it needs no editor.
    """
    names = set()
    for cfg in configs:
        names.add(cfg.backbone)
        if cfg.editor_url == "local" and cfg.method != "frozen":
            names.add(cfg.editor_model)
    return [checkpoints.BACKBONES[name] for name in sorted(names) if name in checkpoints.BACKBONES]


def downloads(configs: Collection[RunConfig]) -> int:
    """Return the bytes of default weights that these runs still have to fetch."""
    missing = (w for w in weights(configs) if not checkpoints.is_cached(w.key))
    return sum(w.bytes for w in missing)
