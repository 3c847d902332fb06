"""Faster layers for a model of transformers and PEFT: decoding first, then training.

| here               | replaces                                 | saves                                            |
| ------------------ | ---------------------------------------- | ------------------------------------------------ |
| `PreallocatedLayer`| `DynamicLayer` of a KV cache             | copying the whole cache at each new token        |
| `blocked_weights`  | frozen `nn.Linear` on a CPU              | two thirds of the time to read weights           |
| `lora_products`    | PEFT's LoRA layer                        | casts, and sums in passes of their own           |
| `summed_nll`       | cross entropy in float32                 | float32 logits, and a pass for the gradient      |
| `rms_norm`         | transformers' RMSNorm                    | float32 intermediates kept for the gradient      |

Same numbers: tests/model/fast/test_kernels.py, values and gradients against the plain formulas in float64.
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

# names of layers in transformers' models that have one and the same input
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# tokens for which a cache makes room at once
ROOM = 64
# number of rows for which oneDNN chooses a layout of weights
LAYOUT_ROWS = 64
# rows of logits whose probabilities are in float32 at once
NLL_ROWS = 8
# oneDNN and torch's layer above it keep the code of 1024 products each, some 0.4 MB a shape: memory would grow with the
# number of batches, until all are kept. 128 are enough for the shapes that batches mostly have (`packing.EVEN`).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")


class PreallocatedLayer(DynamicLayer):
    """A layer of a KV cache with room at its end: a new token is written there, and nothing before it is copied.

        buffer  | k0 k1 k2 k3 k4 .. .. .. |      keys = buffer[..., :5, :], a view; the next token goes to slot 5

    `keys` and `values` that are no such view (rows were repeated, say) are copied into new room by the next token.
    """

    buffers: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, new tokens, dim); return all of them so far."""
        new = (key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._in_buffers() or end > self.buffers[0].shape[-2]:
            self._grow(new, start, end + ROOM)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[..., start:end, :] = states
        self.is_initialized = True
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. If they are the first n, some replaced by later ones, only the replacements are copied."""
        rows = indices.tolist()
        moves = [(slot, row) for slot, row in enumerate(rows) if slot != row]
        if not self._in_buffers() or any(row < len(rows) for _, row in moves):
            super().batch_select_indices(indices)
            return
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        for slot, row in moves:
            keys[slot] = keys[row]
            values[slot] = values[row]
        self.buffers = tuple(buffer[: len(rows)] for buffer in self.buffers)
        self.keys, self.values = keys[: len(rows)], values[: len(rows)]

    def _grow(self, new: tuple[Tensor, Tensor], start: int, size: int) -> None:
        """Make buffers for `size` tokens, of the kind of `new`, with the first `start` tokens as they are."""
        self.buffers = tuple(x.new_empty(*x.shape[:2], size, x.shape[-1]) for x in new)
        if start:
            for buffer, old in zip(self.buffers, (self.keys, self.values), strict=True):
                buffer[..., :start, :] = cast(Tensor, old)

    def _in_buffers(self) -> bool:
        """Whether keys (and so values) are a view of the buffers."""
        if not self.buffers:
            return False
        return cast(Tensor, self.keys).data_ptr() == self.buffers[0].data_ptr()


class SharedInput:
    """Sibling layers, called one after another with the same input: the first call computes the outputs of all."""

    def __init__(
        self, layers: Sequence[Any], outputs: Callable[[Tensor], Sequence[Tensor]]
    ) -> None:
        """Wrap `outputs`, which computes the outputs of `layers` in their order."""
        self.layers, self.outputs = layers, outputs
        self.input: Tensor | None = None
        self.pending: dict[Any, Tensor] = {}

    def __call__(self, layer: Any, input: Tensor) -> Tensor:
        """Return the output of one of the layers."""
        if input is not self.input or layer not in self.pending:
            outputs = self.outputs(input)
            self.input, self.pending = input, dict(zip(self.layers, outputs, strict=True))
        output = self.pending.pop(layer)
        if not self.pending:
            # nothing is kept alive between forward passes
            self.input = None
        return output


def sibling_layers(model: Any, usable: Callable[[Any], bool]) -> list[list[Any]]:
    """Return the usable modules of `model` in lists: those with the same input together, others alone."""
    families: list[list[Any]] = []
    for module in model.modules():
        for names in SIBLINGS:
            family = [_unwrapped(getattr(module, name, None), usable) for name in names]
            if all(layer is not None and usable(layer) for layer in family):
                families.append(family)
    members = {layer for family in families for layer in family}
    alone = [m for m in model.modules() if usable(m) and m not in members]
    return families + [[module] for module in alone]


def _unwrapped(layer: Any, usable: Callable[[Any], bool]) -> Any:
    """Return the layer, or what an adapter wraps in it if only that is usable."""
    return layer if layer is None or usable(layer) else getattr(layer, "base_layer", None)


@contextmanager
def blocked_weights(model: Any) -> Iterator[None]:
    """Let frozen linear layers on a CPU compute with a copy of their weights in oneDNN's blocked layout, made once.

    For the few rows of a decoding step torch's plain product reads weights at a third of that speed, and one product
    for siblings takes less than one each. The copy takes as much memory as the weights.
    """
    on_cpu = torch.backends.mkldnn.is_available() and model.device.type == "cpu"

    def usable(module: Any) -> bool:
        return on_cpu and type(module) is torch.nn.Linear and not module.weight.requires_grad

    families = sibling_layers(model, usable)
    for family in families:
        outputs = partial(_blocked_products, family, _blocked_copy(family), _joint_bias(family))
        shared = SharedInput(family, outputs)
        for module in family:
            module.forward = partial(shared, module)
    try:
        yield
    finally:
        for family in families:
            for module in family:
                module.__dict__.pop("forward", None)


def _blocked_copy(family: Sequence[Any]) -> Tensor:
    """Return the joint weights (sum of outputs, in) in blocked layout, anew if a weight has changed since."""
    first = family[0]
    versions = [(m.weight.data_ptr(), m.weight._version) for m in family]
    if getattr(first, "blocked_versions", None) != versions:
        joint = torch.cat([m.weight for m in family])
        first.blocked = torch.ops.mkldnn._reorder_linear_weight(joint, LAYOUT_ROWS)
        first.blocked_versions = versions
    return first.blocked


def _joint_bias(family: Sequence[Any]) -> Tensor | None:
    """Return the biases of all layers in one, zeros where a layer has none; None if no layer has one."""
    if all(m.bias is None for m in family):
        return None
    zeros = [m.weight.new_zeros(m.out_features) for m in family]
    return torch.cat([z if m.bias is None else m.bias for m, z in zip(family, zeros, strict=True)])


def _blocked_products(
    family: Sequence[Any], blocked: Tensor, bias: Tensor | None, input: Tensor
) -> Sequence[Tensor]:
    output = torch.ops.mkldnn._linear_pointwise(input, blocked, bias, "none", [], "")
    return output.split([m.out_features for m in family], -1)


def lora_products(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]], scale: float
) -> tuple[Tensor, ...]:
    """Compute LoRA (Hu et al., 2021) of layers with the same input: y = x W' + b + s (x A') B'.

    Args:
        x: (n, in).
        layers: W (out, in) and b (out,), which are frozen, A (rank, in) and B (out, rank) of each. A and B may be
            float32 beside a bfloat16 x, whose type the products have.

    Returns:
        y (n, out) of each layer. Sums are made within products, in y as in the gradient of x.
    """
    tensors = [tensor for layer in layers for tensor in layer]
    return cast(tuple[Tensor, ...], _LoraProducts.apply(x, scale, *tensors))


class _LoraProducts(torch.autograd.Function):
    """With one stacked A of all layers: l = x A' is (n, sum of ranks), and each layer has columns of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, down, up = (tensors[i::4] for i in range(4))
        a = torch.cat(down).to(x.dtype)
        up = [b.to(x.dtype) for b in up]
        low = torch.nn.functional.linear(x, a)
        ctx.scale, ctx.ranks = scale, [len(matrix) for matrix in down]
        ctx.save_for_backward(x, low, a, *weights, *up)
        outputs = []
        lows = low.split(ctx.ranks, 1)
        for weight, bias, b, low_own in zip(weights, biases, up, lows, strict=True):
            y = torch.nn.functional.linear(x, weight, bias)
            outputs.append(y.addmm_(low_own, b.t(), alpha=scale))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, *rest = ctx.saved_tensors
        weights, up = rest[: len(grads)], rest[len(grads) :]
        # dl = s dy B of each layer, side by side: (n, sum of ranks)
        of_low = torch.cat([torch.mm(grad, b) for grad, b in zip(grads, up, strict=True)], 1)
        of_low.mul_(ctx.scale)
        # dx = dl A + sum of dy W
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(of_low, a)
            for grad, weight in zip(grads, weights, strict=True):
                of_x.addmm_(grad, weight)
        # dA = dl' x, and dB = s dy' l
        of_a = torch.mm(of_low.t(), x).float().split(ctx.ranks)
        of_tensors: list[Tensor | None] = []
        for grad, low_own, da in zip(grads, low.split(ctx.ranks, 1), of_a, strict=True):
            db = torch.mm(grad.t(), low_own).mul_(ctx.scale).float()
            of_tensors += [None, None, da, db]
        return of_x, None, *of_tensors


