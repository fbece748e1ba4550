"""Restores the process state that a run changes, so that programs and notebooks can start several runs, one after another."""

import gc
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from verl import dist
from verl.errors import Stopped, UserError
from verl.models.attention.packed import attention_kept
from verl.progress import quiet_libraries

_running = threading.Lock()


@contextmanager
def session() -> Iterator[None]:
    """A run from beginning to end. At its end all is as it was before, however it ended, and the GPU's memory is free again:
    the process group, random numbers, which attention is called, what libraries say.

    As a decorator it outlives the function's own variables, which hold the memory.

    Raises:
        UserError: another run is going on in this process, which has one process group and one set of GPUs.
    """
    if not _running.acquire(blocking=False):
        raise UserError("another run is going on in this process", fix="wait until it has ended, or start this one in a process of its own")
    try:
        with quiet_libraries(), attention_kept(), _compiler_kept(), torch.random.fork_rng(devices=_initialized_gpus()), _group_kept():
            yield
    except (UserError, Stopped, torch.OutOfMemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the last error, and its frames would keep the models
        raise
    finally:
        _running.release()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _initialized_gpus() -> list[int]:
    """GPUs whose random numbers somebody may have drawn."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def _group_kept() -> Iterator[None]:
    """Leave the process group at the end, if this process was not in one before."""
    started, hook = dist.is_started(), sys.excepthook
    try:
        yield
    finally:
        if dist.world_size() == 1:
            sys.excepthook = hook  # in place of PyTorch's, which writes the rank before each line of an error
        dist.forget_parts() if started else dist.stop()


@contextmanager
def _compiler_kept() -> Iterator[None]:
    settings: Any = torch._dynamo.config
    before = settings.specialize_float
    try:
        yield
    finally:
        settings.specialize_float = before
