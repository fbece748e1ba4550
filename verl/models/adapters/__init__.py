"""LoRA adapters: put on a model, computed, read, written and merged."""
