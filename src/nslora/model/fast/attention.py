"""Attention over packed rows, each by itself, and on a CPU as one function with a gradient of its own.

`attend` is what a model of transformers calls when it is loaded with `ATTENTION`; `Layout` says where the rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "sdpa_by_row"  # what transformers calls `attend` when a model is loaded with it
EVEN = 16  # rows attend as if their length were a multiple: torch's softmax of other lengths takes twice as long


class Layout:
    """Where the tokens of packed rows are: rows may share tokens, and a token may be of no row.

    A row has a slot for each of its tokens and for what it lacks to the longest, which hold token 0. Each token has one
    slot as its own, where its query is answered; in others of its slots only its key and value are wanted.

    Attributes:
        table: (rows, longest row) the token in each slot.
        place: (T,) each token's own slot, counted through the table; 0 for tokens of no row.
        again: (2, m) the other slots of shared tokens, and the tokens.
        used: number of tokens that some row has.
    """

    def __init__(self, paths: Sequence[Sequence[int]], tokens: int, device: torch.device) -> None:
        """`paths` has each row's tokens, in order, of `tokens` in all; those of no row come last."""
        length = -(-max(map(len, paths)) // EVEN) * EVEN
        slots = [
            (i * length + depth, token)
            for i, path in enumerate(paths)
            for depth, token in enumerate(path)
        ]
        own = {token: slot for slot, token in slots}
        again = [(slot, token) for slot, token in slots if own[token] != slot]
        self.used = len(own)
        self.table = torch.tensor(
            [[*path, *[0] * (length - len(path))] for path in paths], device=device
        )
        self.place = torch.tensor([own.get(token, 0) for token in range(tokens)], device=device)
        self.again = torch.tensor(again, dtype=torch.long, device=device).view(-1, 2).t()
        self._by_head: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def by_head(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of vectors of a head: of (T, heads) in order of (rows, heads, longest row); of these, at each
        token's own slot, in order of (T, heads); and the same for the other slots of shared tokens."""
        if heads not in self._by_head:
            of = torch.arange(heads, device=self.table.device)
            spread = self.table[:, None, :] * heads + of[:, None]
            self._by_head[heads] = (
                spread.flatten(),
                self._slots(self.place, of),
                self._slots(self.again[0], of),
            )
        return self._by_head[heads]

    def _slots(self, slot: Tensor, of: Tensor) -> Tensor:
        length = self.table.shape[1]
        row, depth = slot // length, slot % length
        return ((row[:, None] * len(of) + of) * length + depth[:, None]).flatten()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: Layout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention, but of `packed` rows each by itself, not all pairs of tokens behind a mask.

    Args:
        query, key, value: (B, heads, T, dim), perhaps with fewer heads in key and value; of packed rows B = 1.
        rows: the packed rows.

    Returns:
        (B, T, heads, dim), and no weights.
    """
    if rows is None or options.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    length = rows.table.shape[1]
    window = (
        options.get("sliding_window") or length
    )  # a token sees itself and the window - 1 before it
    if query.device.type == "cpu" and not dropout:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        hidden = _hidden(query, length, window)
        return cast(Tensor, _RowAttention.apply(query, key, value, hidden, rows, scaling)), None
    q, k, v = (
        x[0].index_select(1, rows.table.flatten()).unflatten(1, rows.table.shape).transpose(0, 1)
        for x in (query, key, value)
    )
    mask = _hidden(query, length, window) if window < length else None
    out, _ = sdpa_attention_forward(
        module, q, k, v, mask, dropout, scaling, is_causal=mask is None, **options
    )
    return out.flatten(0, 1).index_select(0, rows.place)[None], None


def _hidden(like: Tensor, length: int, window: int) -> Tensor:
    """What is added to the scores of rows of that length to hide later tokens and those outside the window."""
    hidden = torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device)
    return hidden.triu(1) if window >= length else hidden.triu(1) + hidden.tril(-window)


class _RowAttention(torch.autograd.Function):
    """Causal attention of each row, softmax(q k' + hidden) v: on a CPU its gradients take a quarter of the time that
    they take in torch's fused kernel, in bfloat16, and as long in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        rows: Layout,
        scaling: float,
    ) -> Tensor:
        (_, heads, tokens, dim), groups = query.shape, key.shape[1]
        q, k, v = (_spread(x, rows, groups) for x in (query, key, value))
        scores = torch.bmm(q.mul_(scaling), k.transpose(1, 2)).add_(
            hidden.repeat(heads // groups, 1)
        )
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.rows, ctx.scaling, ctx.heads = rows, scaling, heads
        own = rows.by_head(heads)[1]
        return torch.bmm(weights, v).view(-1, dim).index_select(0, own).view(1, tokens, heads, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, weights), rows, (grad,) = ctx.saved_tensors, ctx.rows, grads
        used = rows.by_head(ctx.heads)[1][: rows.used * ctx.heads]
        wanted = torch.zeros_like(q).view(-1, q.shape[-1])
        wanted[used] = grad[0, : rows.used].reshape(-1, q.shape[-1])
        wanted = wanted.view_as(q)
        of_v = torch.bmm(weights.transpose(1, 2), wanted)
        of_weights = torch.bmm(wanted, v.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_q = torch.bmm(of_scores, k).mul_(ctx.scaling)
        of_k = torch.bmm(of_scores.transpose(1, 2), q)
        groups = len(k) // len(rows.table)
        gathered = (
            _gathered(of_q, rows, ctx.heads),
            _gathered(of_k, rows, groups),
            _gathered(of_v, rows, groups),
        )
        return *gathered, None, None, None


def _spread(x: Tensor, rows: Layout, groups: int) -> Tensor:
    """(1, heads, T, dim) as each row has them, (rows * groups, heads / groups * longest row, dim)."""
    flat = x[0].transpose(0, 1).reshape(-1, x.shape[-1])
    return flat.index_select(0, rows.by_head(x.shape[1])[0]).view(
        len(rows.table) * groups, -1, x.shape[-1]
    )


def _gathered(grad: Tensor, rows: Layout, heads: int) -> Tensor:
    """The gradient of `_spread`, of slots that hold a token: the sum over each token's."""
    _, own, again = rows.by_head(heads)
    flat = grad.view(-1, grad.shape[-1])
    total = flat.index_select(0, own).view(len(rows.place), -1)
    total[rows.used :] = 0
    total.index_add_(0, rows.again[1], flat.index_select(0, again).view(-1, total.shape[1]))
    return total.unflatten(1, (heads, -1)).transpose(0, 1)[None]


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
