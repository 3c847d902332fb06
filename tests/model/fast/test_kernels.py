"""Caches, layouts and fused functions against the plain ones, values and gradients."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from nslora.model.fast import kernels


@pytest.mark.parametrize(("kept", "in_place"), [([2, 1], True), ([0, 1], True), ([2, 0], False)])
def test_a_cache_with_room_holds_what_a_growing_one_does(kept: list[int], in_place: bool):
    torch.manual_seed(0)
    roomy: Any = kernels.PreallocatedLayer()
    plain: Any = DynamicLayer()
    for n in (5, 1, kernels.ROOM, 1, 1):
        key, value = torch.randn(2, 3, 2, n, 4)
        for rows in (roomy, plain):
            batch = rows.keys.shape[0] if rows.is_initialized else 3
            rows.update(key[:batch], value[:batch])
        if n == kernels.ROOM:
            for rows in (roomy, plain):
                rows.batch_select_indices(torch.tensor(kept))
            assert (roomy.buffers[0].shape[0] == 2) == in_place
        copied = copy.deepcopy(roomy)
        copied.update(*torch.zeros(2, roomy.keys.shape[0], 2, 1, 4))  # leaves the first one alone
        assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)
        assert roomy.get_seq_length() == plain.get_seq_length() == copied.get_seq_length() - 1


def test_blocked_weights_give_the_plain_product_and_follow_a_change():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    ).eval()
    layer = model.lm_head
    x = torch.randn(3, 5, 32)
    for _ in range(2):
        plain = layer(x)
        with torch.inference_mode(), kernels.blocked_weights(model):
            assert layer.forward is not type(layer).forward
            torch.testing.assert_close(layer(x), plain)
        assert "forward" not in vars(layer)
        with torch.no_grad():
            layer.weight.mul_(2)
    assert "blocked" not in model.state_dict()


def test_layers_with_one_input_compute_once_for_all():
    made = []

    def outputs(x: torch.Tensor) -> list[torch.Tensor]:
        made.append(x)
        return [x + 1, x + 2]

    together, x = kernels.SharedInput(["a", "b"], outputs), torch.zeros(1)
    assert [float(together(name, x)) for name in ("a", "b")] == [1, 2]
    assert len(made) == 1
    assert together.input is None  # nothing is held once all are done
    assert [float(together(name, x)) for name in ("b", "b")] == [
        2,
        2,
    ]  # asked for one twice, it computes anew
    assert len(made) == 3
    assert float(together("a", torch.ones(1))) == 2  # of an input of the same shape too


def test_layers_with_one_input_keep_the_biases_that_they_have():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_bias=True,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    attention_layer, ids = model.model.layers[0].self_attn, torch.tensor([[1, 2, 3, 4]])
    attention_layer.k_proj.bias.normal_()
    attention_layer.v_proj.bias.normal_()
    attention_layer.q_proj.bias = None
    with torch.inference_mode():
        plain = model(ids).logits
        with kernels.blocked_weights(model):
            torch.testing.assert_close(model(ids).logits, plain)


def test_families_are_layers_with_one_input_wrapped_or_not(tiny, adapted):
    for model in (tiny, adapted):
        linear = kernels.sibling_layers(
            model, lambda m: type(m) is torch.nn.Linear and not m.weight.requires_grad
        )
        sizes = sorted(len(family) for family in linear if family[0].in_features > 4)
        # q, k and v, gate and up, in two layers
        assert sizes.count(3) == sizes.count(2) == 2, sizes


GROWTH = """
import psutil, torch
from nslora.model.fast import kernels
weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(64, 576), 64)
memory = []
for rows in range(1, 1001):
    torch.ops.mkldnn._linear_pointwise(torch.zeros(rows, 576), weight, None, "none", [], "")
    memory.append(psutil.Process().memory_info().rss)
print((memory[-1] - memory[200]) / 2**20)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_products_of_ever_new_shapes_do_not_fill_memory() -> None:
    """Two caches held the code of 1024 shapes each: an epoch grew by 0.4 MB with every new shape of a batch."""
    said = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    ).stdout
    assert float(said) < 100  # MB; 443 with the caches as they come


def plain_product(x, weight, bias, a, b, scale):
    return x @ weight.t() + bias + scale * (x @ a.t()) @ b.t()


def products_of_two(x, weight, bias, other, a, b, a2, b2, scale):
    return torch.cat(
        kernels.lora_products(x, [(weight, bias, a, b), (other, None, a2, b2)], scale), 1
    )


def plain_products_of_two(x, weight, bias, other, a, b, a2, b2, scale):
    return torch.cat(
        [plain_product(x, weight, bias, a, b, scale), plain_product(x, other, 0, a2, b2, scale)], 1
    )


def plain_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def fused_nll(logits, targets):
    return kernels.summed_nll(logits, targets)[0]


def plain_nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def test_with_a_reference_the_gradient_is_that_of_the_cross_entropy_of_both_models() -> None:
    torch.manual_seed(0)
    # more rows than are in float32 at once
    logits = torch.randn(kernels.NLL_ROWS + 3, 40, dtype=torch.float64, requires_grad=True)
    reference = torch.randn_like(logits)
    targets = torch.arange(len(logits))
    probabilities = reference.softmax(-1)
    plain = torch.nn.functional.cross_entropy(logits, probabilities, reduction="sum")
    (theirs,) = torch.autograd.grad(plain, logits)
    total, terms = kernels.summed_nll(logits, targets, reference)
    (ours,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # what is told is the likelihood of the targets
    torch.testing.assert_close(total.double(), plain_nll(logits, targets), rtol=1e-5, atol=0)
    assert len(terms) == len(targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ours", "plain", "shapes", "trained", "rest"),
    [
        (
            products_of_two,
            plain_products_of_two,
            [(30, 48), (30,), (12, 48)],
            [(4, 48), (30, 4), (3, 48), (12, 3)],
            [0.5],
        ),
        (kernels.rms_norm, plain_norm, [(48,)], [], [1e-5]),
        (fused_nll, plain_nll, [], [], [torch.arange(20)]),
    ],
)
def test_fused_functions_have_the_values_and_gradients_of_plain_ones(
    ours, plain, shapes, trained, rest, dtype
) -> None:
    """Against the plain formula in float64, of the same numbers."""
    torch.manual_seed(0)
    x, fixed = torch.randn(20, 48).to(dtype), [torch.randn(shape).to(dtype) for shape in shapes]
    adapter = [torch.randn(shape) for shape in trained]

    def results(function, as_given):
        leaves = [as_given(t).requires_grad_() for t in (x.clone(), *adapter)]
        out = function(leaves[0], *map(as_given, fixed), *leaves[1:], *rest)
        weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)]

    allowed = 1e-5 if dtype == torch.float32 else 0.03
    for a, b in zip(results(ours, torch.clone), results(plain, torch.Tensor.double), strict=True):
        assert (a - b).abs().max() <= allowed * b.abs().max()
