"""The numerical move: it learns, repeats bit for bit, can be put back whole, and reports the task's own signal."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from nslora.config import RunConfig
from nslora.disk import SUMS, write_sums
from nslora.model import lora
from nslora.model.backbone import Backbone
from nslora.model.fast import memory
from nslora.model.fast.attention import ATTENTION
from nslora.model.fast.packing import PACK, pack, split
from nslora.model.lora import ADAPTER_FILE, OPTIMIZER_FILE, FusedLoraLinear, Learner, batches
from nslora.types import Pair, Prompt, UserError

CFG = RunConfig(lr=3e-3, batch=4, rank=8)
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
REPLAY = [
    Pair(Prompt("Always answer in one word."), "What is the opposite of hot?", "cold", "replay"),
    Pair(Prompt("Be brief."), "Name a colour.", "A colour is blue.", "replay"),
]
TINY = {"llama": tiny.llama, "qwen2": tiny.qwen2, "gemma3": tiny.narrow}


@pytest.fixture
def learner(backbone):
    """A fresh learner on the real model; the shared backbone is given back bare."""
    yield Learner(backbone, CFG)
    backbone.model = backbone.model.unload()


def small(backbone, model) -> Backbone:
    """The real tokenizer and chat format around a random model, with attention as `load` sets it."""
    model.set_attn_implementation(ATTENTION)
    return replace(backbone, model=model.eval().requires_grad_(False))


@pytest.fixture
def toy(backbone) -> Backbone:
    """A backbone of a random Llama model."""
    return small(backbone, tiny.llama(len(backbone.tokenizer)))


def rng(epoch: int = 0) -> np.random.Generator:
    return np.random.default_rng([7, epoch])


def adapter(learner: Learner) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in learner.weights]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def gradients(model) -> list[torch.Tensor]:
    """The adapter's gradients, taken away from it."""
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return grads


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))


def nll(backbone, pairs) -> float:
    texts = [backbone.text(p.prompt, p.question) for p in pairs]
    return float(np.mean(backbone.nll(texts, [p.target for p in pairs])))


@given(st.integers(1, 30), st.integers(1, 5))
def test_batches_hold_every_row_once_and_none_is_too_large(count: int, size: int) -> None:
    drawn = batches(count, size, np.random.default_rng(0))
    assert sorted(i for batch in drawn for i in batch) == list(range(count))
    assert max(map(len, drawn)) <= size


def test_a_fresh_adapter_changes_nothing_and_epochs_learn(backbone, learner) -> None:
    pairs = PAIRS[:3]
    with learner.model.disable_adapter():
        frozen = nll(backbone, pairs)
    assert nll(backbone, pairs) == frozen
    first = learner.epoch(pairs, rng())
    assert first.loss == pytest.approx(frozen, rel=0.5)
    for _ in range(2):
        last = learner.epoch(pairs, rng())
    assert last.loss < first.loss / 2
    assert nll(backbone, pairs) < frozen / 2
    assert first.grad_norm > 0
    rows = [learner._row(pair) for pair in pairs]
    assert first.answer_tokens == tuple(len(answer) for _, answer in rows)
    assert first.tokens == sum(len(prompt) + len(answer) for prompt, answer in rows)


def test_training_goes_on_from_a_saved_folder_as_if_it_had_never_stopped(
    backbone, learner, tmp_path
) -> None:
    """On the real model: two epochs, and the second one again in a learner of its own."""
    pairs = [*PAIRS[:2], REPLAY[0]]
    learner.epoch(pairs, rng(0))
    learner.save(tmp_path / "step")
    straight = learner.epoch(pairs, rng(1)), adapter(learner)
    torch.manual_seed(12345)
    other = Learner(backbone, CFG)
    other.load(tmp_path / "step")
    resumed = other.epoch(pairs, rng(1)), adapter(other)
    assert straight[0].nll == resumed[0].nll
    assert straight[0].grad_norm == resumed[0].grad_norm
    assert equal(straight[1], resumed[1])


@pytest.mark.parametrize("k", [0, 1, 3])
def test_k_epochs_and_the_rest_after_a_load_are_all_of_them_to_the_bit(toy, tmp_path, k) -> None:
    pairs, epochs = [*PAIRS, *REPLAY], 4
    straight = Learner(toy, CFG)
    losses = [straight.epoch(pairs, rng(i)).nll for i in range(epochs)]
    expected = adapter(straight)
    first = Learner(toy, CFG)
    again = [first.epoch(pairs, rng(i)).nll for i in range(k)]
    first.save(tmp_path / "step")
    second = Learner(toy, CFG)
    second.epoch(pairs, rng(99))
    second.load(tmp_path / "step")
    again += [second.epoch(pairs, rng(i)).nll for i in range(k, epochs)]
    assert again == losses
    assert equal(adapter(second), expected)


