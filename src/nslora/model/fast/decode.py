"""Continue prompts token by token in batches, greedily or by sampling.

Replaces transformers' `generate`: the prefix that all prompts share (the system prompt) is prefilled once, the head
runs at the last position only, weights are read in a layout for few rows (`kernels.blocked_weights`), and rows that
are finished leave the batch. Same tokens: tests/model/fast/test_decode.py.

Prompts `s s s q` and `s s s r u v` (s: the common prefix, `.`: padding on the left, so that last tokens align):

    cache of the prefix, computed once       tails, prefilled together       one new token a step
                  s s s                              . . q                      a   a   stop
                  (repeated for each row)            r u v                      b   b   b   b ...

B rows in a batch, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from nslora.model.fast import memory
from nslora.model.fast.kernels import PreallocatedLayer, blocked_weights
from nslora.model.fast.packing import common_prefix, evaluating

# rows decoded at once
BATCH = 64

Inputs = dict[str, Any]  # keyword arguments of the model
Output = tuple[list[int], float]  # new tokens, and their mean log-probability in nats


def decode(
    model: Any,
    prompts: list[list[int]],
    stop: set[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
) -> list[Output]:
    """Continue each prompt until a stop token or `max_new_tokens`, in input order.

    Greedy at temperature 0. Otherwise a row draws its t-th token by inverse CDF from its own uniform
    numbers, so a sample does not depend on how rows are batched: those of row i under one `seed` for
    all, or those of row i's own seed.

    Returns:
        For each prompt the new tokens (a stop token included) and their mean log-probability in nats under the model
        at temperature 1.
    """
    results: list[Output] = [([], 0.0)] * len(prompts)
    if not prompts:
        return results
    uniform = _uniform(seed, len(prompts), max_new_tokens)
    # prompts of similar length together, so that little is padding
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with evaluating(model), blocked_weights(model):
        with memory.single_row():
            prefix, cache = _shared_prefix(model, prompts, max_new_tokens)

        def continued(batch: Sequence[int]) -> list[Output]:
            tails = [tuple(prompts[i][prefix:]) for i in batch]
            # equal prompts are prefilled once
            different = list(dict.fromkeys(tails))
            inputs = _padded_left(model, different, prefix, cache)
            rows = [different.index(tail) for tail in tails]
            return _decode_batch(model, inputs, rows, stop, uniform[batch], temperature)

        outputs = memory.in_batches(model, "rows to continue", by_length, BATCH, continued)
        for i, output in zip(by_length, outputs, strict=True):
            results[i] = output
    return results


def _uniform(seed: int | Sequence[int], rows: int, draws: int) -> Tensor:
    """Return uniform numbers (rows, draws), of one seed for all rows or of one seed for each.

    Drawn for all rows at once, on the CPU: the same numbers whatever the batches and the device.
    """
    if isinstance(seed, int):
        return torch.rand(rows, draws, generator=torch.Generator().manual_seed(seed))
    generators = [torch.Generator().manual_seed(own) for own in seed]
    return torch.stack([torch.rand(draws, generator=own) for own in generators])


def _decode_batch(
    model: Any,
    inputs: Inputs,
    prefilled: list[int],
    stop: set[int],
    uniform: Tensor,
    temperature: float,
) -> list[Output]:
    """Decode one left-padded batch; `uniform` is (B, max_new_tokens).

    Row i of the batch goes on from row `prefilled[i]` of the inputs: several may share one.
    """
    rows: list[list[int]] = [[] for _ in uniform]
    logprobs = [0.0] * len(rows)
    # `members` are the rows in the batch, in its order; some of them may be finished
    members = list(range(len(rows)))
    unfinished = set(members)
    cache = inputs["past_key_values"]
    for step in range(uniform.shape[1]):
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()  # (B, V)
        if step == 0 and prefilled != members:
            logits, inputs = logits[prefilled], _one_row_each(inputs, prefilled)
        tokens = _choose(logits, uniform[members, step], temperature)
        # log softmax at the chosen token only
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        logp = chosen - logits.logsumexp(-1)
        # the one wait for the device in a step
        chosen_tokens = zip(members, tokens.tolist(), logp.tolist(), strict=True)
        for i, token, logprob in chosen_tokens:
            if i in unfinished:
                rows[i].append(token)
                logprobs[i] += logprob
                if token in stop:
                    unfinished.remove(i)
        if not unfinished:
            break
        # finished rows leave: later steps are for the others
        keep = _kept_slots([i in unfinished for i in members])
        if len(keep) < len(members):
            members = [members[slot] for slot in keep]
            cache.batch_select_indices(torch.tensor(keep, device=logits.device))
        inputs = _next_inputs(inputs, tokens, keep)
    return [(row, total / len(row)) for row, total in zip(rows, logprobs, strict=True)]


def _one_row_each(inputs: Inputs, prefilled: list[int]) -> Inputs:
    """Return prefilled inputs with a row, and a cache, for each member of the batch."""
    mask, positions = inputs["attention_mask"], inputs["position_ids"]
    inputs["past_key_values"].batch_select_indices(torch.tensor(prefilled, device=mask.device))
    return inputs | {"attention_mask": mask[prefilled], "position_ids": positions[prefilled]}


def _next_inputs(inputs: Inputs, tokens: Tensor, keep: list[int]) -> Inputs:
    """Return the inputs of the next step: the new tokens (B,) of the slots that stay, one position further."""
    mask = inputs["attention_mask"][keep]
    # (B, seen so far) grows by the new token
    new = mask.new_ones(len(keep), 1)
    return {
        "input_ids": tokens[keep, None],
        "attention_mask": torch.cat([mask, new], 1),
        "position_ids": inputs["position_ids"][keep, -1:] + 1,
        "past_key_values": inputs["past_key_values"],
    }


def _kept_slots(unfinished: Sequence[bool]) -> list[int]:
    """Choose the slots of a batch that stay: the unfinished, each in its own slot or an earlier one that is free.

    Of 33 to 64 rows a multiple of 8 stays, of 17 to 32 one of 4, and so on, finished rows among them if need be: for
    each number of rows the products have to be compiled. For instance (x unfinished, . finished):

        x . x x . x . x x   ->   x x x x x x      slots 0 8 2 3 7 5: two late rows move into free slots
    """
    count = sum(unfinished)
    # the next power of two, in eighths
    power = 2 ** (count - 1).bit_length()
    step = max(1, power // 8)
    size = min(count + -count % step, len(unfinished))
    # rows behind the new end move into slots that are free
    slots = range(len(unfinished))
    keep = list(slots[:size])
    late = [slot for slot in slots[size:] if unfinished[slot]]
    for slot in keep:
        if late and not unfinished[slot]:
            keep[slot] = late.pop()
    return keep


def _choose(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Choose next tokens (B,) from logits (B, V): the most likely, or by inverse CDF at `uniform` (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    # rounding leaves the total a little off 1, so the point is scaled to it
    point = uniform.to(logits.device)[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, point, right=True)[:, 0]
    return tokens.clamp(max=logits.shape[1] - 1)


def _shared_prefix(
    model: Any,
    prompts: list[list[int]],
    new: int,
) -> tuple[int, DynamicCache]:
    """Prefill the prefix that the prompts share; return its length and its KV cache.

    Rows that outgrow a layer's sliding window, `new` tokens included, share none: padding between a prefix and what
    follows would fill slots of the window that belong to tokens.
    """
    cache = DynamicCache(config=model.config)
    # layers of a sliding window keep the last tokens only, padding among them
    longest = max(len(prompt) for prompt in prompts) + new
    sliding = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    overflows = any(longest > layer.sliding_window for layer in sliding)
    length = 0 if overflows else common_prefix(prompts)
    # sliding layers stay: they never hold more than their window
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer()
    if length > 0:
        ids = torch.tensor([prompts[0][:length]], device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return length, cache


def _padded_left(
    model: Any,
    tails: Sequence[Sequence[int]],
    prefix: int,
    cache: DynamicCache,
) -> Inputs:
    """Return model inputs (B, longest tail) of rows that go on from a cached prefix, their last tokens aligned."""
    width = max(len(tail) for tail in tails)
    ids = torch.zeros(len(tails), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tail in enumerate(tails):
        ids[row, width - len(tail) :] = torch.tensor(tail)
        mask[row, width - len(tail) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    # each batch gets a copy of the prefix, one row for each of its own
    expanded = copy.deepcopy(cache)
    expanded.batch_repeat_interleave(len(tails))
    # (B, prefix + longest tail); positions count real tokens only
    of_prefix = mask.new_ones(len(tails), prefix)
    positions = prefix + mask.cumsum(1) - 1
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([of_prefix, mask], 1),
        "position_ids": positions.clamp(min=0),
        "past_key_values": expanded,
    }
