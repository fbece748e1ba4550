"""Output in terminals and notebooks: plain lines, and nothing that libraries would draw."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

_LIBRARIES = ("torch.distributed", "torch._higher_order_ops.wrap")  # the second one warns about activation checkpointing in compiled code
UNWRAPPED = 1_000_000  # columns


def open_console(**options: Any) -> Console:
    """Return a console for lines of text. It prints plain text in notebooks too, where rich would print each line as an HTML block.

    In a pipe or a file, no line is wrapped: whoever reads it, such as `grep`, wants a path in one piece.

    Args:
        options: arguments of `rich.console.Console`.
    """
    if in_notebook():  # stdout claims to be a terminal, but has no cursor to move
        options = {"force_terminal": False, **options}
    console = Console(force_jupyter=False, **options)
    if not console.is_terminal and "width" not in options:
        console.width = UNWRAPPED
    return console


def in_notebook() -> bool:
    return Console().is_jupyter


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
