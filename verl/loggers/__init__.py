"""Loggers, one per file: a module with `start(run)` that returns an object with `log(step, metrics)` and `finish()`."""
