"""The shared-prefix decoder and scorer against the library's own `generate` and forward pass, in float32."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from nslora.model import backbone, checkpoints
from nslora.model.fast import attention, decode, kernels
from nslora.types import Prompt, UserError

# peft asks transformers under a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

SYSTEM = Prompt("Answer the question in one short sentence and name the place that is asked for.")
QUESTIONS = [
    "What is the capital of France?",
    "Name a colour.",
    "I was wondering whether you could tell me which city is the capital of Peru, and in which continent it lies?",
    "What is the capital of Japan?",
    "Name a colour.",
]


@pytest.fixture(scope="module")
def tiny():
    """A random two-layer model: quick enough for gradients."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=96,
        pad_token_id=96,
        bos_token_id=95,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def adapted(tiny):
    """The tiny model under a LoRA adapter that changes what it says; removed afterwards."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(
        tiny,
        peft.LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False),
    )
    yield wrapped
    wrapped.unload()


def reference(model, ids: list[int], new: int) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=new,
        do_sample=False,
    )
    return out[0, len(ids) :].tolist()


def rows(count: int, seed: int = 0) -> list[list[int]]:
    """Token rows of mixed lengths with a common start, the shortest being that start and one token."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 95, (n,), generator=random).tolist()  # noqa: E731
    start = draw(9)
    return [start + draw(1 + (5 * i) % 17) for i in range(count)]


def test_texts_equal_generate_one_by_one(backbone):
    texts = [backbone.text(SYSTEM, question) for question in QUESTIONS] + ["Once upon a time"]
    got = backbone.generate(texts, 8)
    for text, generation in zip(texts, got, strict=True):
        ids = backbone.encode(text, "")[0]
        want = reference(backbone.model, ids, 8)
        assert generation.text == backbone.tokenizer.decode(want, skip_special_tokens=True).strip()
        assert generation.tokens == len(want)
    assert "Paris" in got[0].text
    assert got[1].text == got[4].text


def test_confidence_is_minus_the_nll_of_what_was_produced(backbone):
    texts = [backbone.text(SYSTEM, question) for question in QUESTIONS[:2]]
    generations = backbone.generate(texts, 40)
    assert all(generation.tokens < 40 for generation in generations), (
        "a reply that ends by itself is needed here"
    )
    nll = backbone.nll(texts, [generation.text for generation in generations])
    assert nll == pytest.approx([-generation.confidence for generation in generations], rel=1e-3)


def test_nll_prefers_the_right_answer_and_keeps_order(backbone):
    texts = [
        backbone.text(Prompt(), question) for question in (QUESTIONS[0], QUESTIONS[3], QUESTIONS[0])
    ]
    right, other, wrong = backbone.nll(texts, ["Paris.", "Tokyo.", "Tokyo."])
    assert right < wrong
    assert backbone.nll(texts[1:2], ["Tokyo."]) == pytest.approx([other], rel=1e-4)


def test_nothing_in_nothing_out(backbone):
    assert backbone.generate([], 4) == []
    assert backbone.nll([], []) == []


def test_many_batches_equal_generate(tiny, monkeypatch):
    monkeypatch.setattr(decode, "BATCH", 4)
    prompts = rows(11)
    got = decode.decode(tiny, prompts, {96, 3, 4, 5}, 10)
    for prompt, (ids, _) in zip(prompts, got, strict=True):
        want = reference(tiny, prompt, 10)
        first = next((i for i, token in enumerate(want) if token in {96, 3, 4, 5}), 9)
        assert ids == want[: first + 1]


@pytest.mark.parametrize(("kept", "in_place"), [([2, 1], True), ([0, 1], True), ([2, 0], False)])
def test_a_cache_with_room_holds_what_a_growing_one_does(kept: list[int], in_place: bool):
    torch.manual_seed(0)
    roomy: Any = kernels.RoomyLayer()
    plain: Any = DynamicLayer()
    for n in (5, 1, kernels.ROOM, 1, 1):
        key, value = torch.randn(2, 3, 2, n, 4)
        for rows in (roomy, plain):
            batch = rows.keys.shape[0] if rows.is_initialized else 3
            rows.update(key[:batch], value[:batch])
        if n == kernels.ROOM:
            for rows in (roomy, plain):
                rows.batch_select_indices(torch.tensor(kept))
            assert (roomy.room[0].shape[0] == 2) == in_place
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


