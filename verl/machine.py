"""Errors of the machine that any code may meet: of its disks, and of its memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from verl.disk import disk_error
from verl.errors import UserError
from verl.out_of_memory import memory_error


def of_machine(error: BaseException) -> UserError | None:
    """Return the one-line error of a disk, or of memory that ran out; None if the exception is something else."""
    return disk_error(error, doing="written or read") or memory_error(error)


@contextmanager
def machine_errors_named() -> Iterator[None]:
    """Raise the one-line error in place of an error of a disk, or of memory that ran out."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if (found := of_machine(error)) is None:
            raise
        raise found from error
