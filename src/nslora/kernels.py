"""What makes a model of transformers compute faster and the same.

Attention per row, blocked weights and a roomy cache; and for training LoRA's product, the loss and RMSNorm, each with a
gradient of its own, in fewer passes over memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "sdpa_by_row"  # what transformers calls `attend` when a model is loaded with it
ROOM = 64  # tokens that a cache makes room for at once
ROWS = 64  # rows for which a layout of weights is chosen
AT_ONCE = 8  # rows of logits whose probabilities are held at once
# oneDNN and torch's layer above it keep the code of 1024 products each, some 0.4 MB a shape, and every batch has shapes
# of its own: memory would grow with the number of batches. 32 are enough for the products of one batch
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")


class RoomyLayer(DynamicLayer):
    """A layer of a KV cache with room at its end: a new token is written there, and nothing before it is copied.

    Selecting or repeating rows leaves tensors of their own behind, and the next token makes room anew.
    """

    room: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new tokens, dim) keys and values; all of them so far."""
        new, start = (key_states, value_states), self.get_seq_length()
        end = start + key_states.shape[-2]
        held: Any = (self.keys, self.values) if start else ()
        if not held or not self.room or held[0].data_ptr() != self.room[0].data_ptr() or end > self.room[0].shape[-2]:
            self.room = tuple(x.new_empty(*x.shape[:2], end + ROOM, x.shape[-1]) for x in new)
            for room, old in zip(self.room, held, strict=False):
                room[..., :start, :] = old
        for room, x in zip(self.room, new, strict=True):
            room[..., start:end, :] = x
        self.is_initialized = True
        self.keys, self.values = keys, values = self.room[0][..., :end, :], self.room[1][..., :end, :]
        return keys, values


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    rows: tuple[Tensor, Tensor] | None = None, dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' own attention, but of `packed` rows each by itself, not all pairs of tokens behind a mask.

    Args:
        query, key, value: (B, heads, T, dim), perhaps with fewer heads in key and value; of packed rows B = 1.
        rows: the places in T of each row's tokens, (rows, longest row), and each token's place in that table, (T,).

    Returns:
        (B, T, heads, dim), and no weights.
    """
    if rows is None or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    table, place = rows
    q, k, v = (
        x[0].index_select(1, table.flatten()).unflatten(1, table.shape).transpose(0, 1) for x in (query, key, value)
    )
    window = options.get("sliding_window") or table.shape[1]  # a token sees itself and the window - 1 before it
    if query.device.type == "cpu" and not dropout:
        out = _by_products(q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling, window)
    else:
        mask = _hidden(q, window) if window < table.shape[1] else None
        out, _ = sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, is_causal=mask is None, **options)
    return out.flatten(0, 1).index_select(0, place)[None], None


def _hidden(q: Tensor, window: int) -> Tensor:
    """What is added to the scores of (B, heads, T, dim) queries to hide later tokens and those outside the window."""
    hidden = torch.full((q.shape[-2], q.shape[-2]), -torch.inf, dtype=q.dtype, device=q.device)
    return hidden.triu(1) if window >= q.shape[-2] else hidden.triu(1) + hidden.tril(-window)


def _by_products(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int) -> Tensor:
    """Causal attention of (B, heads, T, dim), as (B, T, heads, dim): on a CPU its gradients take a quarter of the time
    that they take in torch's fused kernel, in bfloat16, and as long in float32."""
    (rows, heads, length, dim), groups, hidden = q.shape, k.shape[1], _hidden(q, window)
    q, k, v = (x.reshape(rows * groups, -1, dim) for x in (q * scaling, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).add_(hidden.repeat(heads // groups, 1))
    return torch.bmm(scores.softmax(-1), v).view(rows, heads, length, dim).transpose(1, 2)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def blocked_weights(model: Any) -> Iterator[None]:
    """Frozen linear layers compute with a copy of their weights in oneDNN's blocked layout, made once, on a CPU.

    For the few rows of a decoding step torch's plain product reads weights at a third of that speed. The copy takes as
    much memory as the weights.
    """
    usable = torch.backends.mkldnn.is_available() and model.device.type == "cpu"
    linear: list[Any] = [
        m for m in model.modules() if usable and type(m) is torch.nn.Linear and not m.weight.requires_grad
    ]
    for module in linear:
        known = (module.weight.data_ptr(), module.weight._version)
        if getattr(module, "blocked_of", None) != known:
            module.blocked = torch.ops.mkldnn._reorder_linear_weight(module.weight, ROWS)
            module.blocked_of = known
        module.forward = partial(_blocked_product, module)
    try:
        yield
    finally:
        for module in linear:
            module.__dict__.pop("forward", None)


def _blocked_product(module: Any, input: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, module.blocked, module.bias, "none", [], "")


def lora_product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """LoRA (Hu et al., 2021): y = x W' + b + s (x A') B' of (n, in) rows, (n, out), with W and b frozen.

    A (rank, in) and B (out, rank) may be float32 beside a bfloat16 x, whose type the products have. Sums are made
    within products, in y as in the gradient of x.
    """
    return cast(Tensor, _LoraProduct.apply(x, weight, bias, a, b, scale))


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = torch.nn.functional.linear(x, a)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return torch.nn.functional.linear(x, weight, bias).addmm_(low, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, low, weight, a, b), (grad,) = ctx.saved_tensors, grads
        of_low, of_x = torch.mm(grad, b).mul_(ctx.scale), None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(grad, weight).addmm_(of_low, a)
        of_a, of_b = torch.mm(of_low.t(), x), torch.mm(grad.t(), low).mul_(ctx.scale)
        return of_x, None, None, of_a.float(), of_b.float(), None


def summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood (nats, float32, a scalar) of targets (n,) under logits (n, V) of any type.

    Few rows are in float32 at a time, and of them the gradient, softmax - one-hot, is all that is kept.
    """
    return cast(Tensor, _SummedNll.apply(logits, targets))


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        grad, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        for rows, wanted, out in zip(*(x.split(AT_ONCE) for x in (logits, targets[:, None], grad)), strict=True):
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
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = (x * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        grad = grads[0] * weight
        along = (grad * normed).sum(-1, keepdim=True, dtype=torch.float32).div_(-normed.shape[-1])
        return torch.addcmul(grad, normed, along.to(grad.dtype)).mul_(scale.to(grad.dtype)), None, None


def train_norms(model: Any) -> None:
    """Norms of Llama's kind in `model` (frozen weight times normed input) are `rms_norm` where gradients flow."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_trained_norm, module)


def _trained_norm(module: Any, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or module.weight.requires_grad:
        return type(module).forward(module, x)
    return rms_norm(x, module.weight, module.variance_epsilon)
