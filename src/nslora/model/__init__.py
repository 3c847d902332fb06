"""A backbone: its weights, its replies, and LoRA on it."""
