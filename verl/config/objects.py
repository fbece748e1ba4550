"""Builds a config from the arguments of the Python API: dataclasses, dicts and command-line arguments."""

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

from verl.config.assignments import NULL
from verl.config.load import load_config
from verl.config.plugin_settings import completed
from verl.errors import UserError

Config = TypeVar("Config")
Given = Mapping[str, Any] | str  # other forms of a config than a dataclass


def config_of(schema: type[Config], given: Sequence[object]) -> Config:
    """Build a config from the arguments of the Python API. They are converted to command-line arguments and checked like them.

    Args:
        schema: a dataclass of `verl.config`.
        given: instances of `schema`, mappings, and command-line arguments; later ones win. From a dataclass, only values that differ from
            the defaults are used.
    Raises:
        UserError: an argument is none of these, or a key, type or value is invalid.
    """
    return load_config(schema, [word for part in given for word in words_of(part, schema)])


def words_of(part: object, schema: type) -> list[str]:
    """Return one argument of the Python API as command-line arguments."""
    if isinstance(part, str):
        if part in ("-h", "--help", "--version"):
            raise UserError(f"found {part!r}", fix="docs/keys.md lists all keys, and verl.__version__ is the version")
        return [part]
    if isinstance(part, schema):
        completed(part)  # raises if a group has the keys of a plugin other than the one that it names
        defaults = dict(_leaves(_tree(schema())))
        return [f"{key}={word(key, value)}" for key, value in _leaves(_tree(part)) if key not in defaults or defaults[key] != value]
    if isinstance(part, Mapping):
        return [f"{key}={word(key, value)}" for key, value in _leaves(_tree(part))]
    what = f"the class {part.__name__}" if isinstance(part, type) else f"{type(part).__name__}"
    is_list = isinstance(part, list | tuple)
    fix = "pass its items one by one, such as verl.sft(*words)" if is_list else f"{schema.__name__}() has the defaults"
    raise UserError(f"found {what}, expected {schema.__name__}, a dict or key=value", fix=fix)


def _tree(part: object) -> dict[str, Any]:
    """Return a dataclass or mapping as nested dicts, including attributes that are no fields, so that misspelled ones are reported."""
    values = dict(part) if isinstance(part, Mapping) else vars(part)
    return {str(key): _tree(value) if isinstance(value, Mapping) or _is_group(value) else value for key, value in values.items()}


def _is_group(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def word(key: str, value: object) -> str:
    """Return a value as text that `argument` reads back."""
    if value is None or isinstance(value, bool):
        return {None: NULL, True: "true", False: "false"}[value]
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value)) if math.isfinite(value) else str(float(value)).replace("inf", ".inf").replace("nan", ".nan")
    if isinstance(value, (str, os.PathLike)):
        text = str(os.fspath(value))
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(word(key, item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{word(key, str(name))}: {word(key, item)}" for name, item in value.items()) + "}"
    raise UserError(f"found {type(value).__name__}", where=key, fix="give text, a path, a number, true, false, null, or a list of these")


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves += _leaves(value, f"{path}.") if isinstance(value, dict) and value else [(path, value)]
    return leaves
