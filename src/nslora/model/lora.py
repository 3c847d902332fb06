"""The numerical move: LoRA (Hu et al., 2021) on all linear layers, one epoch of AdamW at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file

from nslora.config import RunConfig
from nslora.model.backbone import Backbone
from nslora.model.fast import kernels
from nslora.model.fast.decode import answer_logits, common_prefix, packed
from nslora.types import Pair

Row = tuple[list[int], list[int]]  # token ids of a prompt and of its answer
CLIP = 1.0  # gradient norm above which a step is scaled down
PACK = 512  # tokens computed at once: more gain nothing, and take memory
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


class Lean(LoraLinear):
    """PEFT's LoRA layer without its casts and copies (`kernels.lora_products`); without dropout, the same result."""

    together: kernels.Together

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if self.disable_adapters:
            return self.base_layer(x)
        if torch.is_grad_enabled():
            return self.together(self, x)
        _, _, a, b = self.tensors()
        y, rows = self.base_layer(x), x.flatten(0, -2)  # which may compute in a layout of its own
        y.flatten(0, -2).addmm_(
            torch.nn.functional.linear(rows, a.to(x.dtype)), b.to(x.dtype).t(), alpha=self.scale
        )
        return y

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied with."""
        return self.scaling[self.active_adapters[0]]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """W, b, A and B."""
        (name,) = self.active_adapters
        base, a, b = (
            cast(torch.nn.Linear, m)
            for m in (self.base_layer, self.lora_A[name], self.lora_B[name])
        )
        return base.weight, base.bias, a.weight, b.weight


def _outputs(family: Sequence[Lean], x: torch.Tensor) -> list[torch.Tensor]:
    """What the layers make of their common input."""
    made = kernels.lora_products(
        x.flatten(0, -2), [layer.tensors() for layer in family], family[0].scale
    )
    return [y.unflatten(0, x.shape[:-1]) for y in made]


class Learner:
    """The LoRA weights on one backbone, and their AdamW state."""

    def __init__(self, backbone: Backbone, cfg: RunConfig) -> None:
        """Put a fresh adapter on the backbone, taking off any that an earlier run left there."""
        if isinstance(backbone.model, PeftModel):
            backbone.model = backbone.model.unload()
        torch.manual_seed(int(cfg.rng("lora-init").integers(2**31)))
        lora = LoraConfig(
            r=cfg.rank,
            lora_alpha=ALPHA * cfg.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        lora._register_custom_module({torch.nn.Linear: Lean})
        self.model = backbone.model = get_peft_model(backbone.model, lora)
        kernels.train_norms(self.model)
        for family in kernels.families(self.model, lambda module: isinstance(module, Lean)):
            together = kernels.Together(family, partial(_outputs, family))
            for layer in family:
                layer.together = together
        self.backbone, self.batch = backbone, cfg.batch
        self.like = backbone.model.get_input_embeddings().weight
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=cfg.lr, weight_decay=0.0, fused=True)

    def epoch(self, pairs: Sequence[Pair], rng: np.random.Generator) -> Epoch:
        """Train once over `pairs`, in random order."""
        started = time.perf_counter()
        rows = [
            self.backbone.encode(self.backbone.text(p.prompt, p.question), p.target) for p in pairs
        ]
        losses, norms, counts = [], [], []
        self.model.train()
        for batch in batches(rows, self.batch, rng):
            answer_tokens = sum(len(answer) for _, answer in batch)
            losses.append(sum(self._backward(part, answer_tokens) for part in parts(batch)))
            counts.append(answer_tokens)
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.weights, CLIP)))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        tokens = sum(len(prompt) + len(answer) for prompt, answer in rows)
        mean = float(np.average(losses, weights=counts))
        return Epoch(mean, float(np.mean(norms)), tokens, time.perf_counter() - started)

    def _backward(self, rows: Sequence[Row], answer_tokens: int) -> float:
        """Add the gradient of the rows' share in a batch's mean loss (nats per answer token); the share."""
        logits, targets = answer_logits(self.model, **packed(list(rows), self.like))
        loss = kernels.summed_nll(logits, targets) / answer_tokens
        loss.backward()
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors)."""
        self.model.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Put back an adapter written by `save`."""
        weights = load_file(str(folder / "adapter_model.safetensors"))
        set_peft_model_state_dict(self.model, weights)


def parts(batch: Sequence[Row]) -> list[list[Row]]:
    """The batch in parts whose gradients add up, to bound a step's memory: one row, or several that compute no more.

    No more than one row of PACK tokens does, that is: PACK tokens, those that a row shares with an earlier one of its
    part not counted (`packed`), and PACK ** 2 pairs of tokens in attention.
    """
    cuts: list[list[Row]] = [[]]
    tokens = pairs = 0
    for prompt, answer in batch:
        length = len(prompt) + len(answer)
        new = length - max((common_prefix([prompt, other]) for other, _ in cuts[-1]), default=0)
        if cuts[-1] and (tokens + new > PACK or pairs + length**2 > PACK**2):
            cuts.append([])
            tokens, pairs, new = 0, 0, length
        tokens, pairs = tokens + new, pairs + length**2
        cuts[-1].append((prompt, answer))
    return cuts


def batches(rows: Sequence[Row], size: int, rng: np.random.Generator) -> list[list[Row]]:
    """Batches of rows in random order. Batches of like rows compute faster, but each then undoes what others taught."""
    order = rng.permutation(len(rows))
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(rows), size)]
