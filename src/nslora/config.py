"""The settings of one run: validated, immutable, fingerprinted, and the source of all its randomness.

Values the paper does not state are our choice; they are swept in the ablations.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

import numpy as np

from nslora.types import UserError

TASKS = ("facts", "style", "math", "mixed", "stream")
METHODS = (
    "frozen",
    "lora",
    "textgrad",
    "alternate",
    "random",
    "monitor",
    "classifier",
    "neurosymbolic",
    "oracle",
    "lora-demonstrated",
)
CHOICES = {
    "targets": ("remade", "gold", "verified", "both", "duplicated", "unverified"),
    "small": ("signed", "absolute"),
    "signal_loss": ("train", "dev"),
    "router": ("rule", "utility"),
    "control": ("none", "shuffled", "random"),
    "tier": ("easy", "hard"),
    "replayed": ("all", "right"),
    "returned": ("best", "tuned"),
    "edited": ("both", "system"),
}
# settings newer than some records: part of a run's identity only where they are not the default
LATER = (
    "control",
    "tier",
    "bake",
    "reserve",
    "replay_pool",
    "replayed",
    "epochs",
    "returned",
    "edited",
)
POSITIVE = (
    "moves",
    "items",
    "test_items",
    "rank",
    "batch",
    "lr",
    "candidates",
    "feedback",
    "prompt_tokens",
    "max_new_tokens",
    "patience",
    "threads",
    "replay_pool",
    "epochs",
)


@dataclass(frozen=True)
class RunConfig:
    """One run. Two runs with equal settings and weights make the same records."""

    task: str = "mixed"  # facts, style, math, mixed, stream, or own:<file.jsonl>
    backbone: str = (
        "smollm2-135m"  # a key of weights.BACKBONES, hub:<id>@<revision>, or a local folder
    )
    method: str = "neurosymbolic"  # one of METHODS
    seed: int = 0
    moves: int = 6  # budget of moves, equal for every method; in a stream, of each phase
    returned: str = "best"  # the best candidate on dev, or the best with tuned weights: what the data alone is worth

    items: int = 24  # facts (each in 5 training wordings), style questions, math problems: of each kind in the task
    test_items: int = 36  # test items of each kind
    rule: str = "end_phrase"  # the style rule of style and mixed, the first of a stream (a key of rules.RULES)
    tier: str = (
        "easy"  # of math: arithmetic (easy), or word problems with gold chains of thought (hard)
    )
    max_new_tokens: int = 32  # longest reply, in tokens

    rank: int = 16  # LoRA rank
    lr: float = 5e-4  # AdamW learning rate
    batch: int = 8  # training pairs per optimizer step
    epochs: int = 1  # passes over the training pairs per numerical move
    targets: str = (
        "remade"  # verified replies in the prompt's style, else gold; or an arm of the study
    )
    bake: bool = False  # weights learn under the start prompt what the refined one brought, and go on with the start's
    replay: float = (
        1.0  # replay pairs per training pair: own replies of the frozen model under varied prompts
    )
    replay_pool: int = 128  # replay questions of each kind at most, from which each epoch draws
    replayed: str = "all"  # replies that are replayed: all whole ones that keep the told rule, or the right ones only

    candidates: int = 3  # edits proposed per symbolic move
    feedback: int = 2  # failing examples shown to the editor per symbolic move
    prompt_tokens: int = 160  # longest prompt (system and template together), in backbone tokens
    edited: str = "both"  # texts that edits may change: system prompt and question template, or the system prompt alone
    gate: bool = True  # keep an edit only if dev reward does not fall
    control: str = (
        "none"  # "shuffled": edits see another rule's critic; "random": their words are random ones
    )

    c1_eps: float = 0.1  # |C1| or -C1 below this is small
    c2_eps: float = 0.5  # gradient norm below this is small
    gain_eps: float = 0.02  # symbolic gain below this is little
    patience: int = 1  # consecutive small signals before the phase changes
    demand_floor: float = 0.1  # share of examples below which a phase has no demand
    reserve: int = 2  # moves left when a needed, untried kind gets its turn, and the last is kept for weights; 0: never
    small: str = "signed"  # reading of "small" for C1: signed (C1 > -eps) or absolute (|C1| < eps)
    signal_loss: str = "train"  # C1 from the training loss or from the loss on dev gold answers
    router: str = "rule"  # the paper's rule, or our utility extension

    editor_url: str = "local"  # the llama.cpp server on loopback, or an OpenAI-compatible base URL
    editor_model: str = "qwen2.5-coder-1.5b"
    threads: int = (
        2  # CPU threads: other counts give other bits, so they belong to a run's identity
    )

    def __post_init__(self) -> None:
        """Check every value; raises UserError with one sentence."""
        hints = get_type_hints(type(self))
        for f in fields(self):
            value, kind = getattr(self, f.name), hints[f.name]
            if kind is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            elif type(value) is not kind:
                raise UserError(f"setting {f.name} must be of type {kind.__name__}, not {value!r}.")
        for name, allowed in {"method": METHODS, **CHOICES}.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(allowed)}."
                )
        if self.task not in TASKS and not self.task.startswith("own:"):
            raise UserError(
                f"unknown task {self.task!r}; choose from {', '.join(TASKS)} or own:<file.jsonl>."
            )
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise UserError(
                    f"setting {name} must be greater than 0, not {getattr(self, name)!r}."
                )
        for name in ("replay", "c1_eps", "c2_eps", "gain_eps", "demand_floor", "reserve", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"setting {name} must not be negative, not {getattr(self, name)!r}."
                )

    @classmethod
    def of(cls, settings: dict[str, Any]) -> RunConfig:
        """Build from a mapping; an unknown key raises UserError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise UserError(
                f"unknown setting {unknown[0]!r}; known settings: {', '.join(sorted(known))}."
            )
        return cls(**settings)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits over all settings but the seed, so that seeds of one experiment share it."""
        same = {
            f.name for f in fields(self) if f.name in LATER and getattr(self, f.name) == f.default
        }
        settings = {k: v for k, v in asdict(self).items() if k not in {"seed", *same}}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_id(self) -> str:
        """Folder name of the run's record: readable, and unique per configuration."""
        parts = (self.task, self.backbone, self.method, f"s{self.seed}", self.fingerprint)
        return "-".join(
            "".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts
        )

    def rng(self, purpose: str) -> np.random.Generator:
        """An independent generator per purpose, the same in every process and for every method at this seed."""
        digest = hashlib.sha256(purpose.encode()).digest()
        return np.random.default_rng([self.seed, *digest[:8]])
