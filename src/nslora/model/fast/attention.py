"""Attend over packed rows, each by itself, and on a CPU as one function with a gradient of its own.

Replaces transformers' `sdpa` over all pairs of the T packed tokens behind a (T, T) mask, when most pairs are of two
rows that do not see each other. Same numbers: tests/model/fast/test_attention.py.

Two packed rows `s s q a` and `s s r a` (tokens 0 to 5) in slots, as the layout has them:

    packed               table (rows, length)        own (T,)
    s s q a r a          0 1 2 3      row 0          4 5 2 3 6 7    the one slot of a token where its query is answered
    0 1 2 3 4 5          0 1 4 5      row 1          other slots: 0 and 1, where tokens 0 and 1 give key and value only

Both rows are attended at once, causally and in (length, length) scores each. In the gradient, what flows into the
slots of one token is added up. `attend` is what transformers calls in a model that is loaded with `ATTENTION`.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from nslora.model.fast.memory import placed

# name under which transformers finds `attend`
ATTENTION = "sdpa_by_row"
# lengths of rows are filled up to a multiple: torch's softmax of other lengths takes twice as long
EVEN = 16

HeadIndices = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor | None, ...]


class Layout:
    """Where the tokens of packed rows are: rows may share tokens, and spare tokens belong to no row.

    Attributes:
        table: (rows, length) the token in each slot; slots behind the end of a row hold token 0.
        own: (T,) each token's own slot, counted through the table; 0 for spare tokens.
        others: (2, m) the other slots of shared tokens, and the tokens.
        used: number of tokens that belong to a row; they come first.
    """

    def __init__(self, paths: Sequence[list[int]], tokens: int, device: torch.device) -> None:
        """Lay out `paths`, each row's tokens in order, of `tokens` in all."""
        longest = max(len(path) for path in paths)
        length = longest + -longest % EVEN
        # slots are counted through the table: row * length + depth
        own: dict[int, int] = {}
        others = []
        for row, path in enumerate(paths):
            for slot, token in enumerate(path, row * length):
                # the last slot of a token becomes its own
                if token in own:
                    others.append((own[token], token))
                own[token] = slot
        # what lies behind the end of a row is after all its tokens, so causal attention hides it
        table = [path + [0] * (length - len(path)) for path in paths]
        slots = [own.get(token, 0) for token in range(tokens)]
        self.used = len(own)
        self.table = placed(torch.tensor(table), device)
        self.own = placed(torch.tensor(slots), device)
        # (0, 2) where no token is shared
        pairs = torch.tensor(others, dtype=torch.long).view(-1, 2)
        self.others = placed(pairs, device).t()
        self._by_head: dict[int, HeadIndices] = {}

    def by_head(self, heads: int) -> HeadIndices:
        """Return indices of head vectors for a number of heads, computed once for all layers.

        Returns:
            spread: (rows * heads * length,) indices into (T, heads), in the order of (rows, heads, length).
            own: (T * heads,) indices into (rows, heads, length), each token's own slot, in the order of (T, heads).
            others: (m * heads,) the same for the other slots of shared tokens.
        """
        if heads not in self._by_head:
            head = torch.arange(heads, device=self.table.device)
            # (rows, 1, length) and (heads, 1) to (rows, heads, length)
            first = self.table[:, None, :] * heads
            spread = first + head[:, None]
            self._by_head[heads] = (
                spread.flatten(),
                self._vectors(self.own, head),
                self._vectors(self.others[0], head),
            )
        return self._by_head[heads]

    def _vectors(self, slots: Tensor, head: Tensor) -> Tensor:
        """Return indices (slots * heads,) into (rows, heads, length) of slots counted through (rows, length)."""
        length = self.table.shape[1]
        row = slots // length
        depth = slots % length
        # (slots, heads): where each head of the slot's row begins
        first = row[:, None] * len(head) + head
        vectors = first * length + depth[:, None]
        return vectors.flatten()


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
    """Compute transformers' own attention, but of packed rows each by itself, whatever the mask.

    Args:
        query, key, value: (B, heads, T, dim), perhaps with fewer heads in key and value; of packed rows B = 1.
        rows: the layout of packed rows; without it all is left to transformers.

    Returns:
        (B, T, heads, dim), and no weights.
    """
    # a decoding step, or a model whose scores have a bias for each pair of tokens
    if rows is None or options.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    length = rows.table.shape[1]
    # a token sees itself and the window - 1 tokens before it
    window = options.get("sliding_window") or length
    # our function has no dropout, and a GPU has fused kernels whose gradients are fast
    if query.device.type == "cpu" and not dropout:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = _causal_mask(query, length, window)
        output = _RowAttention.apply(query, key, value, mask, rows, scaling)
        return cast(Tensor, output), None
    # torch's kernels need no mask for causal attention without a window
    mask = _causal_mask(query, length, window) if window < length else None
    output, _ = sdpa_attention_forward(
        module,
        _by_row(query, rows),
        _by_row(key, rows),
        _by_row(value, rows),
        mask,
        dropout,
        scaling,
        is_causal=mask is None,
        **options,
    )
    # (rows, length, heads, dim) to (1, T, heads, dim)
    slots = output.flatten(0, 1)
    return slots.index_select(0, rows.own)[None], None


