"""The numerical move on a real model: it learns, only answers count, it repeats bit for bit, it can be put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nslora.config import RunConfig
from nslora.model.fast import kernels
from nslora.model.fast.decode import packed
from nslora.model.lora import PACK, Lean, Learner, batches, parts
from nslora.types import Pair, Prompt

CFG = RunConfig(lr=1e-3, batch=4, rank=8)
PAIRS = [
    Pair(Prompt("Be brief."), f"Where was {name} born?", city, "gold", name)
    for name, city in [
        ("Ana Orr", "Lima"),
        ("Bo Tarn", "Oslo"),
        ("Cy Vell", "Cairo"),
        ("Di Marsh", "Quito"),
        ("Ed Hult", "Bergen"),
    ]
]
rows = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1), st.lists(st.integers(1, 9), min_size=1)),
    min_size=1,
)


@given(rows, st.integers(1, 5))
def test_batches_hold_every_row_once_and_none_is_too_large(rows: list, size: int) -> None:
    cut = batches(rows, size, np.random.default_rng(0))
    assert sorted(row for batch in cut for row in batch) == sorted(rows)
    assert max(map(len, cut)) <= size


@given(rows, st.integers(0, 500))
def test_parts_hold_a_batch_in_order_and_few_tokens_at_a_time(rows: list, shared: int) -> None:
    long = [([0] * shared + prompt * 60, answer * 20) for prompt, answer in rows]
    cut = parts(long)
    assert [row for part in cut for row in part] == long
    for part in cut:
        computed = packed(part, torch.zeros(1))["input_ids"].numel()
        pairs = sum((len(p) + len(a)) ** 2 for p, a in part)
        assert len(part) == 1 or (computed <= PACK and pairs <= PACK**2)


def test_rows_under_a_shared_prompt_are_computed_in_one_part() -> None:
    long = [
        ([0] * 150 + [1, i], [2] * 10) for i in range(8)
    ]  # more than 1200 tokens, 246 of them different
    assert len(parts(long)) == 1
    assert len(parts([([i] * 150, [2] * 10) for i in range(8)])) == 3


@pytest.fixture
def learner(backbone):
    """A fresh learner; the shared backbone is given back bare."""
    yield Learner(backbone, CFG)
    backbone.model = backbone.model.unload()


def nll(backbone) -> float:
    texts = [backbone.text(p.prompt, p.question) for p in PAIRS]
    return float(np.mean(backbone.nll(texts, [p.target for p in PAIRS])))


def test_a_fresh_adapter_changes_nothing_and_epochs_learn(backbone, learner) -> None:
    with learner.model.disable_adapter():
        frozen = nll(backbone)
    assert nll(backbone) == frozen
    first = learner.epoch(PAIRS, np.random.default_rng(0))
    assert first.loss == pytest.approx(frozen, rel=0.5)
    for _ in range(5):
        last = learner.epoch(PAIRS, np.random.default_rng(0))
    assert last.loss < first.loss / 2
    assert nll(backbone) < frozen / 2
    assert first.grad_norm > 0
    assert first.tokens == sum(
        len(a) + len(b)
        for a, b in (backbone.encode(backbone.text(p.prompt, p.question), p.target) for p in PAIRS)
    )


def test_only_the_adapter_is_trained(backbone, learner) -> None:
    base = {n: p.clone() for n, p in learner.model.named_parameters() if "lora_" not in n}
    learner.epoch(PAIRS, np.random.default_rng(0))
    assert all(torch.equal(p, base[n]) for n, p in learner.model.named_parameters() if n in base)
    trained = {n for n, p in learner.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trained)
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(f".{layer}.lora_A" in n for n in trained)


def test_the_same_seed_gives_the_same_bits_and_a_checkpoint_restores_them(
    backbone, learner, tmp_path
) -> None:
    learner.epoch(PAIRS, np.random.default_rng(0))
    learner.save(tmp_path / "adapter")
    after = nll(backbone)
    again = Learner(backbone, CFG)
    again.epoch(PAIRS, np.random.default_rng(0))
    assert nll(backbone) == after
    other = Learner(backbone, RunConfig(lr=1e-3, batch=4, rank=8, seed=5))
    other.epoch(PAIRS, np.random.default_rng(0))
    assert nll(backbone) != after
    other.load(tmp_path / "adapter")
    assert nll(backbone) == after
    assert not list((tmp_path / "adapter").glob("*.bin"))


def gradients(model) -> list[torch.Tensor]:
    """The adapter's gradients, taken away from it."""
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


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


def plain_nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


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
        (kernels.summed_nll, plain_nll, [], [], [torch.arange(20)]),
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


@pytest.mark.parametrize("pack", [PACK, 40])
def test_packed_rows_give_the_loss_and_gradients_of_rows_one_by_one(
    backbone, monkeypatch, pack
) -> None:
    """In float32, against transformers' own loss and norms and PEFT's own LoRA layers, on rows of mixed lengths."""
    monkeypatch.setattr("nslora.model.lora.PACK", pack)
    learner = Learner(backbone, CFG)
    learner.epoch(PAIRS, np.random.default_rng(0))  # B is 0 at first, and A then has no gradient
    one_word = Prompt("Always answer in one word.")
    pairs = [*PAIRS, Pair(one_word, "What is the opposite of hot?", "cold", "replay"), PAIRS[0]]
    pairs.append(
        Pair(PAIRS[0].prompt, PAIRS[0].question, "Lisbon", "gold")
    )  # the same prompt, another answer
    rows = [backbone.encode(backbone.text(p.prompt, p.question), p.target) for p in pairs]
    rows.append(
        (rows[0][0] + rows[0][1] + rows[1][0], rows[1][1])
    )  # its prompt goes on after another row's answer
    assert packed(rows, learner.like)["input_ids"].numel() < 0.8 * sum(
        len(prompt) + len(answer) for prompt, answer in rows
    )
    total = sum(len(answer) for _, answer in rows)
    loss = sum(learner._backward(part, total) for part in parts(rows))
    ours = gradients(learner.model)

    monkeypatch.setattr(Lean, "forward", Lean.__mro__[1].forward)
    assert (
        sum(module.__dict__.pop("forward", None) is not None for module in learner.model.modules())
        > 60
    )  # norms
    plain = 0.0
    for prompt, answer in rows:
        labels = torch.tensor([[-100] * len(prompt) + answer])
        row = (
            learner.model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
            * len(answer)
            / total
        )
        row.backward()
        plain += float(row.detach())
    theirs = gradients(learner.model)
    backbone.model = backbone.model.unload()
    assert loss == pytest.approx(plain, rel=1e-5)
    assert len(ours) == len(theirs) > 100
    worst = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )
    assert worst < 2e-3, worst  # contradicting rows cancel in places, which leaves more rounding
