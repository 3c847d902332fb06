"""LoRA (Hu et al., 2021) on all linear layers of a backbone, trained one epoch of AdamW at a time."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nslora.config import RunConfig
from nslora.disk import SUMS, require_whole, saving, write_sums
from nslora.model.backbone import Backbone
from nslora.model.fast import kernels, memory
from nslora.model.fast.packing import EVEN, PACK, Row, answer_logits, most_tokens, pack, split
from nslora.types import Pair, UserError

# gradient norm above which a step is scaled down
CLIP = 1.0
# what memory is found to hold (`memory.size`)
TOKENS = "tokens to train on"
# LoRA alpha as a multiple of the rank
ALPHA = 2
# files of a checkpoint: PEFT's own, and ours beside it
ADAPTER_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
# of the latter, which share of the tuned adapter lies beside it
SHARE = "share"
# what AdamW keeps of each weight: number of steps, and the moments of the gradient
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Epoch:
    """Report of one epoch over a list of pairs.

    Attributes:
        nll: summed negative log-likelihood of each pair's answer in nats, end-of-turn token included, in the order of
            the pairs; each is measured with the weights before its batch's step.
        answer_tokens: number of tokens of each of these answers.
        grad_norm: mean of |g| before clipping, over the optimizer steps whose batch has pairs of the task's own
            (`source` is not "replay"). g is the gradient of the own pairs' nll in the batch, divided by the answer
            tokens of the whole batch: replay pairs shorten g by their share, and give it no direction. NaN if all
            pairs are replay.
        tokens: real (not padding) tokens of the pairs, prompts included.
        seconds: wall time.
    """

    nll: tuple[float, ...]
    answer_tokens: tuple[int, ...]
    grad_norm: float
    tokens: int
    seconds: float

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per answer token, in nats, over all pairs."""
        return math.fsum(self.nll) / sum(self.answer_tokens)


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer without its casts and copies (`kernels.lora_products`); without dropout, the same result."""

    shared: kernels.SharedInput

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.disable_adapters:
            return self.base_layer(x)
        if torch.is_grad_enabled():
            return self.shared(self, x)
        # without gradients the base layer computes by itself: it may have weights in a layout of its own
        _, _, a, b = self.tensors()
        y = self.base_layer(x)
        low = F.linear(x.flatten(0, -2), a.to(x.dtype))
        # a view of y, to which s (x A') B' is added in place
        rows = y.flatten(0, -2)
        rows.addmm_(low, b.to(x.dtype).t(), alpha=self.scale)
        return y

    @property
    def scale(self) -> float:
        """Factor of the product of A and B: alpha / rank."""
        return self.scaling[self.active_adapters[0]]

    def tensors(self) -> kernels.LoraTensors:
        """Return W, b, A and B."""
        (name,) = self.active_adapters
        base = cast(torch.nn.Linear, self.base_layer)
        a = cast(torch.nn.Linear, self.lora_A[name])
        b = cast(torch.nn.Linear, self.lora_B[name])
        return base.weight, base.bias, a.weight, b.weight


class Learner:
    """The LoRA weights on one backbone and their AdamW state: together all that training remembers.

    An epoch draws the order of its pairs from the Generator that it is given, and nothing else at random: the model
    stays in evaluation mode, so that no dropout draws from torch's global state. With the Generator's state, a saved
    folder therefore continues as if training had never stopped, to the bit (same device, dtype and thread count; up to
    the order of sums where a batch has exceeded the memory).

    Attributes:
        share: of the tuned adapter that is in place, 1 being all of it (`scale`); training goes on from all of it.
    """

    def __init__(self, backbone: Backbone, cfg: RunConfig) -> None:
        """Put a neutral adapter on the backbone, in place of the adapter of an earlier run."""
        if isinstance(backbone.model, PeftModel):
            backbone.model = backbone.model.unload()
        seed = int(cfg.rng("lora-init").integers(2**31))
        self.model = backbone.model = _with_lora(backbone.model, cfg.rank, seed)
        self.backbone = backbone
        self.batch = cfg.batch
        self.lr = cfg.lr
        # a tensor of the model, for type and device
        self.like = self.model.get_input_embeddings().weight
        parameters = dict(self.model.named_parameters())
        self.names = [name for name in parameters if parameters[name].requires_grad]
        self.weights = [parameters[name] for name in self.names]
        # for `reset`: A as drawn, B zero
        self.initial = [weight.detach().clone() for weight in self.weights]
        self.share = 1.0
        self.optimizer = self._fresh_optimizer()

    def epoch(self, pairs: Sequence[Pair], rng: np.random.Generator) -> Epoch:
        """Train once over `pairs` (at least one), in random order."""
        started = time.perf_counter()
        self._make_whole()
        rows = [self._row(pair) for pair in pairs]
        order: list[int] = []
        token_nll: list[Tensor] = []
        norms: list[Tensor] = []
        for batch in batches(len(rows), self.batch, rng):
            own = [i for i in batch if pairs[i].source != "replay"]
            replay = [i for i in batch if pairs[i].source == "replay"]
            own_rows = [rows[i] for i in own]
            replay_rows = [rows[i] for i in replay]
            nll, own_norm = self._step(own_rows, replay_rows)
            # terms come in the order of the step, not of the pairs
            order += own + replay
            token_nll += nll
            if own:
                norms.append(own_norm)
        # results leave the device here, once an epoch: a step never waits for them
        lengths = [len(answer) for _, answer in rows]
        grad_norm = torch.stack(norms).mean().item() if norms else math.nan
        return Epoch(
            nll=_per_row(token_nll, order, lengths),
            answer_tokens=tuple(lengths),
            grad_norm=grad_norm,
            tokens=sum(len(prompt) + len(answer) for prompt, answer in rows),
            seconds=time.perf_counter() - started,
        )

    def save(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, and the AdamW state beside it as `optimizer.safetensors`.

        Both are float32, as torch keeps them; the state takes two thirds of the bytes, and nothing but `load` reads it.
        The folder's checksums are removed first and come back last. Raises UserError where it cannot be written.
        """
        with saving(folder):
            # from here until the last line `load` refuses the folder
            (folder / SUMS).unlink(missing_ok=True)
            self.model.save_pretrained(str(folder))
            about = {SHARE: str(self.share)}
            save_file(self._optimizer_tensors(), folder / OPTIMIZER_FILE, about)
            write_sums(folder)

    def load(self, folder: Path) -> None:
        """Put back adapter and AdamW state as `save` wrote them; the learning rate stays the learner's own.

        Raises UserError if a file is missing, damaged, or of another adapter; nothing is changed then.
        """
        adapter = self._adapter(folder)
        state = self._optimizer_state(folder / OPTIMIZER_FILE)
        # both files are whole and fit
        set_peft_model_state_dict(self.model, adapter)
        self.share = _share(folder / OPTIMIZER_FILE)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer = self._fresh_optimizer()
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def load_weights(self, folder: Path) -> None:
        """Put back the adapter alone, to answer with; raises UserError as `load` does."""
        set_peft_model_state_dict(self.model, self._adapter(folder))

    def _adapter(self, folder: Path) -> dict[str, Tensor]:
        """Read the weights of an adapter that is whole and fits."""
        require_whole(folder, "this adapter cannot be used")
        adapter = _read(folder / ADAPTER_FILE)
        expected = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        if _shapes(adapter) != _shapes(expected):
            raise UserError(f"{folder / ADAPTER_FILE} is of another backbone or rank.")
        return adapter

    @property
    def products(self) -> list[Tensor]:
        """B of every layer, in which what the adapter adds to a weight, A B, is linear."""
        named = zip(self.names, self.weights, strict=True)
        return [weight for name, weight in named if "lora_B" in name]

    def scale(self, tuned: Sequence[Tensor], share: float) -> None:
        """Put weights in place that are a share of the way from the frozen ones to those with `tuned` as `products`."""
        with torch.no_grad():
            for weight, whole in zip(self.products, tuned, strict=True):
                weight.copy_(whole * share)
        self.share = share

    def _make_whole(self) -> None:
        # from what a checkpoint holds: whoever goes on from it does the same arithmetic
        if self.share != 1.0:
            self.scale([weight / self.share for weight in self.products], 1.0)

    def reset(self) -> None:
        """Put back the neutral adapter and the optimizer as they were at first, to the bit."""
        with torch.no_grad():
            for weight, initial in zip(self.weights, self.initial, strict=True):
                weight.copy_(initial)
        self.share = 1.0
        self.optimizer = self._fresh_optimizer()

    def _fresh_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.weights, lr=self.lr, weight_decay=0.0, fused=True)

    def _row(self, pair: Pair) -> Row:
        text = self.backbone.text(pair.prompt, pair.question)
        return self.backbone.encode(text, pair.target)

    def _step(self, own: list[Row], replay: list[Row]) -> tuple[list[Tensor], Tensor]:
        """Make one optimizer step on the mean loss per answer token of a batch.

        The loss of own rows is the nll, that of replay the cross entropy with the frozen model's probabilities. Where
        the parts of a batch exceed the device's memory, its gradients are made anew of smaller ones.

        Returns:
            nll of each answer token, own rows first, in parts (n,), and the norm of the gradient of the own rows alone
            (0 if there are none).
        """
        while True:
            most = memory.size(self.model, TOKENS, most_tokens(self.like.device))
            try:
                nll, own_norm = self._gradients(own, replay, most)
                break
            except torch.OutOfMemoryError:
                # what the parts before have added
                self.optimizer.zero_grad(set_to_none=True)
            for module in self.model.modules():
                if isinstance(module, FusedLoraLinear):
                    module.shared.forget()
            memory.keep(self.model, TOKENS, memory.halved(most, least=EVEN))
        norm = torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        # the first step makes room for its moments
        with memory.single_row():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return nll, norm if own_norm is None else own_norm

    def _gradients(
        self, own: list[Row], replay: list[Row], most: int
    ) -> tuple[list[Tensor], Tensor | None]:
        """Add the gradients of a batch, in parts of `most` tokens.

        Returns:
            nll of each answer token, as `_step` does, and where there is replay the norm of the own rows' gradient.
        """
        answer_tokens = sum(len(answer) for _, answer in own + replay)
        own_norm = None
        nll = self._backward(own, answer_tokens, most=most)
        if replay:
            # the gradients are those of the own rows now; only a mixed batch pays for a second norm
            grads = [weight.grad for weight in self.weights if weight.grad is not None]
            own_norm = torch.nn.utils.get_total_norm(grads)
            nll += self._backward(replay, answer_tokens, frozen=True, most=most)
        return nll, own_norm

    def _backward(
        self, rows: list[Row], answer_tokens: int, frozen: bool = False, most: int = PACK
    ) -> list[Tensor]:
        """Add the gradient of the rows' share of a batch's mean loss; return nll of each answer token, in parts (n,).

        The loss is the nll of the answers, or (`frozen`) the cross entropy with the frozen model's probabilities, which
        keeps more of what it knows than its replies alone.
        """
        nll = []
        for part in split(rows, most):
            inputs = pack(part, self.like)
            # before the graph of the gradient: it switches the adapter off and on
            reference = self._frozen_logits(inputs) if frozen else None
            logits, targets = answer_logits(self.model, **inputs)
            total, terms = kernels.summed_nll(logits, targets, reference)
            # dividing by the whole batch's tokens makes the parts' gradients add up to the mean's
            share = total / answer_tokens
            share.backward()
            nll.append(terms)
        return nll

    @torch.no_grad()
    def _frozen_logits(self, inputs: dict[str, Any]) -> Tensor:
        """Return what the model without its adapter predicts for the answer tokens, (n, V)."""
        with self.model.disable_adapter():
            return answer_logits(self.model, **inputs)[0]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the AdamW state as `<name of the weight>.<key>`; empty before the first step."""
        return {
            f"{name}.{key}": tensor
            for name, weight in zip(self.names, self.weights, strict=True)
            for key, tensor in self.optimizer.state[weight].items()
        }

    def _optimizer_state(self, path: Path) -> dict[int, dict[str, Tensor]]:
        """Read what `_optimizer_tensors` gave, as torch's optimizers load it: by number of the weight."""
        tensors = _read(path)
        if not tensors:
            # saved before the first step
            return {}
        shapes = {
            f"{name}.{key}": torch.Size() if key == "step" else weight.shape
            for name, weight in zip(self.names, self.weights, strict=True)
            for key in ADAMW_STATE
        }
        if _shapes(tensors) != shapes:
            raise UserError(f"{path} is of another backbone or rank.")
        return {
            i: {key: tensors[f"{name}.{key}"] for key in ADAMW_STATE}
            for i, name in enumerate(self.names)
        }


