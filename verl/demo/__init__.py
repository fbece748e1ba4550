"""The offline demo: it generates word problems, trains a small model on them, and evaluates it."""
