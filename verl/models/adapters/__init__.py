"""LoRA adapters: adding them to a model, fast operators, files, and merging."""