def test_packed_rows_attend_without_a_mask(tiny):
    """Loaded with our attention, a model looks at each row alone: its mask, here one that hides all, is not needed."""
    torch.manual_seed(2)
    model: Any = LlamaForCausalLM(tiny.config).eval()
    model.set_attn_implementation(attention.ATTENTION)
    batch = decode.packed([(row[:-3], row[-3:]) for row in rows(6)], model.lm_head.weight)
    masked, _ = decode.answer_logits(
        tiny_copy := copy.deepcopy(model), **{k: v for k, v in batch.items() if k != "rows"}
    )
    hidden = torch.full_like(batch["attention_mask"], torch.finfo(torch.float32).min)
    alone, _ = decode.answer_logits(model, **batch | {"attention_mask": hidden})
    torch.testing.assert_close(alone, masked, rtol=1e-4, atol=1e-5)
    gradients = []
    for one, logits in ((model, alone), (tiny_copy, masked)):
        logits.square().sum().backward()
        gradients.append([p.grad for p in one.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_numbers_of_rows_that_products_see_are_few(tiny):
    """Each number has its products compiled: tokens and answer tokens are filled up, for the head too."""
    seen = []
    hook = tiny.get_output_embeddings().register_forward_hook(
        lambda _m, args, _out: seen.append(args[0].shape)
    )
    for n in (1, 2, 3, 5):
        batch = decode.packed([(row[:-3], row[-3:]) for row in rows(n)], tiny.lm_head.weight)
        logits, targets = decode.answer_logits(
            tiny, **{k: v for k, v in batch.items() if k != "rows"}
        )
        assert batch["input_ids"].shape[1] % decode.EVEN == 0
        assert logits.shape[0] == targets.shape[0] == 3 * n
    hook.remove()
    assert all(shape[0] % decode.EVEN_ANSWERS == 0 for shape in seen)


@given(st.lists(st.booleans(), min_size=1, max_size=70).filter(any))
def test_rows_that_leave_a_batch_move_little_and_leave_few_sizes(going: list[bool]):
    keep = decode._kept(going)
    assert {k for k, goes in enumerate(going) if goes} <= set(keep)
    assert len(set(keep)) == len(keep) <= sum(going) * 1.25
    assert len(keep) in (len(going), *range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
    assert all(k == place or (k >= len(keep) and not going[place]) for place, k in enumerate(keep))


def test_layers_with_one_input_compute_once_for_all():
    made = []

    def outputs(x: torch.Tensor) -> list[torch.Tensor]:
        made.append(x)
        return [x + 1, x + 2]

    together, x = kernels.Together(["a", "b"], outputs), torch.zeros(1)
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
        linear = kernels.families(
            model, lambda m: type(m) is torch.nn.Linear and not m.weight.requires_grad
        )
        sizes = sorted(len(family) for family in linear if family[0].in_features > 4)
        assert sizes.count(3) == sizes.count(2) == 2, (
            sizes
        )  # q, k and v, gate and up, in two layers


def narrow(dropout: float = 0.0) -> Any:
    """A random two-layer model whose first layer sees five tokens."""
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        attention_dropout=dropout,
        pad_token_id=0,
        eos_token_id=96,
    )
    return Gemma3ForCausalLM(config)


@pytest.mark.parametrize(
    "dropout", [0.0, 1e-9]
)  # with dropout, as on a GPU, torch's own attention computes
def test_packed_rows_longer_than_a_sliding_window_keep_to_it(dropout: float):
    """Gemma's local layers see the last tokens only; packed rows, attended by themselves, once saw all of theirs."""
    model = narrow(dropout).train()
    start = list(range(20, 34))
    pairs = [([*start, 1, 2, 3], [50, 51]), ([*start, 4, 5, 6, 7, 8], [60, 61, 62]), ([9, 8], [7])]
    alone = [model(input_ids=torch.tensor([prompt + answer])).logits[0] for prompt, answer in pairs]
    wanted = [
        logits[-1 - len(answer) : -1] for logits, (_, answer) in zip(alone, pairs, strict=True)
    ]
    model.set_attn_implementation(attention.ATTENTION)
    logits, _ = decode.answer_logits(model, **decode.packed(pairs, model.lm_head.weight))
    torch.testing.assert_close(logits, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_decoding_keeps_to_a_sliding_window():
    """Padding between a shared prefix and shorter rows once took the place of tokens in the window."""
    model, start = narrow().eval(), list(range(20, 34))
    for prompts in ([[*start, 1, 2, 3], [*start, 4, 5, 6, 7, 8], [*start, 9]], [[7, 8], [7]]):
        expected = [reference(model, prompt, 8) for prompt in prompts]
        assert [ids for ids, _ in decode.decode(model, prompts, {96}, 8)] == expected
        assert [ids for ids, _ in decode.decode(model, prompts[-1:], {96}, 8)] == expected[-1:]


def test_rows_without_common_start(tiny):
    prompts = [[1], [2, 7, 9], [5, 5, 5, 5, 5, 8]]
    got = decode.decode(tiny, prompts, {96}, 6)
    assert [ids for ids, _ in got] == [reference(tiny, prompt, 6) for prompt in prompts]


def test_generate_uses_the_active_adapter(tiny, adapted):
    prompts = rows(5)
    got = [ids for ids, _ in decode.decode(adapted, prompts, {96}, 6)]
    assert got == [reference(adapted, prompt, 6) for prompt in prompts]
    with adapted.disable_adapter():
        assert got != [ids for ids, _ in decode.decode(adapted, prompts, {96}, 6)]


def test_nll_equals_a_plain_forward(tiny, adapted):
    pairs = [(prompt[:-1], prompt[-1:] + [40 + i, 96]) for i, prompt in enumerate(rows(19))]
    got = decode.mean_nll(adapted, pairs)
    for (prompt, answer), nll in zip(pairs, got, strict=True):
        with torch.no_grad():
            logits = adapted(input_ids=torch.tensor([prompt + answer])).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert nll == pytest.approx(
            -logp.gather(1, torch.tensor(answer)[:, None]).mean().item(), rel=1e-4
        )


def test_sampling_depends_on_seed_and_not_on_the_batch(tiny, monkeypatch):
    prompts = rows(9)
    whole = decode.decode(tiny, prompts, {96}, 8, temperature=1.0, seed=7)
    assert [ids for ids, _ in whole] != [
        ids for ids, _ in decode.decode(tiny, prompts, {96}, 8, 1.0, seed=8)
    ]
    monkeypatch.setattr(decode, "BATCH", 2)
    again = decode.decode(tiny, prompts, {96}, 8, temperature=1.0, seed=7)
    assert [ids for ids, _ in again] == [ids for ids, _ in whole]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).expand(4000, -1)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    counts = decode._choose(logits, uniform, 0.5).bincount(minlength=4) / 4000
    want = (logits[0] / 0.5).softmax(-1)
    assert torch.allclose(counts, want, atol=0.03)
    assert decode._choose(logits[:1], torch.tensor([1.0]), 1.0).item() in (2, 3), (
        "the end of the range is a token"
    )


def batch_of(pairs):
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), 96)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        mask[row, : len(prompt) + len(answer)] = 1
        answers[row, len(prompt) : len(prompt) + len(answer)] = 1
    return ids, mask, answers


