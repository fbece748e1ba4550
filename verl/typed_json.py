"""Reads a JSON file as a dataclass, without trusting it: any file that is not exactly the dataclass is a `DamageError`."""

import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from verl import regular_file

Kind = TypeVar("Kind")


class DamageError(Exception):
    """A file is not what was written. The message names it and says what is wrong."""


def read(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON object as a dataclass.

    Raises:
        DamageError: the file cannot be read, is no regular file, or does not have exactly the fields of the dataclass in their types.
    """
    found: Kind = convert(read_json(path), kind, path.name)
    return found


def read_json(path: Path) -> Any:
    """Read a JSON value: no link, no key twice, no NaN. Raises DamageError."""
    content = read_bytes(path, regular_file.MAX_BYTES)
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path.name} is malformed ({error})") from error


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file. Raises DamageError: it cannot be read, is a link, or has more bytes than `most`."""
    try:
        return regular_file.read(path, most)
    except OSError as error:
        raise DamageError(f"{path.name} {describe(error)}") from error


def describe(error: OSError) -> str:
    """Say in words why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return str(error) if error.errno is None else f"cannot be read: {error.strerror}"


def convert(value: Any, kind: Any, place: str) -> Any:
    """Return a JSON value as `kind`: a dataclass, a plain type, a dict, or a union of these. Raises DamageError naming the place."""
    if is_dataclass(kind):
        return _convert_fields(value, kind, place)
    if get_origin(kind) in (Union, UnionType):
        return _convert_union(value, get_args(kind), place)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            _refuse(value, kind, place)
        return {key: convert(child, get_args(kind)[1], f"{place}: {key!r:.80}") for key, child in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # a bool is no int here
        _refuse(value, kind, place)
    return value


def _convert_fields(value: Any, kind: Any, place: str) -> Any:
    if not isinstance(value, dict):
        _refuse(value, kind, place)
    types, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    if unknown := value.keys() - known.keys():
        raise DamageError(f"{place} has an unknown field {min(unknown)!r:.80}")
    required = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    if missing := required - value.keys():
        raise DamageError(f"{place} lacks {min(missing)!r}")
    return kind(**{name: convert(child, types[name], f"{place}: {name}") for name, child in value.items()})


def _convert_union(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    fitting = [kind for kind in kinds if is_dataclass(kind) == isinstance(value, dict) and kind is not NoneType]
    return convert(value, fitting[0] if fitting else kinds[0], place)


def _refuse(value: Any, kind: Any, place: str) -> NoReturn:
    raise DamageError(f"{place} is {value!r:.40}, not {getattr(kind, '__name__', kind)}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
