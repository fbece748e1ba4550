"""Third-party libraries, kept quiet."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("torch.distributed", "torch._higher_order_ops.wrap")  # the second warns of checkpointing in compiled code


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' own progress bars and advice in the block, so that a run's output is its own."""
    import transformers

    talk = transformers.utils.logging
    verbosity, has_bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    with warnings.catch_warnings():
        try:
            talk.set_verbosity_error()
            talk.disable_progress_bar()
            for name in _LIBRARIES:
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
