"""The numerical move: LoRA (Hu et al., 2021) on all linear layers, one epoch of AdamW at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from .backbones import Backbone
from .config import RunConfig
from .decode import answer_logits
from .types import Pair

Row = tuple[list[int], list[int]]  # token ids of a prompt and of its answer
CLIP = 1.0  # gradient norm above which a step is scaled down
ALPHA = 2  # LoRA alpha as a multiple of the rank


@dataclass(frozen=True)
class Epoch:
    """What one numerical move reports.

    Attributes:
        loss: mean negative log-likelihood per answer token, in nats, over the epoch.
        grad_norm: mean over steps of the L2 norm of the adapter's gradient before clipping.
        tokens: real (not padding) tokens seen, prompts included.
        seconds: wall time.
    """

    loss: float
    grad_norm: float
    tokens: int
    seconds: float


class Learner:
    """The LoRA weights on one backbone, and their AdamW state."""

    def __init__(self, backbone: Backbone, cfg: RunConfig) -> None:
        """Put a fresh adapter on the backbone, taking off any that an earlier run left there."""
        if isinstance(backbone.model, PeftModel):
            backbone.model = backbone.model.unload()
        torch.manual_seed(int(cfg.rng("lora-init").integers(2**31)))
        lora = LoraConfig(r=cfg.rank, lora_alpha=ALPHA * cfg.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = backbone.model = get_peft_model(backbone.model, lora)
        self.backbone, self.batch = backbone, cfg.batch
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=cfg.lr, weight_decay=0.0)

    def epoch(self, pairs: Sequence[Pair], rng: np.random.Generator) -> Epoch:
        """Train once over `pairs`, in batches of similar length and random order."""
        started = time.perf_counter()
        rows = [self.backbone.encode(self.backbone.text(p.prompt, p.question), p.target) for p in pairs]
        losses, norms, counts = [], [], []
        self.model.train()
        for batch in batches(rows, self.batch, rng):
            loss, answer_tokens = self._loss(batch)
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.weights, CLIP)))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            counts.append(answer_tokens)
        self.model.eval()
        tokens = sum(len(prompt) + len(answer) for prompt, answer in rows)
        mean = float(np.average(losses, weights=counts))
        return Epoch(mean, float(np.mean(norms)), tokens, time.perf_counter() - started)

    def _loss(self, batch: Sequence[Row]) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy over the batch's answer tokens, and how many there are."""
        ids, attention, answers = (t.to(self.backbone.device) for t in collate(batch))
        mixed = self.backbone.dtype == "bfloat16"
        with torch.autocast(self.backbone.device.split(":")[0], torch.bfloat16) if mixed else nullcontext():
            logits, targets = answer_logits(self.model, ids, attention, answers)
        return torch.nn.functional.cross_entropy(logits.float(), targets), len(targets)

    def save(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors)."""
        self.model.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Put back an adapter written by `save`."""
        weights = load_file(str(folder / "adapter_model.safetensors"))
        set_peft_model_state_dict(self.model, weights)


def collate(batch: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-pad (prompt, answer) ids to three [N, T] tensors: ids, attention mask, answer mask."""
    length = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids, attention, answers = (torch.zeros(len(batch), length, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attention[row, :end] = 1
        answers[row, len(prompt) : end] = 1
    return ids, attention, answers.bool()


def batches(rows: Sequence[Row], size: int, rng: np.random.Generator) -> list[list[Row]]:
    """Batches of similar length in random order: little padding, and another composition each epoch."""
    order = sorted(rng.permutation(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    cuts = [[rows[i] for i in order[start : start + size]] for start in range(0, len(rows), size)]
    return [cuts[i] for i in rng.permutation(len(cuts))]
