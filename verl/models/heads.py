"""Models with a head of their own: critics, reward models and classifiers.

A critic is saved as a token classification model with one label, a reward model as a sequence classification model with one label, and a
classifier as one with a label for each output: `AutoModelForTokenClassification` and `AutoModelForSequenceClassification` load them.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from verl.errors import UserError
from verl.models.attention.packed import PACKED
from verl.models.load import Loaded, find_saved_dtypes, language_class, loading, read_config, resolve, restore_stated_dtype
from verl.models.shards import load_without_values


def load_critic(
    path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    values: bool = True,
    attention: str = PACKED,
) -> Loaded:
    """Load a critic for a ValueScorer: a saved one, or a causal language model with a head of zeros.

    Args:
        values: whether to read the weights; false leaves them on the meta device for sharding, if `load_without_values` supports the
            files.
        attention: name of the attention implementation in transformers.
    Raises:
        UserError: no such model, or transformers has no token classification model of the architecture.
    """
    return _load(AutoModelForTokenClassification, path, device, dtype, trust_remote_code, values, attention, 1)


def load_reward_model(
    path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    values: bool = True,
    attention: str = PACKED,
    labels: int = 1,
) -> Loaded:
    """Load a reward model for a RewardScorer: a saved one, or a causal language model with a head of zeros.

    With `trust_remote_code` it may be any model whose code has a module `score` that maps hidden states to one number.

    Args:
        values, attention: same as in `load_critic`.
        labels: number of the head's outputs; with several, the model is a classifier for a LabelScorer.
    Raises:
        UserError: no such model, or it has another number of labels.
    """
    return _load(AutoModelForSequenceClassification, path, device, dtype, trust_remote_code, values, attention, labels)


def has_head(path: str, *, trust_remote_code: bool = False) -> bool:
    """Return whether a model on disk has a head other than a language model's.

    Raises:
        UserError: no such model.
    """
    architectures = read_config(path, trust_remote_code=trust_remote_code).architectures or ["ForCausalLM"]
    return not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


def _load(
    kind: Any, path: str, device: torch.device | str, dtype: torch.dtype, trusted: bool, values: bool, attention: str, labels: int
) -> Loaded:
    source, config = resolve(path), read_config(path, trust_remote_code=trusted)
    if language_class(config) is not AutoModelForCausalLM:
        what, fix = "has parts for pictures, which a critic or a reward model would train too", "choose a language model without them"
        raise UserError(what, where=path, fix=fix)
    if type(config) not in kind._model_mapping:
        if not (trusted and "AutoModel" in getattr(config, "auto_map", {})):
            fix = "choose a model such as Qwen2, Qwen3, Llama or Mistral"
            raise UserError(f"transformers has no {config.model_type} model with a classification head", where=path, fix=fix)
        kind = AutoModel
    if any(name.endswith("Classification") for name in config.architectures or []) and config.num_labels != labels:
        fix = "give a model with one label (num_labels=1), whose score is one number" if labels == 1 else "give a model with these labels"
        raise UserError(f"has {config.num_labels} labels, expected {'one' if labels == 1 else labels}", where=path, fix=fix)
    if not values and kind is not AutoModel:
        options: dict[str, Any] = {"trust_remote_code": trusted, "attention": attention, "labels": labels}
        loaded = load_without_values(path, dtype=dtype, kind=kind, head=head_of, **options)
        if loaded is not None:
            _remove_dropout(loaded.model)
            return loaded
    options = {} if kind is AutoModel else {"num_labels": labels}
    with loading("model", path):
        model, report = kind.from_pretrained(
            source,
            dtype=dtype,
            device_map=str(device),
            trust_remote_code=trusted,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    _remove_dropout(model)
    _start_at_zero(model, set(report["missing_keys"]), path)
    saved_dtypes = find_saved_dtypes(model, source, keeps=False)
    restore_stated_dtype(model, path, saved_dtypes, trust_remote_code=trusted)
    return Loaded(model, saved_dtypes)


def _remove_dropout(model: PreTrainedModel) -> None:
    """Remove the head's dropout, because the scorers call the head without it."""
    if hasattr(model, "dropout"):
        model.dropout = nn.Identity()


def _start_at_zero(model: PreTrainedModel, missing: set[str], path: str) -> None:
    """Set a head that is missing in the files to zero. All values are then 0, and the first advantages are the rewards themselves."""
    head = {id(parameter) for parameter in head_of(model).parameters()}
    for name, parameter in model.named_parameters():
        if name not in missing:
            continue
        if id(parameter) not in head:
            raise UserError(f"weight {name} is missing", where=path, fix="give a complete model directory")
        nn.init.zeros_(parameter)


def head_of(model: PreTrainedModel) -> nn.Module:
    """Return the head of a critic, a reward model or a classifier. Raises UserError if it has none."""
    for name in ("score", "classifier"):
        if isinstance(head := getattr(model, name, None), nn.Module):
            return head
    raise UserError(f"{type(model).__name__} has no module `score`", fix="choose a model such as Qwen2, Qwen3, Llama or Mistral")
