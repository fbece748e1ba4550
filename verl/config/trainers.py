"""Tells from keys which trainer's they are, without loading plugins, which may import torch."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from verl.config.load import read_words


def closest(schemas: Sequence[type[Any]], words: list[str]) -> type[Any]:
    """Return the config class that lacks the fewest of the keys; of several, the first.

    Args:
        words: command-line arguments.
    Raises:
        UserError: an argument cannot be read.
    """
    keys = [one.key for one in read_words([word for word in words if word not in ("-h", "--help", "--version")], schemas[0])]
    return min(schemas, key=lambda schema: sum(not _has(tuple(_names(schema())), key) for key in keys))


def _has(names: tuple[str, ...], key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def _names(config: object, prefix: str = "") -> Iterator[str]:
    """Yield the keys; of a group with plugins, and of a mapping, whose keys are not known yet, the beginning with its dot."""
    for field in fields(config):  # type: ignore[arg-type]
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if hasattr(value, "plugins") or isinstance(value, dict):
            yield f"{name}."
        if is_dataclass(value):
            yield from _names(value, f"{name}.")
        else:
            yield name
