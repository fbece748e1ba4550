"""The text of `--help`: keys with their defaults and comments."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any


def help_text(defaults: Any) -> str:
    """Return the text of `--help`: each key with its default and the comment above it.

    Args:
        defaults: a config with default values and the keys of its plugins.
    """
    lines = [
        (defaults.__doc__ or "").strip(),
        "",
        "  --config FILE.yaml   keys from a file; repeatable, later files win, key=value wins over all",
        "  --best               of a run's directory, take the best checkpoint, and not the newest one",
        "",
    ]
    return "\n".join([*lines, *_describe(defaults)])


def _describe(defaults: Any, prefix: str = "") -> list[str]:
    lines: list[str] = []
    for f in fields(defaults):
        value = getattr(defaults, f.name)
        if is_dataclass(value):
            lines += _describe(value, f"{prefix}{f.name}.")
            continue
        lines.append(f"  {prefix}{f.name}={shown(value)}")
        lines += [f"      {line}" for line in comment_on(type(defaults), f.name)]
    return lines


def shown(default: object) -> object:
    """Return a default as it is printed."""
    if default == "???":
        return "required"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else default


def comment_on(kind: type, name: str) -> list[str]:
    """Return the lines of the comment above a field, in the class itself or else in the base class that declares it."""
    for source in _sources(kind):
        found = re.search(rf"((?:^[ \t]+#.*\n)+)[ \t]+{name}:", source, re.MULTILINE)
        if found:
            return [line.strip().removeprefix("#").strip() for line in found[1].splitlines()]
    return []


def _sources(kind: type) -> Iterator[str]:
    bases: list[type] = [base for part in (*getattr(kind, "made_of", ()), kind) for base in part.__mro__]
    return (inspect.getsource(base) for base in bases if hasattr(base, "__dataclass_fields__") and "made_of" not in vars(base))
