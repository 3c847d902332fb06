"""What a backbone computes: logits at answer positions, mean negative log-likelihood, batched decoding.

All three run the head only where its output is used: with a vocabulary of 150k it is a quarter of the work. Decoding
and likelihood prefill the token prefix that all rows share (the system prompt) once. B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from nslora.model.fast.attention import Layout
from nslora.model.fast.kernels import RoomyLayer, blocked_weights

BATCH = 64
SCORE_BATCH = 16  # rows per likelihood batch: its head sees every answer token at once
# Packed tokens, and answer tokens before the head, are filled up to multiples of these: products of any other number of
# rows have to be compiled, which takes some 5 ms each, 20 in the head, and compute slower
EVEN = 32
EVEN_ANSWERS = 16


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no LoRA dropout) and no gradients, with the former mode restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def answer_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor, **forward: Any
) -> tuple[Tensor, Tensor]:
    """Logits that predict the answer tokens, and those tokens; gradients flow.

    Args:
        model: a causal LM, or a PeftModel around one.
        input_ids: tokens, (B, T).
        attention_mask: 1 for real tokens, (B, T), longer on the left by a cache given in `forward`.
        answer_mask: true at answer tokens, (B, T); column 0 has no prediction and is ignored.

    Returns:
        logits (n, V) and targets (n,), n = answer_mask[:, 1:].sum(), in row-major order.
    """
    wanted = answer_mask[:, 1:].bool()

    def only_wanted(_head: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = args[0][:, :-1][wanted]
        return (torch.nn.functional.pad(found, (0, 0, 0, -len(found) % EVEN_ANSWERS)),)

    # a hook keeps the model's own forward, so whatever it does after its head (soft caps, scaling) still happens
    hook = model.get_output_embeddings().register_forward_pre_hook(only_wanted)
    try:
        out = model(
            input_ids=input_ids, attention_mask=attention_mask, **{"use_cache": False, **forward}
        )
    finally:
        hook.remove()
    targets = input_ids[:, 1:][wanted]
    return out.logits[: len(targets)], targets


def packed(rows: list[tuple[list[int], list[int]]], like: Tensor) -> dict[str, Any]:
    """Inputs of `answer_logits` for (prompt ids, answer ids) rows as one sequence, without padding in between.

    The rows form a prefix tree: tokens that rows have in common from their start are computed once, and a token sees
    its ancestors only. Causal attention makes that exact. Each row keeps the last token of its prompt to itself, so
    that its answer follows the token that predicts it. Spare tokens at the end make T a multiple of EVEN. `like` is a
    tensor of the model: it gives the mask its type and device.
    """
    ids: list[int] = []
    position: list[int] = []
    answers: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    paths: list[list[int]] = []
    for prompt, answer in rows:
        node, depth, path = -1, 0, list[int]()
        while depth < len(prompt) - 1 and (node, prompt[depth]) in children:
            node, depth = children[node, prompt[depth]], depth + 1
            path.append(node)
        for nth, token in enumerate([*prompt[depth:], *answer], depth):
            parents.append(node)
            node = len(ids)
            children.setdefault((parents[-1], token), node)
            ids.append(token)
            position.append(nth)
            answers.append(int(nth >= len(prompt)))
            path.append(node)
        paths.append(path)
    spare = [0] * (-len(ids) % EVEN)  # each sees itself, and no row has it
    ids, position, answers, parents = (
        ids + spare,
        position + spare,
        answers + spare,
        parents + [-1] * len(spare),
    )
    seen = torch.eye(len(ids), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            seen[i] |= seen[parent]
    blocked = torch.finfo(like.dtype).min
    mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, blocked).to(like.device)
    return {
        "input_ids": torch.tensor([ids], device=like.device),
        "attention_mask": mask[None, None],
        "rows": Layout(paths, len(ids), like.device),
        "answer_mask": torch.tensor([answers], device=like.device),
        "position_ids": torch.tensor([position], device=like.device),
    }


def mean_nll(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """Mean negative log-likelihood in nats per answer token of each (prompt ids, answer ids), in input order."""
    nll = [0.0] * len(rows)
    if not rows:
        return nll
    like = model.get_input_embeddings().weight
    with _evaluating(model):
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
        for start in range(0, len(order), SCORE_BATCH):
            batch = order[start : start + SCORE_BATCH]
            logits, targets = answer_logits(model, **packed([rows[i] for i in batch], like))
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            for i, own in zip(batch, losses.split([len(rows[i][1]) for i in batch]), strict=True):
                nll[i] = own.mean().item()
    return nll


def decode(
    model: Any,
    prompts: list[list[int]],
    stop: set[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[tuple[list[int], float]]:
    """Continue each prompt until a stop token or `max_new_tokens`, in input order.

    Greedy at temperature 0. Otherwise row i draws its t-th token by inverse CDF from uniform (i, t) of `seed`, so a
    sample does not depend on how rows are batched.

    Returns:
        For each prompt the produced tokens (a stop token included) and their mean log-probability in nats under the
        model at temperature 1.
    """
    done: list[tuple[list[int], float]] = [([], 0.0)] * len(prompts)
    if not prompts:
        return done
    uniform = torch.rand(
        len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed)
    )
    with _evaluating(model), blocked_weights(model):
        prefix, cache = _shared_prefix(model, prompts, max_new_tokens)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            inputs = _padded_left(model, [prompts[i][prefix:] for i in batch], prefix, cache)
            produced = _decode_batch(model, inputs, stop, uniform[batch], temperature)
            for i, result in zip(batch, produced, strict=True):
                done[i] = result
    return done


def _decode_batch(
    model: Any, inputs: dict[str, Any], stop: set[int], uniform: Tensor, temperature: float
) -> list[tuple[list[int], float]]:
    """Decode one left-padded batch, finished rows leave it. `uniform` is (B, max_new_tokens)."""
    rows: list[list[int]] = [[] for _ in uniform]
    logp = [0.0] * len(rows)
    held, going = (
        list(range(len(rows))),
        set(range(len(rows))),
    )  # rows in the batch, in order, and those not finished
    cache = inputs["past_key_values"]
    for t in range(uniform.shape[1]):
        logits = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        tokens = _choose(logits, uniform[held, t], temperature)
        gains = (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        for i, token, gain in zip(held, tokens.tolist(), gains, strict=True):
            if i in going:
                rows[i].append(token)
                logp[i] += gain
                if token in stop:
                    going.remove(i)
        if not going:
            break
        keep = _kept([i in going for i in held])
        if len(keep) < len(held):
            held = [held[k] for k in keep]
            cache.batch_select_indices(torch.tensor(keep, device=logits.device))
        mask = inputs["attention_mask"][keep]
        inputs = {
            "input_ids": tokens[keep, None],
            "attention_mask": torch.cat([mask, mask.new_ones(len(keep), 1)], 1),
            "position_ids": inputs["position_ids"][keep, -1:] + 1,
            "past_key_values": cache,
        }
    return [(row, total / len(row)) for row, total in zip(rows, logp, strict=True)]


def _kept(going: list[bool]) -> list[int]:
    """Places of the rows that stay in a batch: all that are not finished, at the place they have or a free one before.

    Of 33 to 64 rows a multiple of 8 stays, of 17 to 32 one of 4, and so on: for each number products are compiled.
    """
    step = max(1, 2 ** (sum(going) - 1).bit_length() // 8)
    size = -(-sum(going) // step) * step
    late = [k for k in range(size, len(going)) if going[k]]
    return [k if going[k] or not late else late.pop() for k in range(min(size, len(going)))]


def _choose(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Next tokens (B,) from logits (B, V): the most likely, or by inverse CDF at `uniform` (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    point = (
        uniform.to(logits.device)[:, None] * cdf[:, -1:]
    )  # rounding leaves the total a little off 1
    return torch.searchsorted(cdf, point, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def common_prefix(prompts: list[list[int]]) -> int:
    """Length of the longest common token prefix that leaves every row a token of its own."""
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)


def _shared_prefix(model: Any, prompts: list[list[int]], new: int) -> tuple[int, DynamicCache]:
    """Prefill the common prefix; its length and KV cache.

    Rows that outgrow a layer's sliding window, `new` tokens included, share none: padding between a prefix and what
    follows would take the place of tokens in the window.
    """
    cache = DynamicCache(config=model.config)
    windows = [
        layer.sliding_window
        for layer in cache.layers
        if isinstance(layer, DynamicSlidingWindowLayer)
    ]
    longest = max(map(len, prompts)) + new
    length = 0 if any(longest > window for window in windows) else common_prefix(prompts)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if length > 0:
        ids = torch.tensor([prompts[0][:length]], device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return length, cache


def _expanded(cache: DynamicCache, rows: int) -> DynamicCache:
    mine = copy.deepcopy(cache)
    mine.batch_repeat_interleave(rows)
    return mine


def _padded_left(
    model: Any, tails: list[list[int]], prefix: int, cache: DynamicCache
) -> dict[str, Any]:
    """Model inputs for rows that share a cached prefix, their last tokens aligned: (B, longest tail)."""
    width = max(map(len, tails))
    ids = torch.tensor([[0] * (width - len(tail)) + tail for tail in tails], device=model.device)
    own = torch.tensor(
        [[0] * (width - len(tail)) + [1] * len(tail) for tail in tails], device=model.device
    )
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([own.new_ones(len(tails), prefix), own], 1),
        "position_ids": (prefix + own.cumsum(1) - 1).clamp(min=0),
        "past_key_values": _expanded(cache, len(tails)),
    }
