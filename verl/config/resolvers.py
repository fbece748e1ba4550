"""Interpolations in a config: `${key}` is supported, `${name:…}` is refused, and what is written to config.yaml is never resolved again."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

from verl.redaction import redact

_INTERPOLATION = re.compile(r"(\\*)\$\{")


def asks_resolver(value: Any) -> bool:
    """Return whether a value, or a text inside it, has an interpolation `${name:…}`: in lists, in keys, and inside other interpolations."""
    return any("${" in text and _has_resolver(text) for text in _texts(value))


def as_written(config: Any) -> DictConfig:
    """Return a config without its secrets, and with each `${` in its values escaped, because the values are final."""
    written: DictConfig = OmegaConf.create(_escaped(redact(asdict(config))))
    return written


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _has_resolver(text: str) -> bool:
    try:
        tree = parse(text)
    except OmegaConfBaseException:
        return ":" in text.partition("${")[2]  # it is an error anyway, and this one is clear
    return _contains_resolver(tree)


def _contains_resolver(tree: Any) -> bool:
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        return True
    return any(_contains_resolver(child) for child in getattr(tree, "children", None) or [])


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}  # nothing is resolved in keys
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return _INTERPOLATION.sub(lambda found: 2 * found[1] + "\\${", value) if isinstance(value, str) else value
