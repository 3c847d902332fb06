"""A backbone: its weights (checkpoints, download), its replies (backbone), LoRA on it (lora), and how fast (fast/)."""
