"""Keeping the libraries' own progress bars and advice out of what verl says."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("torch.distributed", "torch._higher_order_ops.wrap")  # the second tells of a checkpoint in compiled code


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While this lasts, the libraries' own progress bars and advice stay out of what a run says."""
    import transformers

    talk = transformers.utils.logging
    verbosity, has_bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        try:
            talk.set_verbosity_error()
            talk.disable_progress_bar()
            for name in LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            talk.set_verbosity(verbosity)
            if has_bars:
                talk.enable_progress_bar()
