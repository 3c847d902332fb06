"""Pack (prompt, answer) rows into one sequence, and compute logits and likelihoods of their answers.

Replaces the padded batch, and a language-model head that runs at every position: with a vocabulary of 150k the head is
a quarter of the work. Same numbers: tests/model/fast/test_packing.py, and test_lora.py for losses and gradients.

Three rows that start alike, padded (21 slots, `.` is padding) and packed (12 tokens; s is computed once):

    s s s q a e .          s s s q a e r a a e t e      tokens; q, r, t end the prompts, a and e are answers
    s s s r a a e          0 1 2 3 4 5 3 4 5 6 3 4      positions: the depth in the token's own row
    s s s t e . .          0 0 0 0 1 1 0 1 1 1 0 1      answer mask

The rows form a prefix tree, in which a token sees its ancestors only. That is what causal attention shows it in a row
of its own, so the numbers are exact. The mask of two rows `s s q a` and `s s r a` (queries down, keys across):

          s s q a r a
      s   x . . . . .
      s   x x . . . .
      q   x x x . . .
      a   x x x x . .
      r   x x . . x .      r does not see q and a of the other row
      a   x x . . x x

`attention.attend` needs no such mask; other attention implementations take it. B rows, T packed tokens, V vocabulary.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nslora.model.fast import memory
from nslora.model.fast.attention import Layout
from nslora.model.fast.memory import placed

Row = tuple[list[int], list[int]]  # token ids of a prompt and of its answer

# tokens computed at once in training: more gain nothing on a CPU, and take memory; a GPU is busy with more
PACK = 512
PACK_GPU = 4096
# rows of one likelihood batch: its head sees all their answer tokens at once
SCORE_BATCH = 16
# Packed tokens, and answer tokens before the head, are filled up to multiples of these: products of each further number
# of rows have to be compiled, which takes some 5 ms each, 20 in the head, and compute slower.
EVEN = 32
EVEN_ANSWERS = 16
# parent of the first token of a row
ROOT = -1


@dataclass
class _PrefixTree:
    """Tokens of all rows in the order of their insertion; a node is an index into the three lists."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)

    def insert(self, prompt: list[int], answer: list[int]) -> list[int]:
        """Add a row; return its nodes, in order."""
        path = self._shared(prompt)
        depth = len(path)
        for token in [*prompt[depth:], *answer]:
            parent = path[-1] if path else ROOT
            # a path as long as the prompt has all of it
            is_answer = len(path) >= len(prompt)
            node = self._append(token, parent, len(path), is_answer)
            path.append(node)
        return path

    def fill(self, multiple: int) -> None:
        """Add spare tokens, which see themselves only and belong to no row, up to a multiple."""
        for _ in range(-len(self.ids) % multiple):
            self._append(0, ROOT, 0, False)

    def _shared(self, prompt: list[int]) -> list[int]:
        """Return the nodes of the longest start of the prompt that is in the tree.

        The last token of a prompt is never shared: an answer has to follow the token that predicts it.
        """
        path: list[int] = []
        node = ROOT
        for token in prompt[:-1]:
            if (node, token) not in self.children:
                break
            node = self.children[node, token]
            path.append(node)
        return path

    def _append(self, token: int, parent: int, position: int, is_answer: bool) -> int:
        node = len(self.ids)
        self.ids.append(token)
        self.positions.append(position)
        self.answers.append(int(is_answer))
        # of equal tokens under one parent (last tokens of prompts, answers) rows share the first
        self.children.setdefault((parent, token), node)
        return node


def pack(rows: Sequence[Row], like: Tensor) -> dict[str, Any]:
    """Return the inputs of `answer_logits` for the rows as one sequence (module docstring).

    `like` is a tensor of the model, which gives type and device. Answer tokens come in the order of the rows.
    """
    tree = _PrefixTree()
    paths = [tree.insert(prompt, answer) for prompt, answer in rows]
    tree.fill(EVEN)
    device = like.device
    seen = placed(_seen(paths, len(tree.ids)), device)
    # (T, T) to add to the scores
    mask = torch.zeros_like(seen, dtype=like.dtype)
    mask.masked_fill_(~seen, torch.finfo(like.dtype).min)
    return {
        "input_ids": placed(torch.tensor([tree.ids]), device),  # (1, T)
        "attention_mask": mask[None, None],  # (1, 1, T, T)
        "answer_mask": torch.tensor([tree.answers]),  # (1, T)
        "position_ids": placed(torch.tensor([tree.positions]), device),  # (1, T)
        "rows": Layout(paths, len(tree.ids), device),
    }


