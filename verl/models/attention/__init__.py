"""Attention over packed batches."""
