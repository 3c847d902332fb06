"""The grid of experiments.toml, and what runs it."""
