"""Values of a config: by the declared type of their key, and what no key can take."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from verl.config.yaml_text import OldBoolean, TextLoader
from verl.errors import UserError

LARGEST = 2**31 - 1  # of a whole number, except a seed: counts and lengths are 32 bits wide
LARGEST_SEED = 2**63 - 1


def fitted(kind: Any, value: Any, text: Any) -> Any:
    """Return the value, with its text in place of every scalar that is declared as text."""
    options = _options(kind)
    if value is None and (type(None) in options or text == ""):
        return None
    if all(option is str for option in options - {type(None)}) and isinstance(text, str):
        return text
    if isinstance(value, list | dict):
        texts = TextLoader.read(text) if isinstance(text, str) else text
        items = next((_items_of(option, type(value)) for option in options if typing.get_origin(option) is type(value)), Any)
        if isinstance(value, list):
            return [fitted(items, *both) for both in zip(value, texts, strict=True)]
        return {name: fitted(items, value[name], texts[name]) for name in value}
    return value


def refusal(value: Any, kind: Any, key: str) -> tuple[str, str] | None:
    """Say why a value, or one inside it, is wrong for every key of these types, and what to write; None if it is not.

    OmegaConf would take 1 for true, and what YAML 1.1 reads as a boolean is a text in YAML 1.2.
    """
    options = _options(kind)
    if isinstance(value, list | dict):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        items = next((found for option in options if (found := _items_of(option, type(value))) is not Any), Any)
        return next((wrong for one in inside if (wrong := refusal(one, items, key)) is not None), None)
    if isinstance(value, OldBoolean) and options & {int, float} and bool not in options:
        return f"found {value!r}, expected a number", "write a number"
    if isinstance(value, OldBoolean) or (bool in options and options <= {bool, type(None)} and not isinstance(value, bool | None)):
        return f"found {value!r}, expected true or false", "write true or false, or a text in quotes"
    if isinstance(value, str) and "\0" in value:
        return "the text has a NUL character", "remove it"
    if isinstance(value, str) and _has_no_home(value):
        return f"found {value!r}, and there is no user of that name", "write ./ before it, if a file or folder has this name"
    if isinstance(value, float) and value != value:
        return f"found {value}, expected a number", "write a number"
    if isinstance(value, int) and not isinstance(value, bool):
        largest = LARGEST_SEED if key.rpartition(".")[2] == "seed" else LARGEST
        if int in options and abs(value) > largest:
            return "the number is too large", f"give at most {largest:,}"
    return None


def check_names(values: Mapping[Any, Any], where: str) -> None:
    """Raise UserError if a name in a mapping has a dot: in a config file, `a.b` is the name `b` in `a`, so it would not be read back."""
    for name, value in values.items():
        if "." in str(name):
            raise UserError(f"the name {str(name)!r} has a dot", where=where, fix="choose a name without dots")
        if isinstance(value, Mapping):
            check_names(value, where)


def not_a_number(value: Any, kind: Any) -> str | None:
    """Say that null, a text, true or false was found where a number is expected, or null where a value is; None if it is something else."""
    if value is None and type(None) not in _options(kind):
        return "null is no value of this key"
    options = _options(kind) - {type(None)}
    if isinstance(value, float) and int in options and float not in options:
        return f"{value} is not a whole number"
    if not isinstance(value, str | bool) or not options or not options <= {int, float}:
        return None
    found = repr(value) if isinstance(value, str) else str(value).lower()
    return f"{found} is not a {'number' if float in options else 'whole number'}"


def example(key: str, default: Any, kind: Any) -> str:
    """Return what to write for a key, such as `optim.lr=1e-05`.

    Args:
        default: the key's default value.
        kind: its declared type.
    """
    options = _options(kind)
    if isinstance(default, bool | int | float | str) and default != "???":
        text = f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else str(default)
        return f"write e.g. {key}={text.lower() if isinstance(default, bool) else text}"
    shown = next((text for option, text in ((bool, "true"), (int, "8"), (float, "0.1"), (str, "<text>")) if option in options), "")
    return f"write e.g. {key}={shown}" if shown else "--help shows the key with an example of its type"


def _has_no_home(text: str) -> bool:
    """Return whether a text is a path in the home of a user that does not exist, such as `~nobody-here/model`."""
    if text[:1] != "~" or text[1:2] in ("", "/", "~") or set(text) & set(" \n"):
        return False
    try:
        return os.path.expanduser(text) == text
    except ValueError:  # no user has a name with a zero byte or half a character
        return True


def _options(kind: Any) -> set[Any]:
    """Return the types that a declared type allows: of a union each, of a literal those of its values."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return {option for part in typing.get_args(kind) for option in _options(part)}
    if typing.get_origin(kind) is Literal:
        return {type(option) for option in typing.get_args(kind)}
    return {kind}


def _items_of(kind: Any, container: type) -> Any:
    """Return the type of a container's items; Any if `kind` is another type."""
    return typing.get_args(kind)[-1] if typing.get_origin(kind) is container else Any


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def misfit(config: Any, prefix: str = "") -> tuple[str, str] | None:
    """Return the key of a value that is not of its declared type, and what was found; None if all are.

    OmegaConf checks what is assigned, but not what an interpolation gives, nor lists inside lists.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            if (found := misfit(value, f"{key}.")) is not None:
                return found
        elif not _fits(value, hints[field.name]):
            return key, f"found {value!r}, expected {_kind_text(hints[field.name])}"
    return None


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a declared type; of a type that is not one of a config's, anything counts as such."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in _NAMES else True


def _kind_text(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_kind_text, inner))
    if origin in (list, dict):
        return f"{'a list' if origin is list else 'a mapping'} with {_kind_text(inner[-1])} in each place"
    return _NAMES.get(kind, "anything")
