"""Neurosymbolic LoRA: decide, move by move, whether to tune weights or rewrite prompts.

After arXiv 2601.12711. `nslora.adapt("mine.jsonl", backbone="smollm2-135m", out="adapted")` adapts
a backbone to your data. Names are imported when first used, so `import nslora` is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nslora.config import RunConfig
    from nslora.runs.adapt import Result, adapt
    from nslora.runs.evaluate import compare, evaluate
    from nslora.runs.limits import Limits
    from nslora.study.advise import advise
    from nslora.types import Candidate, Prompt

__version__ = "0.1.0"
__all__ = [
    "Candidate",
    "Limits",
    "Prompt",
    "Result",
    "RunConfig",
    "__version__",
    "adapt",
    "advise",
    "compare",
    "evaluate",
]

HOME = {
    "adapt": "nslora.runs.adapt",
    "advise": "nslora.study.advise",
    "Result": "nslora.runs.adapt",
    "compare": "nslora.runs.evaluate",
    "evaluate": "nslora.runs.evaluate",
    "Limits": "nslora.runs.limits",
    "RunConfig": "nslora.config",
    "Prompt": "nslora.types",
    "Candidate": "nslora.types",
}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'nslora' has no attribute {name!r}")
    return getattr(import_module(HOME[name]), name)
