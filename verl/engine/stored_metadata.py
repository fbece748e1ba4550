"""Reads `.metadata` of torch.distributed.checkpoint, a pickle, without running any code that it names.

PyTorch reads it with `pickle.load`, which calls whatever the file names. Here each class of the file becomes an inert record, and the
metadata is built from the records field by field, with every type checked.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from verl.typed_json import DamageError, read_bytes

FILE = ".metadata"
MAX_BYTES = 2**30
_CLASSES = "torch.distributed.checkpoint.metadata"
# Names that PyTorch 2.4 to 2.13 writes on Python 3.10 to 3.14. A file that names anything else is refused.
_NAMES = {
    **{(_CLASSES, name): name for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")},
    **{(_CLASSES, name): name for name in ("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): "_StorageInfo",
    ("torch", "Size"): "Size",
    ("torch.serialization", "_get_layout"): "layout",
    ("builtins", "getattr"): "member",  # how Python 3.11 writes a member of an enum
    **{(module, f"{kind}Path"): "path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix", "Windows", "")},
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Reader(FileSystemReader):
    """PyTorch's reader of checkpoints, with metadata that is read by `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


class _Record:
    """An object of the pickle: what it was made of, and nothing that acts."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self._kinds: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _NAMES:
            raise DamageError(f"{FILE} names {module}.{name}, which no checkpoint needs".replace("\n", " ")[:200])
        kind = _NAMES[module, name]
        return self._kinds.setdefault(kind, type(kind, (_Record,), {"name": kind}))  # new classes, so that a file can change no other


def read_metadata(directory: Path) -> Metadata:
    """Read the metadata of a directory of tensors.

    Raises:
        DamageError: it cannot be read, is malformed, names code, holds anything but tensors, or names a file outside the directory.
    """
    content = read_bytes(directory / FILE, MAX_BYTES)
    try:
        return _metadata(_Unpickler(io.BytesIO(content)).load())
    except DamageError:
        raise
    except Exception as error:  # a malformed pickle raises errors of any kind
        raise DamageError(f"{FILE} is malformed ({type(error).__name__})") from error


def files_of(metadata: Metadata) -> dict[str, int]:
    """Return the files that hold the tensors, with the number of bytes that each must at least have."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends


def _fields(value: Any, name: str) -> dict[str, Any]:
    """Return the fields of a record of that class."""
    if not (isinstance(value, _Record) and value.name == name and isinstance(value.state, dict)):
        raise DamageError(f"{FILE} is malformed: no {name}")
    return value.state


def _typed(value: Any, kind: Any) -> Any:
    if type(value) is not kind:
        raise DamageError(f"{FILE} is malformed: {type(value).__name__}, not {kind.__name__}")
    return value


def _metadata(value: Any) -> Metadata:
    found = _fields(value, "Metadata")
    tensors: dict[str, Any] = {_typed(name, str): _tensor(tensor) for name, tensor in _typed(found["state_dict_metadata"], dict).items()}
    storage = {_index(index): _storage(info) for index, info in _typed(found["storage_data"], dict).items()}
    return Metadata(tensors, storage_data=storage, planner_data=_planner(found.get("planner_data")), storage_meta=StorageMeta())


def _tensor(value: Any) -> TensorStorageMetadata:
    found = _fields(value, "TensorStorageMetadata")
    properties = found["properties"]
    if not (isinstance(properties, _Record) and properties.name == "TensorProperties"):
        raise DamageError(f"{FILE} is malformed: no TensorProperties")
    dtype = _typed(_typed(properties.state, tuple)[0], torch.dtype)
    chunks = [_chunk(chunk) for chunk in _typed(found["chunks"], list)]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(found["size"]), chunks)


def _chunk(value: Any) -> ChunkStorageMetadata:
    found = _fields(value, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(found["offsets"]), _size(found["sizes"]))


def _size(value: Any) -> torch.Size:
    if not (isinstance(value, _Record) and value.name == "Size" and len(value.args) <= 1):
        raise DamageError(f"{FILE} is malformed: no Size")
    return torch.Size([_typed(length, int) for length in (value.args[0] if value.args else ())])


def _index(value: Any) -> MetadataIndex:
    found = _fields(value, "MetadataIndex")
    offset, index = found.get("offset"), found.get("index")
    return MetadataIndex(
        _typed(found["fqn"], str), None if offset is None else _size(offset), None if index is None else _typed(index, int)
    )


def _storage(value: Any) -> _StorageInfo:
    found = _fields(value, "_StorageInfo")
    path, offset, length = _typed(found["relative_path"], str), _typed(found["offset"], int), _typed(found["length"], int)
    if not path.endswith(".distcp") or set(path) & set("/\\:\0") or offset < 0 or length < 0 or found.get("transform_descriptors"):
        raise DamageError(f"{FILE} names {path!r:.80}, which is no part of the checkpoint")
    return _StorageInfo(path, offset, length)


def _planner(value: Any) -> dict[str, tuple[Any, ...]] | None:
    """Return where each tensor is in the nested dict that was saved."""
    if not (isinstance(value, dict) and all(isinstance(path, tuple) for path in value.values())):
        return None
    return {_typed(name, str): tuple(part for part in path if isinstance(part, (str, int))) for name, path in value.items()}