def summed_nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the negative log-likelihood (nats, float32) of targets (n,) under logits (n, V) of any type.

    Few rows are in float32 at a time, and of them the gradient, softmax - one-hot, is all that is kept.

    Returns:
        The sum, a scalar with a gradient, and the terms (n,), without.
    """
    return cast(tuple[Tensor, Tensor], _SummedNll.apply(logits, targets))


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(logits)
        nll = logits.new_empty(len(logits), dtype=torch.float32)
        for start in range(0, len(logits), NLL_ROWS):
            rows = slice(start, start + NLL_ROWS)
            index = targets[rows, None]
            log = torch.log_softmax(logits[rows], -1, dtype=torch.float32)
            nll[rows] = -log.gather(1, index)[:, 0]
            minus_one = -torch.ones_like(index, dtype=log.dtype)
            grad[rows] = log.exp_().scatter_add_(1, index, minus_one)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0], None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm (Zhang and Sennrich, 2019): y = w n, n = x / sqrt(mean(x^2) + eps) over the last dimension.

    w is frozen. The root is in float32, n and y have the type of x. The gradient is (g - n mean(g n)) / root, g = w dy.
    """
    return cast(Tensor, _RmsNorm.apply(x, weight, eps))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse_root = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = exact.mul_(inverse_root).to(x.dtype)
        ctx.save_for_backward(normed, inverse_root, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse_root, weight = ctx.saved_tensors
        grad = grads[0] * weight
        # minus mean(g n), (..., 1)
        along = (grad * normed).sum(-1, keepdim=True, dtype=torch.float32).div_(-normed.shape[-1])
        of_x = torch.addcmul(grad, normed, along.to(grad.dtype))
        return of_x.mul_(inverse_root.to(grad.dtype)), None, None


def train_norms(model: Any) -> None:
    """Let norms of Llama's kind in `model` (frozen weight times normed input) be `rms_norm` where gradients flow."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_trained_norm, module)


def _trained_norm(module: Any, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or module.weight.requires_grad:
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, module.variance_epsilon)
