"""The disk that a checkpoint is written to: its room, and its errors."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from verl import dist
from verl.disk import check_room, disk_error, folder_bytes, full_disk
from verl.errors import UserError

FIX = "make room or set trainer.default_local_dir to another disk; earlier checkpoints are complete, and the same command resumes"


@contextmanager
def disk_errors_named(directory: Path, earlier: Sequence[Path], least: int) -> Iterator[None]:
    """Write a checkpoint in this context. Every rank enters it.

    Args:
        directory: where it is written; after an error of the disk, it is removed.
        earlier: checkpoints of this run, which are as large.
        least: bytes that it has at least.
    Raises:
        DiskError: there is no room for it, on all ranks; or the disk fails. Libraries raise errors of many kinds: any of them counts as
            one of the disk if hardly any space is left.
    """
    needed = max([least, *map(folder_bytes, earlier)])
    dist.together(lambda: check_room(directory, needed, what="a checkpoint", fix=FIX) if dist.is_main() else None)
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:
        found = disk_error(error, where=directory, needed=needed, fix=FIX) or full_disk(directory, needed=needed, fix=FIX)
        if found is None:
            raise
        if dist.is_main():
            shutil.rmtree(directory, ignore_errors=True)
        raise found from error
