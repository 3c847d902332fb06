"""On a GPU: the numbers of the CPU, nobody waits within a training step, and what does not fit is halved."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import tiny as models
import torch
from tinymodel import save_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from nslora.config import RunConfig
from nslora.model.backbone import Backbone, load
from nslora.model.fast import attention, decode, memory, packing
from nslora.model.fast.packing import answer_logits, pack
from nslora.model.lora import Learner
from nslora.types import Pair, Prompt, UserError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")

GPU = torch.device("cuda")
CFG = RunConfig(lr=1e-2, batch=8, rank=4)
PROMPT = Prompt("Be brief.")
CITIES = ("Lima", "Oslo", "Cairo", "Quito", "Bergen", "Tunis")
PAIRS = [
    Pair(PROMPT, f"Where was person {i} born? {'Think about it. ' * (i % 4)}", city, "gold", str(i))
    for i, city in enumerate(CITIES)
] + [Pair(PROMPT, f"Name colour {i}.", "A colour is blue.", "replay") for i in range(4)]
MODELS = {"llama": models.llama, "qwen2": models.qwen2, "gemma3": models.narrow}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def opened(folder: str, device: str, dtype: str = "float32") -> Backbone:
    return load(folder, threads=1, dtype=dtype, device=device)


def rng(epoch: int = 0) -> np.random.Generator:
    return np.random.default_rng([7, epoch])


def losses(backbone: Backbone, epochs: int = 4, cfg: RunConfig = CFG) -> list[float]:
    """The loss of each epoch, from a fresh adapter."""
    learner = Learner(backbone, cfg)
    return [learner.epoch(PAIRS, rng(epoch)).loss for epoch in range(epochs)]


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def little_memory(megabytes: float) -> Iterator[None]:
    """Leave so much of the GPU's memory beside what is taken now."""
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info()
    taken = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((taken + megabytes * 2**20) / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_and_their_gradients_are_those_of_the_cpu(name: str) -> None:
    """In float64 on the CPU and float32 on the GPU; gemma's first layer has a sliding window."""
    here = MODELS[name]().double()
    there = copy.deepcopy(here).float().to(GPU)
    pairs = [(row[:-3], row[-3:]) for row in models.rows(9)]
    found = []
    for model in (here, there):
        model.set_attn_implementation(attention.ATTENTION)
        logits, targets = answer_logits(model, **pack(pairs, model.lm_head.weight))
        logits.log_softmax(-1).gather(1, targets[:, None]).mean().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for exact, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_generate(name: str) -> None:
    model = MODELS[name]().eval().to(GPU)
    model.set_attn_implementation(attention.ATTENTION)
    plain = MODELS[name]().eval()
    prompts = models.rows(11)
    stop = {96, 3, 4, 5}
    for prompt, (ids, _) in zip(prompts, decode.decode(model, prompts, stop, 20), strict=True):
        wanted = models.reference(plain, prompt, 20)
        last = next((i for i, token in enumerate(wanted) if token in stop), 19)
        assert ids == wanted[: last + 1]


def test_samples_do_not_depend_on_the_batch(monkeypatch) -> None:
    model = models.llama().eval().to(GPU)
    whole = decode.decode(model, models.rows(9), {96}, 12, temperature=1.0, seed=7)
    monkeypatch.setattr(decode, "BATCH", 2)
    parts = decode.decode(model, models.rows(9), {96}, 12, temperature=1.0, seed=7)
    assert [ids for ids, _ in whole] == [ids for ids, _ in parts]


def test_a_backbone_answers_and_scores_as_on_the_cpu(folder: str) -> None:
    here, there = opened(folder, "cpu"), opened(folder, "cuda")
    assert there.device == "cuda" and load(folder).device == "cuda"
    texts = [here.text(PROMPT, pair.question) for pair in PAIRS]
    assert [g.text for g in there.generate(texts, 12)] == [g.text for g in here.generate(texts, 12)]
    answers = [pair.target for pair in PAIRS]
    assert there.nll(texts, answers) == pytest.approx(here.nll(texts, answers), rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_training_learns_what_it_learns_on_the_cpu(folder, dtype, tolerance) -> None:
    wanted = losses(opened(folder, "cpu"))
    found = losses(opened(folder, "cuda", dtype))
    assert found == pytest.approx(wanted, rel=tolerance)
    assert found[-1] < 0.9 * found[0]


def test_training_goes_on_from_a_saved_folder(folder: str, tmp_path) -> None:
    backbone = opened(folder, "cuda")
    wanted = losses(backbone)
    learner = Learner(backbone, CFG)
    for epoch in range(2):
        learner.epoch(PAIRS, rng(epoch))
    learner.save(tmp_path / "adapter")
    learner = Learner(backbone, CFG)
    learner.load(tmp_path / "adapter")
    found = [learner.epoch(PAIRS, rng(epoch)).loss for epoch in (2, 3)]
    assert found == pytest.approx(wanted[2:], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nobody_waits_within_a_training_step(folder: str, dtype: str) -> None:
    learner = Learner(opened(folder, "cuda", dtype), CFG)
    rows = [learner._row(pair) for pair in PAIRS]
    # the first step makes room
    learner._step(rows[:6], rows[6:])
    torch.cuda.synchronize()
    with nobody_waits():
        nll, _ = learner._step(rows[:6], rows[6:])
    assert math.isfinite(torch.cat(nll).sum().item())


def test_parts_that_do_not_fit_are_halved(folder: str) -> None:
    """The GPU really runs out; losses stay what they are with room."""
    long = [replace(pair, question=pair.question + " and so on" * 60) for pair in PAIRS]
    backbone = opened(folder, "cuda")
    wanted = Learner(backbone, CFG).epoch(long, rng())
    learner = Learner(backbone, CFG)
    rows = [learner._row(pair) for pair in long]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learner._step(rows[:8], [])
    whole = (torch.cuda.max_memory_allocated() - before) / 2**20
    learner = Learner(backbone, CFG)
    with little_memory(whole / 2):
        found = learner.epoch(long, rng())
    assert memory.size(learner.model, "tokens to train on", packing.PACK_GPU) < packing.PACK_GPU
    assert found.nll == pytest.approx(wanted.nll, rel=1e-3)


def test_a_model_that_does_not_fit_is_one_sentence(tmp_path) -> None:
    wide = str(save_tiny_model(tmp_path / "wide", width=1024))
    with little_memory(8), pytest.raises(UserError, match="a smaller backbone or"):
        opened(wide, "cuda")


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="takes the extra quantised")
def test_four_bit_weights_are_trained_on_and_stay_as_they_are(folder: str, tmp_path) -> None:
    quantised = opened(folder, "cuda", "nf4")
    layer = quantised.model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    before = layer.weight.data.clone()
    learner = Learner(quantised, CFG)
    found = [learner.epoch(PAIRS, rng(epoch)).loss for epoch in range(6)]
    assert found[-1] < 0.9 * found[0]
    assert torch.equal(layer.weight.data, before)
    learner.save(tmp_path / "adapter")
    texts = [quantised.text(PROMPT, pair.question) for pair in PAIRS]
    assert len(quantised.generate(texts, 4)) == len(texts)
    whole = opened(folder, "cuda", "float32")
    Learner(whole, CFG).load_weights(tmp_path / "adapter")
    answers = [pair.target for pair in PAIRS]
    bare = opened(folder, "cuda")
    assert np.mean(whole.nll(texts, answers)) < 0.9 * np.mean(bare.nll(texts, answers))


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="takes the extra quantised")
def test_eight_billion_weights_are_trained_within_24_gb(tmp_path) -> None:
    """Random ones, of Llama 3's shape: what a common card holds, at the size of batch that is found by trying."""
    free, whole = torch.cuda.mem_get_info()
    if free < 30e9:
        pytest.skip("the whole weights are made on the GPU first")
    folder = save_tiny_model(tmp_path / "eight")
    (folder / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=1,
        dtype="bfloat16",
    )
    with torch.device(GPU):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder, max_shard_size="4GB")
    del made
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(24e9 / whole)
    torch.cuda.reset_peak_memory_stats()
    try:
        learner = Learner(opened(str(folder), "cuda", "nf4"), RunConfig(batch=16, rank=16))
        numbers = rng().integers(0, 10**6, (16, 68)).astype(str)
        pairs = [
            Pair(PROMPT, " ".join(row[:60]), " ".join(row[60:]), "gold", str(i))
            for i, row in enumerate(numbers)
        ]
        found = [learner.epoch(pairs, rng(epoch)).loss for epoch in range(2)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found[1] < found[0]
    assert torch.cuda.max_memory_allocated() < 24e9
