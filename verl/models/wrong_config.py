"""What is wrong in a local config.json, by the error that transformers raises with it: the key and its value, in one line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from verl.errors import UserError
from verl.models.implementations import stated_ones_ignored
from verl.models.multimodal import language_part

STRICT = (StrictDataclassFieldValidationError, StrictDataclassClassValidationError)


def explain(path: str, error: Exception) -> UserError | None:
    """Return the UserError for an exception that transformers raised; None if it is not one of the config.json of this local model.

    Args:
        path: model directory, or its config.json.
    """
    file = Path(path).expanduser()
    file = file if file.name == "config.json" else file / "config.json"
    if not file.is_file() or not (isinstance(error, STRICT) or _is_raised_again(file.parent, error)):
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        what, fix = _reason(error, found if isinstance(found, dict) else {})
    except (OSError, ValueError):
        return None
    return UserError(what, where=str(file), fix=fix)


def _is_raised_again(folder: Path, error: Exception) -> bool:
    """Return whether the config alone, without weights and tokenizer, raises the same."""
    try:
        with stated_ones_ignored(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            kind: Any = (language_part(config) if config.sub_configs else None) or AutoModelForCausalLM
            kind.from_config(config)
    except Exception as again:  # as of any code of a model
        return type(again) is type(error) and str(again) == str(error)
    return False


def _reason(error: Exception, config: dict[str, Any]) -> tuple[str, str]:
    """Return what is wrong, and the fix."""
    values, told, known = dict(_flat(config)), one_line(error), f"transformers {transformers.__version__}"
    if isinstance(error, StrictDataclassFieldValidationError):
        [field] = re.findall(r"field '(\w+)'", str(error)) or [""]
        key = next((key for key in values if key.rpartition(".")[2] == field), field)
        expected = re.search(r"expected (.+?), got", told)
        is_clear = expected is not None and key in values
        return f"{key} is {_shown(values[key])}, expected {expected[1]}" if is_clear and expected else told, f"correct {key}"
    if "Should have a `model_type` key" in told:
        return "has no model_type, by which transformers knows the architecture", "add model_type, as in the config.json of the original"
    if "model type" in told and "does not recognize" in told:
        fix = "correct model_type; if the model is newer than that, install a newer transformers"
        return f"model_type is {_shown(values.get('model_type'))}, which {known} does not know", fix
    if "Padding_idx" in told and "pad_token_id" in values and "vocab_size" in values:
        what = f"pad_token_id is {values['pad_token_id']}, which is not within vocab_size {values['vocab_size']}"
        return what, "correct vocab_size or pad_token_id"
    named = error.args[0] if isinstance(error, KeyError) and error.args else None
    if keys := [key for key, value in values.items() if named is not None and value == named]:
        return f"{keys[0]} is {_shown(named)}, which {known} does not know", f"correct {keys[0]}"
    if "NoneType" in told and (keys := _wrongly_null(config, values)):
        return f"{' and '.join(f'{key} is null' for key in keys)}, with which its code fails ({told})", f"correct {' and '.join(keys)}"
    keys = [key for key in dict.fromkeys(re.findall(r"`(\w+)`", told)) if key in config]
    return f"no model can be built from it: {told}", f"correct {' or '.join(keys or ['the key that it names'])}"


def one_line(error: Exception) -> str:
    """Return what an exception says, in a line with its type. Where transformers checks a config, the reason stands in the second line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, STRICT) and len(lines) > 1:
        return re.sub(r"^\w+Error: ", "", " ".join(lines[1:]))
    if isinstance(error, KeyError) and error.args and " " in str(error.args[0]):
        return str(error.args[0])
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}" if lines else type(error).__name__


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a config with its key; those inside others as `rope_parameters.rope_type`."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _wrongly_null(config: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Return the keys that are null, and not so in the defaults of this model type."""
    kind = str(config.get("model_type"))
    usual = dict(_flat(CONFIG_MAPPING[kind]().to_dict())) if kind in CONFIG_MAPPING else {}
    return [key for key, value in values.items() if value is None and usual.get(key, 0) is not None and key != "architectures"]


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