def _by_row(x: Tensor, rows: Layout) -> Tensor:
    """Return (1, heads, T, dim) as (rows, heads, length, dim)."""
    slots = x[0].index_select(1, rows.table.flatten())
    by_row = slots.unflatten(1, rows.table.shape)
    return by_row.transpose(0, 1)


def _causal_mask(like: Tensor, length: int, window: int) -> Tensor:
    """Return (length, length) to add to scores: -inf at later tokens and at those before the window, else 0."""
    # -inf everywhere; `triu` and `tril` put 0 where a token is seen
    hidden = like.new_full((length, length), -torch.inf)
    later = hidden.triu(1)
    if window >= length:
        return later
    return later + hidden.tril(-window)


class _RowAttention(torch.autograd.Function):
    """Causal attention of each row, softmax(s q k' + mask) v.

    On a CPU its gradients take a quarter of the time of torch's fused kernel in bfloat16, and as long in float32.
    Query heads that share a key head are batched with it: G = rows * key heads groups of
    L = (heads / key heads) * length queries.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        rows: Layout,
        scaling: float,
    ) -> Tensor:
        _, heads, tokens, dim = query.shape
        groups = key.shape[1]
        q = _spread(query, rows, groups).mul_(scaling)  # (G, L, dim)
        k = _spread(key, rows, groups)  # (G, length, dim)
        v = _spread(value, rows, groups)
        scores = torch.bmm(q, k.transpose(1, 2))  # (G, L, length)
        # one mask for each query head of a group
        scores += mask.repeat(heads // groups, 1)
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.rows = rows
        ctx.scaling = scaling
        ctx.heads = heads
        # of shared tokens, whose query is in several rows, one answer is read: all are equal
        _, own, _ = rows.by_head(heads)
        output = torch.bmm(weights, v).view(-1, dim)
        answered = output.index_select(0, own)
        return answered.view(1, tokens, heads, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        q, k, v, weights = ctx.saved_tensors
        rows, heads = ctx.rows, ctx.heads
        dim = q.shape[-1]
        groups = len(k) // len(rows.table)
        # queries are answered in own slots only: all others have no gradient
        _, own, _ = rows.by_head(heads)
        of_output = torch.zeros_like(q)
        answered = own[: rows.used * heads]
        grad = grads[0][0, : rows.used]
        of_output.view(-1, dim)[answered] = grad.reshape(-1, dim)
        # softmax(z) v: dv = w' do, dw = do v', dz = w (dw - sum(w dw))
        of_v = torch.bmm(weights.transpose(1, 2), of_output)
        of_weights = torch.bmm(of_output, v.transpose(1, 2))
        dtype = weights.dtype
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, dtype)
        # q is scaled already, so the gradient of k has its scale
        of_q = torch.bmm(of_scores, k).mul_(ctx.scaling)
        of_k = torch.bmm(of_scores.transpose(1, 2), q)
        return (
            _gathered(of_q, rows, heads),
            _gathered(of_k, rows, groups),
            _gathered(of_v, rows, groups),
            None,
            None,
            None,
        )


def _spread(x: Tensor, rows: Layout, groups: int) -> Tensor:
    """Return (1, heads, T, dim) as each row has it, (rows * groups, heads / groups * length, dim)."""
    heads, dim = x.shape[1], x.shape[-1]
    spread, _, _ = rows.by_head(heads)
    # (T * heads, dim)
    vectors = x[0].transpose(0, 1).reshape(-1, dim)
    by_row = vectors.index_select(0, spread)
    return by_row.view(len(rows.table) * groups, -1, dim)


def _gathered(grad: Tensor, rows: Layout, heads: int) -> Tensor:
    """Return the gradient of `_spread`, (1, heads, T, dim): the sum over the slots of each token."""
    _, own, others = rows.by_head(heads)
    vectors = grad.view(-1, grad.shape[-1])
    # (T, heads * dim); spare tokens were read from slots of others
    total = vectors.index_select(0, own).view(len(rows.own), -1)
    total[rows.used :] = 0
    shared = vectors.index_select(0, others).view(-1, total.shape[1])
    # a token in m rows has m - 1 slots more
    total.index_add_(0, rows.others[1], shared)
    by_head = total.unflatten(1, (heads, -1))
    return by_head.transpose(0, 1)[None]


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
