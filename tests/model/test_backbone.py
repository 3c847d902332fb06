"""A loaded backbone: its chat format, replies and likelihoods on a real model, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import reference
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nslora.model import backbone, checkpoints
from nslora.types import Prompt, UserError

SYSTEM = Prompt("Answer the question in one short sentence and name the place that is asked for.")


QUESTIONS = [
    "What is the capital of France?",
    "Name a colour.",
    "I was wondering whether you could tell me which city is the capital of Peru, and in which continent it lies?",
    "What is the capital of Japan?",
]


def test_texts_equal_generate_one_by_one(backbone):
    questions = [*QUESTIONS[:3], QUESTIONS[1]]
    texts = [backbone.text(SYSTEM, question) for question in questions] + ["Once upon a time"]
    got = backbone.generate(texts, 8)
    for text, generation in dict(zip(texts, got, strict=True)).items():
        ids = backbone.encode(text, "")[0]
        want = reference(backbone.model, ids, 8)
        assert generation.text == backbone.tokenizer.decode(want, skip_special_tokens=True).strip()
        assert generation.tokens == len(want)
    assert "Paris" in got[0].text
    assert got[1].text == got[3].text


def test_confidence_is_minus_the_nll_of_what_was_produced(backbone):
    texts = [backbone.text(SYSTEM, question) for question in QUESTIONS[:2]]
    generations = backbone.generate(texts, 40)
    assert all(generation.tokens < 40 for generation in generations), (
        "a reply that ends by itself is needed here"
    )
    nll = backbone.nll(texts, [generation.text for generation in generations])
    assert nll == pytest.approx([-generation.mean_logprob for generation in generations], rel=1e-3)


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
    assert plain._reply(plain.tokenizer(" Yes\nQuestion: And?")["input_ids"]) == "Yes"


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