def test_without_the_optimizer_the_same_training_goes_elsewhere(toy, tmp_path) -> None:
    """What the file beside the adapter is for."""
    learner = Learner(toy, CFG)
    learner.epoch(PAIRS, rng(0))
    learner.save(tmp_path / "step")
    learner.epoch(PAIRS, rng(1))
    expected = adapter(learner)
    learner.load(tmp_path / "step")
    learner.optimizer = learner._fresh_optimizer()
    learner.epoch(PAIRS, rng(1))
    assert not equal(adapter(learner), expected)


def test_torchs_global_random_state_is_neither_read_nor_changed(backbone) -> None:
    """Even where the model has dropout."""
    results = []
    for seed in (1, 2):
        model = tiny.llama(len(backbone.tokenizer), attention_dropout=0.5)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        learner = Learner(small(backbone, model), CFG)
        learner.epoch(PAIRS, rng())
        assert torch.equal(torch.get_rng_state(), before)
        results.append(adapter(learner))
    assert equal(*results)
    assert not learner.model.training


def test_seeds_give_adapters_and_orders_of_their_own(toy) -> None:
    base = adapter(Learner(toy, CFG))
    other = adapter(Learner(toy, CFG.but(seed=5)))
    assert not equal(base, other)
    assert equal(base, adapter(Learner(toy, CFG)))


def test_reset_puts_back_a_new_learner(toy) -> None:
    learner = Learner(toy, CFG)
    fresh, wrapped = adapter(learner), learner.model
    first = learner.epoch(PAIRS, rng())
    trained = adapter(learner)
    learner.reset()
    assert learner.model is wrapped
    assert equal(adapter(learner), fresh)
    assert learner.epoch(PAIRS, rng()).nll == first.nll
    assert equal(adapter(learner), trained)