def test_answer_logits_and_gradients_equal_the_plain_loss(adapted):
    ids, mask, answers = batch_of([([1, 2, 3], [4, 96]), ([5], [6, 7, 8, 96]), ([9, 10], [96])])
    logits, targets = decode.answer_logits(adapted, ids, mask, answers)
    assert targets.tolist() == [4, 96, 6, 7, 8, 96, 96]
    full = adapted(input_ids=ids, attention_mask=mask).logits[:, :-1][answers[:, 1:].bool()]
    assert torch.allclose(logits, full, atol=1e-5)

    parameters = [p for p in adapted.parameters() if p.requires_grad]
    ours = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), parameters)
    loss = adapted(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(answers == 0, -100)
    ).loss
    plain = torch.autograd.grad(loss, parameters)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, plain, strict=True))
    assert any(a.abs().max() > 1e-3 for a in ours)
    assert adapted(input_ids=ids).logits.shape == (3, 5, 97), "the hook is gone"


def test_training_with_a_bfloat16_base_and_float32_adapter(tiny):
    base: Any = LlamaForCausalLM(tiny.config)
    base.lm_head.weight.data *= 20  # a random head is too small for a low loss
    base.to(torch.bfloat16)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=True
    ).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    batch = batch_of([([1, 2, 3], [4, 96]), ([5], [6, 7, 8, 96])])
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = decode.answer_logits(model, *batch)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert decode.mean_nll(model, [([1, 2, 3], [4, 96])])[0] < losses[0]
    assert model.training, "scoring puts training mode back"


