"""verl chooses the attention of a model. What a config.json names is ignored: it may be a kernel of the Hub, which is code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

KEYS = tuple(f"{start}{part}_implementation{end}" for part in ("attn", "experts") for start in ("", "_") for end in ("", "_internal"))
_original = PreTrainedConfig.get_config_dict.__func__  # type: ignore[attr-defined]  # of a class method


@contextmanager
def stated_ones_ignored() -> Iterator[None]:
    """In this context, transformers reads every config.json without the names of implementations."""
    before = PreTrainedConfig.__dict__["get_config_dict"]
    PreTrainedConfig.get_config_dict = classmethod(_read)  # type: ignore[assignment]
    try:
        yield
    finally:
        PreTrainedConfig.get_config_dict = before  # type: ignore[method-assign]


def _read(kind: type[PreTrainedConfig], *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config, unused = _original(kind, *args, **kwargs)
    return _without(config), unused


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in KEYS}
    return [_without(inner) for inner in value] if isinstance(value, list) else value