def test_a_checkpoint_is_two_float32_files_that_peft_reads(toy, tmp_path) -> None:
    learner = Learner(toy, CFG)
    learner.epoch(PAIRS, rng())
    learner.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", ADAPTER_FILE}
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.part"), *tmp_path.glob("*.pt")]
    tensors = load_file(tmp_path / OPTIMIZER_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    size = sum(weight.numel() for weight in learner.weights)
    assert sum(t.numel() for t in tensors.values()) == 2 * size + len(learner.weights)


def cut_short(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", [ADAPTER_FILE, OPTIMIZER_FILE])
@pytest.mark.parametrize("harm", [lambda path: path.unlink(), cut_short], ids=["missing", "short"])
def test_a_folder_without_a_whole_file_is_refused_and_changes_nothing(
    toy, tmp_path, name, harm
) -> None:
    learner = Learner(toy, CFG)
    learner.epoch(PAIRS, rng(0))
    learner.save(tmp_path)
    learner.epoch(PAIRS, rng(1))
    before, state = adapter(learner), learner._optimizer_tensors()
    harm(tmp_path / name)
    with pytest.raises(UserError, match=name):
        learner.load(tmp_path)
    assert equal(adapter(learner), before)
    assert equal([*learner._optimizer_tensors().values()], [*state.values()])


def test_a_save_that_breaks_off_leaves_no_optimizer_of_another_adapter(
    toy, tmp_path, monkeypatch
) -> None:
    learner = Learner(toy, CFG)
    learner.epoch(PAIRS, rng(0))
    learner.save(tmp_path)

    def breaks_off(_tensors, path, _about):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "save_file", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        learner.save(tmp_path)
    with pytest.raises(UserError, match=f"{SUMS} is damaged or missing"):
        learner.load(tmp_path)


@pytest.mark.parametrize("file", [ADAPTER_FILE, OPTIMIZER_FILE])
def test_the_files_of_another_rank_are_refused(toy, tmp_path, file) -> None:
    for rank in (4, 8):
        learner = Learner(toy, CFG.but(rank=rank))
        learner.epoch(PAIRS, rng())
        learner.save(tmp_path / str(rank))
    (tmp_path / "4" / file).replace(tmp_path / "8" / file)
    write_sums(tmp_path / "8")
    with pytest.raises(UserError, match="another backbone or rank"):
        learner.load(tmp_path / "8")


def test_scaled_weights_lie_between_the_frozen_and_the_tuned_ones(toy) -> None:
    learner, text = Learner(toy, CFG), toy.text(Prompt(), "What is it?")
    learner.epoch(PAIRS, rng(0))

    def added() -> list[torch.Tensor]:
        """What the adapter adds to each weight."""
        layers = [m for m in toy.model.modules() if isinstance(m, lora.FusedLoraLinear)]
        return [m.scale * (b @ a) for m in layers for _, _, a, b in [m.tensors()]]

    tuned = [b.clone() for b in learner.products]
    whole, nll = added(), toy.nll([text], ["Lima"])
    learner.scale(tuned, 0.5)
    for half, all_of_it in zip(added(), whole, strict=True):
        torch.testing.assert_close(half, all_of_it / 2)
    assert toy.nll([text], ["Lima"]) != nll
    # back to the bit, whatever came between
    learner.scale(tuned, 0.8)
    learner.scale(tuned, 1.0)
    assert equal(added(), whole)


def test_training_goes_on_from_the_whole_adapter(toy, tmp_path) -> None:
    """As if it had not been scaled, and to the bit where it was saved in between."""
    learner = Learner(toy, CFG)
    learner.epoch(PAIRS, rng(0))
    learner.epoch(PAIRS, rng(1))
    expected = adapter(learner)

    learner = Learner(toy, CFG)
    learner.epoch(PAIRS, rng(0))
    learner.scale([b.clone() for b in learner.products], 0.6)
    learner.save(tmp_path)
    scaled = adapter(learner)
    learner.epoch(PAIRS, rng(1))
    assert learner.share == 1.0
    gone_on = adapter(learner)
    for one, other in zip(gone_on, expected, strict=True):
        torch.testing.assert_close(one, other)

    learner = Learner(toy, CFG)
    learner.load(tmp_path)
    assert learner.share == 0.6
    assert equal(adapter(learner), scaled)
    learner.epoch(PAIRS, rng(1))
    assert equal(adapter(learner), gone_on)
    learner.load(tmp_path)
    learner.reset()
    assert learner.share == 1.0


def test_only_the_adapter_is_trained(toy) -> None:
    learner = Learner(toy, CFG)
    base = {n: p.clone() for n, p in learner.model.named_parameters() if "lora_" not in n}
    learner.epoch(PAIRS, rng())
    assert all(torch.equal(p, base[n]) for n, p in learner.model.named_parameters() if n in base)
    trained = {n for n, p in learner.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trained)
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(f".{layer}.lora_A" in n for n in trained)


def unfuse(monkeypatch, model) -> int:
    """Put back PEFT's own LoRA layers and transformers' own norms; the number of norms."""
    monkeypatch.setattr(FusedLoraLinear, "forward", FusedLoraLinear.__mro__[1].forward)
    return sum(module.__dict__.pop("forward", None) is not None for module in model.modules())


def plain_gradients(model, rows, total: int) -> tuple[list[float], list[torch.Tensor]]:
    """Summed nll of each row, and gradients, by transformers' own loss on rows one by one, over `total` tokens."""
    losses = []
    for prompt, answer in rows:
        labels = torch.tensor([[-100] * len(prompt) + answer])
        ids = torch.tensor([prompt + answer])
        summed = model(input_ids=ids, labels=labels).loss * len(answer)
        (summed / total).backward()
        losses.append(summed.item())
    return losses, gradients(model)


def distilled_gradients(model, rows, total: int) -> list[torch.Tensor]:
    """Gradients of the cross entropy with the frozen model's probabilities, rows one by one, over `total` tokens."""
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer])
        of_answer = slice(len(prompt) - 1, -1)
        with torch.no_grad(), model.disable_adapter():
            frozen = model(input_ids=ids).logits[0, of_answer]
        tuned = model(input_ids=ids).logits[0, of_answer]
        loss = torch.nn.functional.cross_entropy(tuned, frozen.softmax(-1), reduction="sum")
        (loss / total).backward()
    return gradients(model)


