"""What a model directory is: a language model, a reward model, a classifier, a critic or an adapter.

Each command takes it for that and nothing else.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl.errors import UserError
from verl.regular_file import read

LANGUAGE_MODEL, REWARD_MODEL, CRITIC, ADAPTER = "a language model", "a reward model", "a critic", "a LoRA adapter"
CLASSIFIER = "a classifier"
# What can be done with something that is given where something else is wanted.
USES = {
    LANGUAGE_MODEL: "it goes into model.partial_pretrain",
    REWARD_MODEL: "it goes into reward_model.path of verl ppo",
    CLASSIFIER: "verl eval measures it; the probability of a label is a reward with reward_model.path and reward_model.label of verl ppo",
    CRITIC: "it goes into critic.partial_pretrain of verl ppo",
    ADAPTER: "merge it first with `verl export {path} NEW_DIR`; or train it further with model.partial_pretrain=<its base> "
    "model.lora_adapter_path={path}",
}
GENERATES = (LANGUAGE_MODEL, ADAPTER)  # what can answer questions


def check_kind(path: str, wanted: Sequence[str], *, where: str | None = None) -> None:
    """Check that a local directory is of one of the wanted kinds. What is not here, and a directory without a model, is not checked.

    Args:
        where: the place for the error, such as `model.partial_pretrain=DIR`; None: the path.
    Raises:
        UserError: it is of another kind.
    """
    found = kind_of(path)
    if found is None or found in wanted:
        return
    is_of_other = found.startswith(ADAPTER) and ADAPTER in wanted  # an adapter, but not of a language model
    use = USES.get(found, "").format(path=path)
    fix = f"give {' or '.join(wanted)}{' of a language model' if is_of_other else ''}" + (f"; {use}" if use else "")
    raise UserError(f"is {found}{_architecture(path)}, not {' or '.join(wanted)}", where=where or path, fix=fix)


def kind_of(path: str) -> str | None:
    """Return the kind of a local directory; None if there is no model in it, or its config cannot be read."""
    folder = Path(path).expanduser()
    config = _read(folder / "config.json")
    if config is not None:
        return _kind_of_model(config)
    adapter = _read(folder / "adapter_config.json")
    if adapter is None:
        return None
    task, base = adapter.get("task_type"), adapter.get("base_model_name_or_path")
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        return f"{ADAPTER} of {REWARD_MODEL if task == 'SEQ_CLS' else CRITIC}"
    of_base = kind_of(base) if isinstance(base, str) and base and Path(base).expanduser() != folder else None
    return ADAPTER if of_base in (None, LANGUAGE_MODEL) else f"{ADAPTER} of {of_base}"


def _kind_of_model(config: dict[str, Any]) -> str:
    for name in _names(config):
        if name.endswith("TokenClassification"):
            return CRITIC
        if name.endswith(("SequenceClassification", "ForScore")) or "Reward" in name:
            return CLASSIFIER if name.endswith("SequenceClassification") and _outputs(config) > 1 else REWARD_MODEL
        if name.endswith(("MaskedLM", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction", "ImageClassification")):
            return "a model with another head"
    return LANGUAGE_MODEL


def _outputs(config: dict[str, Any]) -> int:
    """Return the number of labels, as transformers reads it: without any, there are two."""
    labels, number = config.get("id2label"), config.get("num_labels")
    return len(labels) if isinstance(labels, dict) else number if isinstance(number, int) else 2


def _names(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _architecture(path: str) -> str:
    config = _read(Path(path).expanduser() / "config.json")
    names = _names(config) if config is not None else []
    return f" ({', '.join(names)})" if names else ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(read(path, follow=True))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