def batches(count: int, size: int, rng: np.random.Generator) -> list[list[int]]:
    """Draw batches of the indices below `count`, in random order.

    Batches of similar rows would compute faster, but each then undoes what others taught.
    """
    order = rng.permutation(count).tolist()
    return [order[start : start + size] for start in range(0, count, size)]


def _with_lora(model: Any, rank: int, seed: int) -> PeftModel:
    """Wrap the model with a neutral adapter (B is 0) whose A is drawn from `seed`, and fuse its layers."""
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    # PEFT has layers of its own for quantised weights
    if not getattr(model, "is_quantized", False):
        config._register_custom_module({torch.nn.Linear: FusedLoraLinear})
    # PEFT draws A from torch's global state, which is put back
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    # a set, which each process would write in another order
    adapter: Any = next(iter(wrapped.peft_config.values()))
    adapter.target_modules = sorted(adapter.target_modules or ())
    # PEFT's wrapping is in training mode; a model with dropout would draw from torch's global state
    wrapped.eval()
    kernels.train_norms(wrapped)
    for family in kernels.sibling_layers(wrapped, lambda m: isinstance(m, FusedLoraLinear)):
        shared = kernels.SharedInput(family, partial(_outputs, family))
        for layer in family:
            layer.shared = shared
    return cast(PeftModel, wrapped)


def _outputs(family: Sequence[FusedLoraLinear], x: Tensor) -> list[Tensor]:
    """Compute the outputs (..., out) of layers from their common input (..., in)."""
    tensors = [layer.tensors() for layer in family]
    rows = x.flatten(0, -2)
    products = kernels.lora_products(rows, tensors, family[0].scale)
    return [y.unflatten(0, x.shape[:-1]) for y in products]


def _per_row(
    token_nll: list[Tensor],
    order: list[int],
    lengths: list[int],
) -> tuple[float, ...]:
    """Sum the nll of tokens, whose rows come in `order`, by row; in the order of `lengths`."""
    # (answer tokens of the epoch,); float64 sums do not depend on how rows were split
    terms = torch.cat(token_nll).double().cpu()
    rows = terms.split([lengths[i] for i in order])
    sums = [0.0] * len(lengths)
    for i, row in zip(order, rows, strict=True):
        sums[i] = row.sum().item()
    return tuple(sums)


def _read(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error


def _share(path: Path) -> float:
    """Read which share of the tuned adapter lies beside a file."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    # adapters of before were saved whole
    return float(about.get(SHARE, 1.0))


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
