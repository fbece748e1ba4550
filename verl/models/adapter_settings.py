"""What adapter_config.json says: types and sizes of its fields, and regular expressions that end in time. Its author is not trusted."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from verl.errors import UserError
from verl.models.damage import read_object

FIX = "copy or save the adapter again"
MOST = 10**6  # of ranks, layers and the like
SECONDS = 5.0  # for all regular expressions on all modules
# Matches each expression with each name, in a process that can be ended. An expression that is none is told on stdout.
PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for shown, pattern in patterns:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        sys.exit(print(f"{shown!r} is not a regular expression: {error}"))
    for name in names:
        compiled.match(name)
"""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _is_rank(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _object_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_item, value.values()))


def _any_of(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(kind(value) for kind in kinds)


_texts, _counts = _list_of(_is_text), _list_of(_is_count)
_flag = (_is_bool, "true or false")
_names = (_any_of(_is_text, _texts), "a text or a list of texts")
_numbers = (_any_of(_is_count, _counts), "a number from 0, or a list of them")
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_is_text, "a text"),
    "task_type": (_is_text, "a text"),
    "base_model_name_or_path": (_is_text, "a text"),
    "r": (_is_rank, f"a number from 1 to {MOST:,}"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "fan_in_fan_out": _flag,
    "inference_mode": _flag,
    "init_lora_weights": (_any_of(_is_bool, _is_text), "true, false or a text"),
    "target_modules": _names,
    "exclude_modules": _names,
    "layers_pattern": _names,
    "modules_to_save": (_texts, "a list of texts"),
    "target_parameters": (_texts, "a list of texts"),
    "layers_to_transform": _numbers,
    "rank_pattern": (_object_of(_is_rank), f"an object of numbers from 1 to {MOST:,}"),
    "alpha_pattern": (_object_of(_is_number), "an object of finite numbers"),
    "trainable_token_indices": (_any_of(_counts, _object_of(_counts)), "a list of token ids, or an object of such lists"),
}
REQUIRED = ("r", "lora_alpha")  # may be missing, but not null


def read_settings(file: Path) -> dict[str, Any]:
    """Read an adapter_config.json.

    Raises:
        UserError: it is not JSON, or a field of a LoRA adapter has a wrong type or size.
    """
    found = read_object(file)
    if found.get("peft_type", "LORA") not in ("LORA", None) and isinstance(found["peft_type"], str):
        return found  # an adapter of another kind, which is refused where one is loaded
    for name, (is_right, expected) in FIELDS.items():
        value = found.get(name)
        if (value is not None or (name in found and name in REQUIRED)) and not is_right(value):
            raise UserError(f"{name} is {repr(value)[:80]}, expected {expected}", where=str(file), fix=FIX)
    return found


def check_patterns(settings: LoraConfig, names: Iterable[str], path: str) -> None:
    """Check that peft can match the regular expressions of an adapter with the names of a model's modules.

    Raises:
        UserError: an expression is invalid, or matching takes longer than SECONDS.
    """
    patterns = [(shown, pattern) for shown, pattern in _patterns(settings) if not shown.replace("_", "").replace(".", "").isalnum()]
    if not patterns:
        return
    where = f"{path}/adapter_config.json"
    try:
        command, given = [sys.executable, "-I", "-S", "-c", PROGRAM], json.dumps([patterns, list(names)])
        ended = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS)  # noqa: S603, Python itself
    except subprocess.TimeoutExpired as error:
        shown = ", ".join(repr(shown) for shown, _ in patterns)[:200]
        what = f"matching its regular expressions takes longer than {SECONDS:g} s: {shown}"
        raise UserError(what, where=where, fix="name the modules in target_modules as a list") from error
    if ended.returncode or ended.stdout:
        raise UserError(ended.stdout.strip() or "its regular expressions cannot be matched", where=where, fix=FIX)


def _patterns(settings: LoraConfig) -> list[tuple[str, str]]:
    """Return each regular expression as it is written, and as peft completes it."""
    whole = [value for value in (settings.target_modules, settings.exclude_modules) if isinstance(value, str) and value != "all-linear"]
    keys = [*(settings.rank_pattern or {}), *(settings.alpha_pattern or {})]
    layers = [settings.layers_pattern] if isinstance(settings.layers_pattern, str) else settings.layers_pattern or []
    return [
        *((value, rf"(?:{value})\Z") for value in whole),
        *((key, rf"(.*\.)?({key})$") for key in keys),
        *((name, rf"(^|.*\.){name}($|\..*)") for name in settings.modules_to_save or []),
        *((layer, rf"(?:^|.*?\.){layer}\.(?P<idx>\d+)\.") for layer in layers),
    ]
