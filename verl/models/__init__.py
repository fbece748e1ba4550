"""Loading models and tokenizers, attention over packed batches, adapters, the demo's model."""
