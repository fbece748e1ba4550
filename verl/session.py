"""Restores the process state that a run changes, so that programs and notebooks can start several runs one after another."""

import gc
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from verl import dist
from verl.errors import RankError, Stopped, UserError
from verl.models.attention.packed import attention_kept
from verl.progress import quiet_libraries

_running = threading.Lock()


@contextmanager
def session() -> Iterator[None]:
    """Restore the process state and free GPU memory at the end of a run, whether it returns or raises.

    The state consists of the process group, random-number generators, the attention kernel, compiler settings and libraries' log levels
    and warnings. Prefer it as a decorator: the function's variables, which hold GPU memory, are then gone before memory is freed.

    Raises:
        UserError: another run is active in this process, which has only one process group and one set of GPUs; or memory ran out.
        DiskError: a file could not be written or read.
    """
    if not _running.acquire(blocking=False):
        raise UserError("another run is active in this process", fix="wait until it has ended, or start this one in a separate process")
    from verl import signals

    may_block = False  # whether the GPU waits for other ranks that are gone, so that freeing its memory would wait, too
    try:
        random_kept = torch.random.fork_rng(devices=_initialized_gpus())
        with signals.handled(), quiet_libraries(), attention_kept(), _restore_compiler(), random_kept, _restore_group():
            yield
    except (UserError, Stopped) as error:
        may_block = isinstance(error, RankError)
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the last error, whose frames hold the models
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        from verl.machine import of_machine

        if (found := of_machine(error)) is None:
            may_block = dist.is_started()
            raise
        traceback.clear_frames(error.__traceback__)
        raise found from error
    finally:
        _running.release()
        gc.collect()
        if torch.cuda.is_initialized() and not may_block:
            torch.cuda.empty_cache()


def _initialized_gpus() -> list[int]:
    """Return the indices of all GPUs if CUDA is initialized; otherwise no generator has been used."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def _restore_group() -> Iterator[None]:
    """Leave the process group at the end, unless this process was in one before."""
    started, hook, error = dist.is_started(), sys.excepthook, None
    try:
        yield
    except BaseException as raised:
        error = raised
        if (cause := dist.cause_of(raised)) is not raised:
            error = cause
            raise cause from None
        raise
    finally:
        if dist.world_size() == 1:
            sys.excepthook = hook  # PyTorch has set one that prefixes each line of an error with the rank
        dist.forget_parts() if started else dist.stop(error)


@contextmanager
def _restore_compiler() -> Iterator[None]:
    """Restore the settings of torch.compile and the number of threads, which a run changes."""
    settings: Any = torch._dynamo.config
    threads = torch.get_num_threads()
    before, tag = settings.specialize_float, torch.compiler.config.cache_key_tag
    try:
        yield
    finally:
        settings.specialize_float, torch.compiler.config.cache_key_tag = before, tag
        torch.set_num_threads(threads)
