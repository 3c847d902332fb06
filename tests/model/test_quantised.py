"""A backbone of 4-bit weights: it answers, is trained on, and its adapter fits the whole weights.

bitsandbytes is no part of the environment that `make` builds: PEFT would import it at every start, for a second or two.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from nslora.config import RunConfig
from nslora.model import backbone as backbones
from nslora.model.lora import Learner
from nslora.types import Pair, Prompt, UserError

CFG = RunConfig(lr=3e-3, batch=4, rank=8)
PROMPT = Prompt("Be brief.")
PAIRS = [
    Pair(PROMPT, f"Where was {name} born?", city, "gold", name)
    for name, city in [("Ana Orr", "Lima"), ("Bo Tarn", "Oslo"), ("Cy Vell", "Cairo")]
] + [Pair(PROMPT, "Name a colour.", "A colour is blue.", "replay")]


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="takes the extra quantised")
def test_four_bit_weights_are_trained_on_and_stay_as_they_are(tmp_path) -> None:
    quantised = backbones.load("smollm2-135m", dtype="nf4", device="cpu")
    layer = quantised.model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    before = layer.weight.data.clone()
    text = quantised.text(PROMPT, "What is the capital of France?")
    (reply,) = quantised.generate([text], 8)
    assert "Paris" in reply.text

    learner = Learner(quantised, CFG)
    rng = np.random.default_rng(0)
    losses = [learner.epoch(PAIRS, rng).loss for _ in range(8)]
    assert losses[-1] < losses[0] / 2
    assert torch.equal(layer.weight.data, before)
    learner.save(tmp_path / "adapter")
    tuned = quantised.nll([quantised.text(PROMPT, PAIRS[0].question)], ["Lima"])
    learner.reset()

    # the adapter is that of the whole weights, which merging needs
    whole = backbones.load("smollm2-135m", dtype="float32", device="cpu")
    Learner(whole, CFG).load_weights(tmp_path / "adapter")
    ours = whole.nll([whole.text(PROMPT, PAIRS[0].question)], ["Lima"])
    assert ours == pytest.approx(tuned, abs=1.0)


def test_a_missing_package_is_said_before_loading(monkeypatch) -> None:
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nslora\[quantised\]"):
        backbones.load("smollm2-135m", dtype="nf4")
