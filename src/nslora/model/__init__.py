"""A backbone: its weights (checkpoints, download), its replies (backbone), LoRA on it (lora), and how fast (fast/)."""

import logging

# it advises on other packages when it is imported, which PEFT does wherever it is there
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
