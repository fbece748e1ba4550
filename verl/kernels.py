"""Checks whether this machine can run verl's own kernels."""

import os
import shutil
from importlib.util import find_spec


def has_compiler() -> bool:
    """Return whether there is a C compiler, which torch.compile and Triton need."""
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


HAS_TRITON = find_spec("triton") is not None and has_compiler()  # CPU builds of PyTorch come without Triton
