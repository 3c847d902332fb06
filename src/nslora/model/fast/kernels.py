"""What makes a model of transformers compute faster and the same, besides `attention`.

Blocked weights and a roomy cache; and for training LoRA's product, the loss and RMSNorm, each with a gradient of its
own, in fewer passes over memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

# layers of transformers' models that are given one and the same input
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROOM = 64  # tokens that a cache makes room for at once
ROWS = 64  # rows for which a layout of weights is chosen
AT_ONCE = 8  # rows of logits whose probabilities are held at once
# oneDNN and torch's layer above it keep the code of 1024 products each, some 0.4 MB a shape: memory would grow with the
# number of batches, until all are kept. 128 are enough for the shapes that batches mostly have (`decode.packed`)
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")


class RoomyLayer(DynamicLayer):
    """A layer of a KV cache with room at its end: a new token is written there, and nothing before it is copied.

    Repeating rows leaves tensors of their own behind, and the next token makes room anew.
    """

    room: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new tokens, dim) keys and values; all of them so far."""
        new, start = (key_states, value_states), self.get_seq_length()
        end = start + key_states.shape[-2]
        held: Any = (self.keys, self.values) if start else ()
        if not held or not self._in_room() or end > self.room[0].shape[-2]:
            self.room = tuple(x.new_empty(*x.shape[:2], end + ROOM, x.shape[-1]) for x in new)
            for room, old in zip(self.room, held, strict=False):
                room[..., :start, :] = old
        for room, x in zip(self.room, new, strict=True):
            room[..., start:end, :] = x
        self.is_initialized = True
        self.keys, self.values = keys, values = (
            self.room[0][..., :end, :],
            self.room[1][..., :end, :],
        )
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. Where the first n are kept, but for some that later ones replace, nothing else is copied."""
        kept = list(enumerate(indices.tolist()))
        moved = [(to, row) for to, row in kept if to != row]
        held: Any = (self.keys, self.values)
        if not self._in_room() or any(row < len(kept) for _, row in moved):
            super().batch_select_indices(indices)
            return
        for to, row in moved:
            for x in held:
                x[to] = x[row]
        self.room = tuple(room[: len(kept)] for room in self.room)
        self.keys, self.values = (x[: len(kept)] for x in held)

    def _in_room(self) -> bool:
        return bool(self.room) and cast(Tensor, self.keys).data_ptr() == self.room[0].data_ptr()


class Together:
    """Layers that are given one and the same input, one after another: the first computes the outputs of all."""

    def __init__(
        self, layers: Sequence[Any], outputs: Callable[[Tensor], Sequence[Tensor]]
    ) -> None:
        """`outputs` computes those of `layers`, in their order."""
        self.layers, self.outputs = layers, outputs
        self.input: Tensor | None = None
        self.ready: dict[Any, Tensor] = {}

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        """The output of one of the layers."""
        if input is not self.input or layer not in self.ready:
            self.input, self.ready = input, dict(zip(self.layers, self.outputs(input), strict=True))
        output = self.ready.pop(layer)
        if not self.ready:
            self.input = None
        return output


def families(model: Any, usable: Callable[[Any], bool]) -> list[list[Any]]:
    """The usable modules of `model`, those that are given the same input together."""
    found: list[list[Any]] = []
    for module in model.modules():
        for names in SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            layers = [
                layer if layer is None or usable(layer) else getattr(layer, "base_layer", None)
                for layer in layers
            ]
            if all(layer is not None and usable(layer) for layer in layers):
                found.append(layers)
    together = {layer for family in found for layer in family}
    return found + [
        [module] for module in model.modules() if usable(module) and module not in together
    ]


@contextmanager
def blocked_weights(model: Any) -> Iterator[None]:
    """Frozen linear layers compute with a copy of their weights in oneDNN's blocked layout, made once, on a CPU.

    For the few rows of a decoding step torch's plain product reads weights at a third of that speed, and one product
    for layers that have the same input takes less than one each. The copy takes as much memory as the weights.
    """
    on_cpu = torch.backends.mkldnn.is_available() and model.device.type == "cpu"
    found = families(
        model, lambda m: on_cpu and type(m) is torch.nn.Linear and not m.weight.requires_grad
    )
    for family in found:
        known = [(m.weight.data_ptr(), m.weight._version) for m in family]
        first = family[0]
        if getattr(first, "blocked_of", None) != known:
            first.blocked = torch.ops.mkldnn._reorder_linear_weight(
                torch.cat([m.weight for m in family]), ROWS
            )
            first.blocked_of = known
        together = Together(family, partial(_blocked_products, family, _joint_bias(family)))
        for module in family:
            module.forward = partial(together, module)
    try:
        yield
    finally:
        for module in (module for family in found for module in family):
            module.__dict__.pop("forward", None)


def _joint_bias(family: Sequence[Any]) -> Tensor | None:
    if all(m.bias is None for m in family):
        return None
    return torch.cat(
        [m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in family]
    )


def _blocked_products(
    family: Sequence[Any], bias: Tensor | None, input: Tensor
) -> Sequence[Tensor]:
    output = torch.ops.mkldnn._linear_pointwise(input, family[0].blocked, bias, "none", [], "")
    return output.split([m.out_features for m in family], -1)


def lora_products(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]], scale: float
) -> tuple[Tensor, ...]:
    """LoRA (Hu et al., 2021) of layers with the same input: y = x W' + b + s (x A') B' of (n, in) rows, (n, out) each.

    Args:
        layers: W (out, in) and b (out,), which are frozen, A (rank, in) and B (out, rank) of each. A and B may be
            float32 beside a bfloat16 x, whose type the products have.

    Sums are made within products, in y as in the gradient of x.
    """
    return cast(
        tuple[Tensor, ...],
        _LoraProducts.apply(x, scale, *(tensor for layer in layers for tensor in layer)),
    )


class _LoraProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, down, up = (tensors[i::4] for i in range(4))
        a, up = torch.cat(down).to(x.dtype), [b.to(x.dtype) for b in up]
        ctx.scale, ctx.ranks = scale, [len(a) for a in down]
        low = torch.nn.functional.linear(x, a)
        ctx.save_for_backward(x, low, a, *weights, *up)
        lows = low.split(ctx.ranks, 1)
        return tuple(
            torch.nn.functional.linear(x, weight, bias).addmm_(own, b.t(), alpha=scale)
            for weight, bias, b, own in zip(weights, biases, up, lows, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, *rest = ctx.saved_tensors
        weights, up = rest[: len(grads)], rest[len(grads) :]
        of_low = torch.cat([torch.mm(grad, b) for grad, b in zip(grads, up, strict=True)], 1).mul_(
            ctx.scale
        )
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(of_low, a)
            for grad, weight in zip(grads, weights, strict=True):
                of_x.addmm_(grad, weight)
        of_a = torch.mm(of_low.t(), x).float().split(ctx.ranks)
        lows = low.split(ctx.ranks, 1)
        of_b = [
            torch.mm(grad.t(), own).mul_(ctx.scale).float()
            for grad, own in zip(grads, lows, strict=True)
        ]
        return (
            of_x,
            None,
            *(g for pair in zip(of_a, of_b, strict=True) for g in (None, None, *pair)),
        )


def summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood (nats, float32, a scalar) of targets (n,) under logits (n, V) of any type.

    Few rows are in float32 at a time, and of them the gradient, softmax - one-hot, is all that is kept.
    """
    return cast(Tensor, _SummedNll.apply(logits, targets))


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        grad, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        for rows, wanted, out in zip(
            *(x.split(AT_ONCE) for x in (logits, targets[:, None], grad)), strict=True
        ):
            log = torch.log_softmax(rows, -1, dtype=torch.float32)
            total -= log.gather(1, wanted).sum()
            out.copy_(log.exp_().scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=log.dtype)))
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0], None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019): y = w n, n = x / sqrt(mean(x^2) + eps) over the last dimension, w frozen.

    The root is in float32, n and y have the type of x. The gradient is (g - n mean(g n)) / root, of g = w dy.
    """
    return cast(Tensor, _RmsNorm.apply(x, weight, eps))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = exact.mul_(scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        grad = grads[0] * weight
        along = (grad * normed).sum(-1, keepdim=True, dtype=torch.float32).div_(-normed.shape[-1])
        return (
            torch.addcmul(grad, normed, along.to(grad.dtype)).mul_(scale.to(grad.dtype)),
            None,
            None,
        )


def train_norms(model: Any) -> None:
    """Norms of Llama's kind in `model` (frozen weight times normed input) are `rms_norm` where gradients flow."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_trained_norm, module)


def _trained_norm(module: Any, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or module.weight.requires_grad:
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, module.variance_epsilon)