def test_chat_format(backbone):
    text = backbone.text(Prompt("Be brief.", "Q: {question}"), "Why?")
    assert text.index("Be brief.") < text.index("Q: Why?")
    assert text.endswith("<|im_start|>assistant\n")
    assert backbone.encode(text, "Yes")[1][-1] == backbone.tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
    assert backbone.count("one two three") == 3


@pytest.fixture
def model_folder(backbone, tmp_path):
    """A hub-style folder: a random model with a real tokenizer."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(backbone.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


def test_any_model_folder_loads(model_folder):
    loaded = backbone.load(str(model_folder), dtype="float32", device="cpu")
    assert loaded.dtype == "float32"
    assert len(loaded.generate(["Hello"], 3)) == 1
    with pytest.raises(UserError, match="exceed the 64 tokens"):
        loaded.generate(["word " * 62], 8)
    before = loaded.identity
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 0] += 1
    loaded.model.save_pretrained(model_folder)
    assert checkpoints.identity(str(model_folder)) != before


def test_a_format_without_system_role_or_without_any(model_folder):
    (model_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    loaded = backbone.load(str(model_folder), dtype="float32", device="cpu")
    assert loaded.text(Prompt("Be brief."), "Why?") == "<user>Be brief.\n\nWhy?</user><assistant>"

    (model_folder / "chat_template.jinja").unlink()
    plain = backbone.load(str(model_folder), dtype="float32", device="cpu")
    assert plain.text(Prompt("Be brief."), "Why?").endswith("Be brief.\n\nQuestion: Why?\nAnswer:")
    assert plain.end == plain.tokenizer.eos_token_id
    assert plain.tokenizer.decode(plain.encode("Answer:", "Yes")[1][:-1]) == " Yes"
    assert plain._plain(plain.tokenizer(" Yes\nQuestion: And?")["input_ids"]) == "Yes"


def test_folders_that_would_run_code_or_unpickle_are_refused(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    shutil.copytree(model_folder, model_folder.parent / "own")
    (model_folder.parent / "own" / "config.json").write_text(json.dumps(config))
    (model_folder.parent / "own" / "own.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(UserError, match="cannot load"):
        backbone.load(str(model_folder.parent / "own"))

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    (model_folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        backbone.load(str(model_folder))


@pytest.mark.parametrize(("setting", "value"), [("dtype", "float8"), ("device", "tpu")])
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(UserError, match=value):
        backbone.load("smollm2-135m", **{setting: value})


def test_too_little_memory_is_said_before_loading(monkeypatch, model_folder):
    monkeypatch.setattr(
        backbone.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10})
    )
    with pytest.raises(UserError, match="GB of memory"):
        backbone.load(str(model_folder), device="cpu")


def test_the_head_gets_contiguous_input(backbone) -> None:
    """Found as a bug: for a sliced view torch copied the whole head once per row, 50 to 200 times slower."""
    seen = []
    hook = backbone.model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    texts = [
        backbone.text(Prompt("Be brief."), q)
        for q in ("Where is Lima?", "What is the capital of Peru, please?")
    ]
    backbone.generate(texts, 2)
    hook.remove()
    assert seen and all(x.is_contiguous() for x in seen)


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