def check_packed_rows(learner, pairs, monkeypatch, most: int = PACK) -> int:
    """Compare `_backward` with rows one by one, in loss and gradients; the number of fused norms."""
    learner.epoch(pairs, rng())  # B is 0 at first, and A then has no gradient
    rows = [learner._row(pair) for pair in pairs]
    # its prompt goes on after another row's answer
    rows.append((rows[0][0] + rows[0][1] + rows[1][0], rows[1][1]))
    packed = sum(pack(part, learner.like)["input_ids"].numel() for part in split(rows, most))
    assert packed < 0.9 * sum(len(prompt) + len(answer) for prompt, answer in rows)
    total = sum(len(answer) for _, answer in rows)
    loss = torch.cat(learner._backward(rows, total, most=most)).sum().item()
    ours = gradients(learner.model)
    norms = unfuse(monkeypatch, learner.model)
    plain, theirs = plain_gradients(learner.model, rows, total)
    assert loss == pytest.approx(sum(plain), rel=1e-5)
    assert len(ours) == len(theirs) == len(learner.weights)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) < 2e-3  # contradicting rows cancel in places, which leaves more rounding
    return norms


OTHER_ANSWER = replace(PAIRS[0], target="Lisbon")  # under the same prompt


@pytest.mark.parametrize("most", [PACK, 120])
@pytest.mark.parametrize("kind", TINY)
def test_packed_rows_give_the_loss_and_gradients_of_rows_one_by_one(
    backbone, kind, most, monkeypatch
) -> None:
    """In float32, against transformers' own loss and norms and PEFT's own LoRA layers, on rows of mixed lengths."""
    learner = Learner(small(backbone, TINY[kind](vocab_size=len(backbone.tokenizer))), CFG)
    check_packed_rows(learner, [*PAIRS, REPLAY[0], PAIRS[0], OTHER_ANSWER], monkeypatch, most)


def test_packed_rows_of_the_real_model_do_too(learner, monkeypatch) -> None:
    assert check_packed_rows(learner, [PAIRS[0], REPLAY[0], OTHER_ANSWER], monkeypatch) > 60


def test_the_signal_is_of_own_pairs_and_training_of_all(toy, monkeypatch) -> None:
    """One batch of own and replay pairs, against a plain step on the gradient of all."""
    pairs = [PAIRS[0], REPLAY[0], PAIRS[1], REPLAY[1]]
    learner = Learner(toy, CFG)
    learner.epoch(pairs, rng(0))
    before, state = adapter(learner), copy.deepcopy(learner.optimizer.state_dict())
    rows = [learner._row(pair) for pair in pairs]
    epoch = learner.epoch(pairs, rng(1))
    trained = adapter(learner)

    with torch.no_grad():
        for weight, old in zip(learner.weights, before, strict=True):
            weight.copy_(old)
    unfuse(monkeypatch, learner.model)
    total = sum(len(answer) for _, answer in rows)
    nll, _ = plain_gradients(learner.model, rows, total)
    _, own = plain_gradients(learner.model, [rows[0], rows[2]], total)
    assert epoch.nll == pytest.approx(nll, rel=1e-5)
    assert epoch.answer_tokens == tuple(len(answer) for _, answer in rows)
    assert epoch.loss == pytest.approx(sum(nll) / total, rel=1e-5)
    assert epoch.grad_norm == pytest.approx(norm(own), rel=1e-4)

    kept = distilled_gradients(learner.model, [rows[1], rows[3]], total)
    everything = [a + b for a, b in zip(own, kept, strict=True)]
    assert epoch.grad_norm != pytest.approx(norm(everything), rel=1e-3)
    for weight, grad in zip(learner.weights, everything, strict=True):
        weight.grad = grad
    torch.nn.utils.clip_grad_norm_(learner.weights, lora.CLIP)
    plain = torch.optim.AdamW(learner.weights, lr=CFG.lr, weight_decay=0.0)
    plain.load_state_dict(state)
    plain.step()
    for ours, theirs in zip(trained, learner.weights, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-5)


def test_replay_pulls_towards_the_frozen_probabilities(toy, monkeypatch) -> None:
    """Against transformers' own logits, with and without PEFT's own LoRA layers."""
    learner = Learner(toy, CFG)
    learner.epoch(PAIRS, rng(0))
    rows = [learner._row(pair) for pair in REPLAY]
    total = sum(len(answer) for _, answer in rows)
    learner._backward(rows, total, frozen=True)
    ours = gradients(learner.model)
    unfuse(monkeypatch, learner.model)
    for fused, plain in zip(ours, distilled_gradients(learner.model, rows, total), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-6)


