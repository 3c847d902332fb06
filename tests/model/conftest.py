"""A tiny model, bare and under a LoRA adapter."""

from __future__ import annotations

import peft
import pytest
import tiny as models
import torch


@pytest.fixture(scope="module")
def tiny():
    """The tiny Llama model of `models.llama`, in evaluation mode."""
    return models.llama().eval()


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
