"""Models and tokenizers: loading, packed attention, LoRA adapters, export, and the demo's tiny model."""