def test_without_replay_a_step_is_one_pass_over_the_batch_to_the_bit(toy) -> None:
    ours = Learner(toy, CFG)
    epoch = ours.epoch(PAIRS, rng())
    trained = adapter(ours)
    plain, norms = Learner(toy, CFG), []
    rows = [plain._row(pair) for pair in PAIRS]
    for batch in batches(len(rows), CFG.batch, rng()):
        of_batch = [rows[i] for i in batch]
        plain._backward(of_batch, sum(len(answer) for _, answer in of_batch))
        norms.append(torch.nn.utils.clip_grad_norm_(plain.weights, lora.CLIP))
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    assert epoch.grad_norm == torch.stack(norms).mean().item()
    assert equal(trained, adapter(plain))


def test_batches_of_replay_alone_train_and_leave_the_signal_out(toy) -> None:
    learner = Learner(toy, CFG)
    # the frozen model itself has nothing to keep
    learner.epoch(PAIRS, rng())
    before = adapter(learner)
    assert math.isnan(learner.epoch(REPLAY, rng()).grad_norm)
    assert not equal(adapter(learner), before)

    # batches of one: the mean is over the two steps on own pairs
    pairs = [PAIRS[0], REPLAY[0], PAIRS[1]]
    norms = {}
    learner = Learner(toy, CFG.but(batch=1))
    for (i,) in batches(3, 1, rng()):
        norms[i] = learner.epoch([pairs[i]], rng()).grad_norm
    again = Learner(toy, CFG.but(batch=1))
    assert again.epoch(pairs, rng()).grad_norm == pytest.approx((norms[0] + norms[2]) / 2)


def test_quantised_weights_are_trained_on_by_the_layers_that_peft_has_for_them(toy) -> None:
    fused = Learner(toy, CFG)
    wanted = fused.epoch(PAIRS, rng())
    fused.model.unload()
    toy.model = tiny.llama(len(toy.tokenizer)).eval().requires_grad_(False)
    toy.model.set_attn_implementation(ATTENTION)
    toy.model.is_quantized = True
    plain = Learner(toy, CFG)
    assert not any(isinstance(module, FusedLoraLinear) for module in plain.model.modules())
    assert plain.epoch(PAIRS, rng()).nll == pytest.approx(wanted.nll, rel=1e-4)


def test_a_batch_that_memory_does_not_hold_is_learned_in_smaller_parts(toy) -> None:
    pairs, cfg = PAIRS + REPLAY, CFG.but(batch=7)
    undisturbed = Learner(toy, cfg)
    wanted, weights = undisturbed.epoch(pairs, rng()), adapter(undisturbed)
    undisturbed.model.unload()

    learner, tokens = Learner(toy, cfg), []

    def room(_module, args, kwargs):
        tokens.append(kwargs["input_ids"].numel())
        if torch.is_grad_enabled() and tokens[-1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = learner.model.register_forward_pre_hook(room, with_kwargs=True)
    found = learner.epoch(pairs, rng())
    hook.remove()
    assert max(tokens) > 64, "nothing was too large"
    assert found.nll == pytest.approx(wanted.nll, rel=1e-4)
    for a, b in zip(adapter(learner), weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_a_failed_pass_has_computed_is_let_go(toy) -> None:
    """Between siblings (gate and up), where the output of the second one waits for its turn."""
    cfg = CFG.but(batch=7)
    learner, tokens = Learner(toy, cfg), []
    shared = {m.shared for m in learner.model.modules() if isinstance(m, FusedLoraLinear)}

    def room(_module, args):
        tokens.append(args[0].shape[-2])
        if torch.is_grad_enabled() and tokens[-1] > 64:
            assert any(each.pending for each in shared), "nothing waits"
            raise torch.OutOfMemoryError("CUDA out of memory.")

    inner: Any = learner.model
    activation = inner.base_model.model.model.layers[0].mlp.act_fn
    hook = activation.register_forward_pre_hook(room)
    before = memory.halved

    def clean(*args, **kwargs):
        assert not any(each.pending for each in shared)
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "halved", clean)
        learner.epoch(PAIRS + REPLAY, rng())
    hook.remove()
    assert max(tokens) > 64, "nothing was too large"


def test_an_adapter_of_another_process_is_the_same_to_the_byte(toy, tmp_path) -> None:
    """Found as a bug: PEFT wrote the names of its layers in an order that differs from process to process."""
    Learner(toy, CFG).save(tmp_path / "a")
    names = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)
    assert len(names) > 1