def _seen(paths: Sequence[list[int]], tokens: int) -> Tensor:
    """Return (T, T) booleans: whether the token of a row sees the token of a column."""
    # spare tokens see themselves only
    seen = torch.eye(tokens, dtype=torch.bool)
    for path in paths:
        nodes = torch.tensor(path)
        # of a token that rows share, each row writes the same
        seen[nodes[:, None], nodes] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    return seen


def most_tokens(device: torch.device) -> int:
    """Return how many tokens a device computes at once in training, memory permitting."""
    return PACK if device.type == "cpu" else PACK_GPU


def split(rows: Sequence[Row], most: int = PACK) -> list[list[Row]]:
    """Split the rows of a step, in order, into parts whose gradients add up, to bound the step's memory.

    A part is one row, or several that compute no more than one row of `most` tokens does: `most` tokens (those that a
    row shares with an earlier one of its part count once) and `most` ** 2 pairs of tokens in attention.
    """
    parts: list[list[Row]] = []
    tokens = pairs = 0
    for prompt, answer in rows:
        # what the row adds to the part: tokens it has for itself, and pairs in its attention
        length = len(prompt) + len(answer)
        part = parts[-1] if parts else []
        shared = [common_prefix([prompt, other]) for other, _ in part]
        new = length - max(shared, default=0)
        if not part or tokens + new > most or pairs + length**2 > most**2:
            parts.append([])
            tokens, pairs, new = 0, 0, length
        tokens += new
        pairs += length**2
        parts[-1].append((prompt, answer))
    return parts


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Return the length of the longest common token prefix that leaves every row a token of its own."""
    shortest = min(len(prompt) for prompt in prompts)
    return min(len(os.path.commonprefix(prompts)), shortest - 1)


def answer_logits(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    answer_mask: Tensor,
    **forward: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the logits that predict the answer tokens, and those tokens; gradients flow.

    Args:
        model: a causal LM, or a PeftModel around one.
        input_ids: tokens, (B, T).
        attention_mask: 1 for real tokens, (B, T), or what is added to the scores, (B, 1, T, T).
        answer_mask: true at answer tokens, (B, T), on the host; column 0 has no prediction and is ignored.

    Returns:
        logits (n, V) and targets (n,), n = answer_mask[:, 1:].sum(), in row-major order.
    """
    # position t predicts token t + 1; counted through (B, T - 1), by the host, which would wait to count on a GPU
    predicted = answer_mask[:, 1:].flatten().nonzero()[:, 0]
    predicted = placed(predicted, input_ids.device)

    def only_predictors(_head: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # (B, T, hidden) to (n, hidden), and up to EVEN_ANSWERS - 1 rows of zeros
        states = args[0][:, :-1].flatten(0, 1).index_select(0, predicted)
        spare = -len(states) % EVEN_ANSWERS
        return (F.pad(states, (0, 0, 0, spare)),)

    # a hook keeps the model's own forward, so whatever it does after its head (soft caps, scaling) still happens
    hook = model.get_output_embeddings().register_forward_pre_hook(only_predictors)
    # a cache would be filled for nothing
    options = {"use_cache": False, **forward}
    try:
        output = model(input_ids=input_ids, attention_mask=attention_mask, **options)
    finally:
        hook.remove()
    targets = input_ids[:, 1:].flatten().index_select(0, predicted)
    return output.logits[: len(targets)], targets


def mean_nll(model: Any, rows: Sequence[Row]) -> list[float]:
    """Compute each row's mean negative log-likelihood in nats per answer token, in input order."""
    like = model.get_input_embeddings().weight
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    # rows of similar length together
    order = sorted(range(len(rows)), key=lengths.__getitem__)

    def batch_nll(batch: Sequence[int]) -> list[float]:
        inputs = pack([rows[i] for i in batch], like)
        logits, targets = answer_logits(model, **inputs)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        # answers come in the order of the rows
        by_row = losses.split([len(rows[i][1]) for i in batch])
        return torch.stack([of_row.mean() for of_row in by_row]).tolist()

    with evaluating(model):
        found = memory.in_batches(model, "rows to score", order, SCORE_BATCH, batch_nll)
    nll = [0.0] * len(rows)
    for i, of_row in zip(order, found, strict=True):
        nll[i] = of_row
    return nll


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model in evaluation mode (no dropout) without gradients, and restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
