"""Neurosymbolic LoRA: decide, round by round, whether to tune weights or rewrite prompts (arXiv 2601.12711)."""

__version__ = "0.1.0"
