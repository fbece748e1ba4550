"""Generation: one file an engine."""
