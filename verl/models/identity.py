"""What identifies a model or a user's file by its content, so that it may move, but not change, between a run and its resumption."""

import hashlib
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from verl.regular_file import MAX_BYTES

CONFIGS = ("config.json", "adapter_config.json")
BLOCKS, BLOCK_BYTES = 16, 4096  # of each file of weights, besides its beginning
HEADER_BYTES = 1 << 16


def content_of(name: str) -> str | None:
    """Return what identifies a model directory, a file, or a model of the Hub by its content; None if it is not here.

    Weights are not read whole: their sizes, the beginning of each file, and blocks spread over it are hashed, which takes a fraction of a
    second. A model of the Hub is identified by the commit that is in the local cache.
    """
    try:
        return _content_of(name)
    except OSError:  # what cannot be read is an error where it is needed
        return None


def _content_of(name: str) -> str | None:
    path = Path(name).expanduser()
    if path.is_dir():
        digest = hashlib.sha256()
        for file in [*(path / config for config in CONFIGS), *sorted(path.glob("*.safetensors"))]:
            if file.is_file():
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                digest.update(_sample(file))
        return digest.hexdigest()[:16]
    if path.is_file():
        return hashlib.sha256(_sample(path)).hexdigest()[:16]
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def _sample(path: Path) -> bytes:
    with path.open("rb") as file:
        size = path.stat().st_size
        return b"".join(_parts(file, size)) if path.name.endswith(".safetensors") or size > MAX_BYTES else file.read()


def _parts(file: BinaryIO, size: int) -> list[bytes]:
    parts = [file.read(HEADER_BYTES)]
    for number in range(1, BLOCKS + 1):
        file.seek(max(0, size * number // BLOCKS - BLOCK_BYTES))
        parts.append(file.read(BLOCK_BYTES))
    return parts
