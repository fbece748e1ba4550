"""Tiny twins: models of the same architecture with random weights, small enough to run in a fraction of a second on a CPU.

What depends on the length of a text (windows, chunks, sparse attention, limits of rotary embeddings) is made short, so that a short text
shows what the model does with a long one.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PretrainedConfig, PreTrainedModel

from verl.models.load import numel

SHORT = 8  # tokens of every window and chunk of a twin
SMALL = 4_000_000  # weights of a model that is its own twin, about
LARGEST = 300_000_000  # weights of the largest twin that is tried
VOCABULARY, EXPERTS, KINDS = 1024, 4, 8  # a list by layer with more kinds than this has numbers of layers
# Numbers of tokens in configs. Other numbers with these words count layers.
TOKENS = re.compile(r"window|attention_chunk|attn_chunk|local_attention|index_topk|index_block|rel_extent|floor|original_max_position")
NO_TOKENS = re.compile(r"layer|pattern|prob|type|num_|use_")
FEED_FORWARD = dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "ffn_dim", "n_inner"), 96) | dict.fromkeys(
    ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 32
)
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 4, "head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 16}
LATENT = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16}
NARROW = {"hidden_size": 64} | ATTENTION | LATENT
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
GROUPS = ("n_group", "topk_group", "num_expert_group")


def twin_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield configs of twins, the one to try first first. Not each of them may be valid for the architecture."""
    changes: list[Callable[[Any], None]] = [_narrow, _with_few_experts, keep_few_layers, _with_short_windows]
    if _is_small(config.get_text_config(decoder=True)):
        yield changed(config, _with_short_windows)
    for first in range(len(changes) - 1):
        yield changed(config, *changes[first:])


def _is_small(text: Any) -> bool:
    width, layers = getattr(text, "hidden_size", 0) or 0, getattr(text, "num_hidden_layers", 0) or 0
    return bool(width * (text.vocab_size + 12 * layers * width) <= SMALL)


