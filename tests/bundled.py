"""Bundles of finished runs on a tiny model, in several chat formats, and how they are used without this library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from tinymodel import CHAT
from toy import finish

from nslora.config import RunConfig
from nslora.disk import write_sums
from nslora.model import checkpoints
from nslora.model.backbone import load
from nslora.model.lora import Learner
from nslora.runs.store import Store, append_json
from nslora.types import Pair, Prompt

ADAPTED = {"system": "Answer with {one} word.\u2028", "question": "Q: {question}"}
# what is learned by heart
SURE = "That."
# a format that refuses a system role, as some do
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
)
# chat formats, by name; None: a base model's
FORMATS = {"chat": CHAT, "base": None, "no system role": NO_SYSTEM}
# runs the code of a README as it stands, without this library
READER = """
import os, re, sys
sys.modules["nslora"] = None
for folder in sys.argv[1:]:
    os.chdir(folder)
    (code,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
    print("BUNDLE", flush=True)
    exec(code)
"""


def made(
    base: str, folder: Path, chat: str | None, adapter: bool = True, sure: bool = False
) -> tuple[Store, RunConfig, list[str]]:
    """A finished run on the tiny model in another chat format, and its replies: frozen and tuned.

    Where it is `sure`, it has learned one reply by heart, and rounded weights give it, too.
    """
    shutil.copytree(base, folder / "base")
    template = folder / "base" / "chat_template.jinja"
    template.write_text(chat) if chat else template.unlink()
    # of the folder, and not of the run: a reply is greedy and nothing else
    config = folder / "base" / "generation_config.json"
    if chat:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"repetition_penalty": 1.5}))
    else:
        # converted weights come without it, and several tokens may end a reply
        config.unlink()
        config = folder / "base" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, 40]}))
    backbone = load(str(folder / "base"), threads=1, dtype="float32", device="cpu")
    rank, lr, epochs = (8, 0.02, 60) if sure else (2, 0.05, 3)
    cfg = RunConfig(backbone=str(folder / "base"), rank=rank, lr=lr, max_new_tokens=24, threads=1)
    store, prompt = Store(folder / "results", folder / "runs"), Prompt(**ADAPTED)
    publish(store, cfg, "adapter-01" if adapter else None)
    assert backbone.stop == ({1} if chat else {1, 40})
    text = backbone.text(prompt, "your question")
    replies = [backbone.generate([text], cfg.max_new_tokens)[0].text]
    learner = Learner(backbone, cfg)
    answers = [SURE if sure else f"Some longer words, {n}" for n in range(8)]
    pairs = [Pair(prompt, f"question {n}", answer, "gold") for n, answer in enumerate(answers)]
    for seed in range(epochs):
        learner.epoch(pairs, np.random.default_rng(seed))
    learner.save(store.scratch(cfg) / "adapter-01")
    replies.append(backbone.generate([text], cfg.max_new_tokens)[0].text)
    return store, cfg, replies


def publish(store, cfg: RunConfig, adapter: str | None) -> None:
    """A finished run whose best move is the second line of its second phase."""
    start = {"step": 0, "adapter": "adapter-99", "prompt": {}}
    first = {"step": 1, "adapter": "adapter-99", "prompt": {"system": "first phase"}}
    best = {"step": 1, "adapter": adapter, "prompt": ADAPTED}
    weights = checkpoints.identity(cfg.backbone)
    record = finish(store, cfg, best={"step": 1}, weights=weights)
    for step in (start, first, start, best):
        append_json(record / "steps.jsonl", step)
    write_sums(record)