def random_model(make: Callable[[PretrainedConfig], PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model in evaluation mode on the CPU, with weights large enough that a wrong token shows in the logits.

    The random state of the process does not change.

    Args:
        make: builds the model from the config.
    Raises:
        ValueError: the model is too large.
    """
    with torch.device("meta"):
        size = sum(numel(parameter) for parameter in make(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"a twin of {size:,} weights is too large to be tried")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = make(copy.deepcopy(config))  # building a model completes its config
            model.to(dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(4)
                    elif not parameter.any():  # a bias, or a sink
                        parameter.normal_()
    finally:
        torch.set_default_dtype(before)
    return model.eval()  # type: ignore[no-any-return]


def changed(config: PretrainedConfig, *changes: Callable[[Any], None]) -> PretrainedConfig:
    """Return a copy of a config whose text part is changed, with what single layers have of their own in proportion."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    overrides, before = _take_overrides(text), dict(vars(text))
    for change in changes:
        change(text)
    for part in (getattr(config, name, None) for name in config.sub_configs):
        if part is not None and part is not text:
            _keep_one_layer(part)
    if overrides:
        kept = {int(layer): values for layer, values in overrides.items() if int(layer) < text.num_hidden_layers}
        text.per_layer_config = {
            layer: {name: _in_proportion(name, value, before, text) for name, value in values.items()} for layer, values in kept.items()
        }
    return config


def _keep_one_layer(part: Any) -> None:
    """Make a vision or audio part small: it is built with the model, and then left out."""
    for name in ("num_hidden_layers", "depth", "num_layers", "encoder_layers"):
        if isinstance(layers := vars(part).get(name), int) and layers > 1:
            setattr(part, name, 1)


def _take_overrides(text: Any) -> dict[Any, dict[str, Any]]:
    """Remove what single layers have in place of the config's values, and return it by the number of the layer.

    With it, transformers raises an error when such a value is read from the config.
    """
    overrides: dict[Any, dict[str, Any]] = text.to_dict().get("per_layer_config") or {}
    if overrides:
        text.per_layer_config = None
    return overrides


def _in_proportion(name: str, value: Any, before: dict[str, Any], text: Any) -> Any:
    """Return a layer's own value, changed as the config's value of that name is."""
    if _is_long(name, value):
        return SHORT
    whole, now = before.get(name), getattr(text, name, None)
    numbers = all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in (value, whole, now))
    return max(1, value * now // whole) if numbers else value


def _with_short_windows(text: Any) -> None:
    positions = getattr(text, "max_position_embeddings", None)
    for name, value in list(vars(text).items()):
        if isinstance(value, dict):
            _shorten(value)
        elif _is_long(name, value):
            setattr(text, name, SHORT)
    rope = getattr(text, "rope_parameters", None)
    types = [rope, *rope.values()] if isinstance(rope, dict) else []
    if positions is not None and any(isinstance(each, dict) and each.get("rope_type") == "dynamic" for each in types):
        text.max_position_embeddings = SHORT


def _shorten(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _shorten(value)
        elif _is_long(name, value):
            values[name] = SHORT


def _is_long(name: Any, value: Any) -> bool:
    named = isinstance(name, str) and TOKENS.search(name) is not None and NO_TOKENS.search(name) is None
    return named and isinstance(value, int) and not isinstance(value, bool) and value > SHORT


def keep_few_layers(text: Any) -> None:
    """Keep the first layers, such that each kind of layer is among them."""
    layers = text.num_hidden_layers
    by_layer = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == layers}
    kinds = {name: value for name, value in by_layer.items() if len(set(map(str, value))) <= KINDS}
    kept = min(layers, max([2, *(1 + value.index(kind) for value in kinds.values() for kind in value)]))
    period = max(
        [kept, *(value for name, value in vars(text).items() if name.endswith(("_period", "_interval")) and isinstance(value, int))]
    )
    kept = min(layers, period)
    if shared := min(getattr(text, "num_kv_shared_layers", None) or 0, layers - kept, 1):  # the last ones read the keys of earlier ones
        kept += shared
        text.num_kv_shared_layers = shared
    elif getattr(text, "num_kv_shared_layers", None):
        text.num_kv_shared_layers = 0
    for name, value in by_layer.items():
        setattr(text, name, value[:kept] if name in kinds else [number for number in value if number < kept])
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if getattr(text, name, 0):
            setattr(text, name, min(1, kept - 1))
    text.num_hidden_layers = kept
    if getattr(text, "num_blocks", None) == layers:  # another name for it (xLSTM)
        text.num_blocks = kept
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if isinstance(size := getattr(text, name, None), int) and size > VOCABULARY:
            setattr(text, name, VOCABULARY)
    if text.vocab_size == VOCABULARY:
        drop_token_ids(text)


def drop_token_ids(text: Any) -> None:
    """Change ids that a small vocabulary may lack: those of padding, start and end to 0, others to None where the config allows it."""
    for name in [name for name in vars(text) if name.endswith("_token_id")]:
        if name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, name, None if getattr(text, name) is None else 0)
        else:
            with suppress(StrictDataclassFieldValidationError):
                setattr(text, name, None)


def _with_few_experts(text: Any) -> None:
    for name in EXPERT_COUNTS:
        if isinstance(count := getattr(text, name, None), int) and count > EXPERTS:
            setattr(text, name, max(EXPERTS, 2 * (getattr(text, "num_experts_per_tok", None) or 1)))
    for name in GROUPS:
        if getattr(text, name, None):
            setattr(text, name, 1)
    for name, small in FEED_FORWARD.items():
        if isinstance(size := getattr(text, name, None), int) and size > small:
            setattr(text, name, small)


def _narrow(text: Any) -> None:
    before = getattr(text, "head_dim", None) or text.hidden_size // (getattr(text, "num_attention_heads", None) or 1)
    ropes = (getattr(text, "rope_parameters", None), getattr(text, "rope_scaling", None))
    for rope in {id(rope): rope for rope in ropes}.values():  # two names for one, in recent releases
        for name in ("short_factor", "long_factor"):
            if isinstance(rope, dict) and isinstance(rope.get(name), list):
                rope[name] = rope[name][: len(rope[name]) * NARROW["head_dim"] // before]
        if isinstance(rope, dict) and isinstance(sections := rope.get("mrope_section"), list) and NARROW["head_dim"] < before:
            rope["mrope_section"] = _shares(sections, sum(sections) * NARROW["head_dim"] // before)
    equal = getattr(text, "num_attention_heads", None) == getattr(text, "num_key_value_heads", None)
    narrow = NARROW | {"num_key_value_heads": NARROW["num_attention_heads"]} if equal else NARROW
    if getattr(text, "embedding_dim", None) == text.hidden_size:  # another name for it (xLSTM)
        narrow = narrow | {"embedding_dim": NARROW["hidden_size"]}
    for name, small in narrow.items():
        if isinstance(size := getattr(text, name, None), int) and size > small:
            setattr(text, name, small)


def _shares(parts: list[int], whole: int) -> list[int]:
    """Return numbers in proportion to these, with another sum."""
    shares = [part * whole // sum(parts) for part in parts]
    return [shares[0] + whole - sum(shares), *shares[1:]]
