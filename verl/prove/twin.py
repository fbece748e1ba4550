"""A tiny twin of an architecture: a few layers of each kind, small sizes, windows and chunks of 16 tokens, and random weights.

The twin is made from the config alone. Everything that changes what a layer computes stays as it is: activations, biases, norms, soft caps,
kinds of layers, experts, RoPE. What only makes it large becomes small. Windows are shorter than the documents that it is proved on.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from verl.errors import UserError
from verl.models.foreign import refuse_path
from verl.prove.plain import whole_class
from verl.prove.sizes import (
    HEAD,
    HEADS,
    HIDDEN,
    LAYERS,
    MIXERS,
    PERIODS,
    SECTIONS,
    SHORT_POSITIONS,
    SIZES,
    Small,
    small_hidden_sizes,
    small_sizes,
)
from verl.prove.tokenizer import PAD, VOCABULARY, byte_tokenizer

MOST_LAYERS = 6
MOST_PARAMETERS = 20_000_000
SCALE = 3.0  # of the random weights: large enough that attention to a wrong token shows in the log-probabilities
RANDOM = re.compile(r"dropout|pdrop|layerdrop|jitter")
PLACES = re.compile(r"_(indexes|indices|idxs)$|^cross_attention_layers$")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "eod_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id")


def write_twin(config: PretrainedConfig, folder: Path, *, seed: int = 1) -> Path:
    """Write a model directory with a tiny twin of a config's architecture: float32 weights, and the byte-level tokenizer.

    Raises:
        UserError: transformers cannot build a model of the config, or verl trains none of its kind.
    """
    tokenizer = byte_tokenizer()
    try:
        model = random_model(twin_config(config, VOCABULARY), seed=seed)
    except UserError:
        raise
    except Exception as error:  # an architecture may need anything
        raise _unbuilt(config, error) from error
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _unbuilt(config: PretrainedConfig, error: Exception) -> UserError:
    """Say why there is no twin: a package is missing, the config itself cannot be built, or a small size is not known."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if isinstance(error, ImportError):
        named = re.search(r"requires the (\S+) library", str(error))
        package = named[1] if named else error.name or "a package that is not installed"
        return UserError(f"{config.model_type} needs {package}: {said}", where="MODEL", fix=f"install {package}, for example with pip")
    if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
        what = f"{config.model_type} is no causal language model of transformers, and no image-text-to-text model"
        return UserError(what, where="MODEL", fix="choose a causal language model, such as Qwen3 or Gemma 3")
    try:
        with torch.device("meta"):
            whole_class(config).from_config(copy.deepcopy(config))
    except Exception as itself:
        why = f"{type(itself).__name__}: {' '.join(str(itself).split())[:200]}"
        what = f"transformers cannot build a {config.model_type} of this config: {why}"
        return UserError(what, where="MODEL", fix="correct the config, or give one of a causal language model")
    what = f"there is no small {config.model_type} yet: {said}"
    return UserError(what, where="MODEL", fix="report it with the config; verl prove --real DIR needs no twin")


def random_model(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """Build a model with random weights, in float32. Matrices are scaled, and vectors such as norms moved, so that each shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = whole_class(config)
        with torch.device("meta"):
            outline = kind.from_config(config, dtype=torch.float32)
        if (size := outline.num_parameters()) > MOST_PARAMETERS:
            name, largest = max(outline.named_parameters(), key=lambda named: named[1].numel())
            raise ValueError(f"it would have {size:,} parameters: what makes {name} {tuple(largest.shape)} is not known")
        model: PreTrainedModel = kind.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(SCALE) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def twin_config(config: PretrainedConfig, vocabulary: int) -> PretrainedConfig:
    """Return the config of the twin. Nothing in it is random, and its routers' loss is off: those have proofs of their own."""
    given = config.to_dict()
    text = config.get_text_config(decoder=True)
    hidden = small_hidden_sizes(_parts(given), getattr(text, "hidden_size", None))
    values = _small(given, vocabulary, hidden)
    settle(values, values)
    for name in ("auto_map", "quantization_config", "torch_dtype", "dtype", "_name_or_path", "transformers_version", "architectures"):
        values.pop(name, None)
    if config.architectures:
        values["architectures"] = config.architectures
    return type(config).from_dict(values)


def randomness(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a config that make training random, such as dropout, where they are not 0."""
    found = {name: value for name, value in values.items() if RANDOM.search(name) and isinstance(value, float) and value > 0}
    return {name: value for name, value in found.items() if "classifier" not in name and "summary" not in name}


def settle(values: dict[str, Any], whole: Mapping[str, Any]) -> None:
    """Switch off what is random and the routers' loss, in place.

    Args:
        values: those of a config.json.
        whole: those of the same config with its defaults.
    """
    values.update(dict.fromkeys(randomness(whole), 0.0))
    if whole.get("output_router_logits"):
        values["output_router_logits"] = False
    for name, part in whole.items():
        if _is_part(name, part):
            stated = values.get(name) or ({"model_type": part["model_type"]} if part.get("model_type") else {})
            before = dict(stated)
            settle(stated, part)
            if stated != before:
                values[name] = stated


def _parts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config's values and those of its parts."""
    yield values
    for name, value in values.items():
        if _is_part(name, value):
            yield from _parts(value)


def _is_part(name: str, value: Any) -> bool:
    """Return whether a value is the config of a part, such as the language part or the vision part."""
    return isinstance(value, dict) and name.endswith("_config") and name != "per_layer_config"


def _small(values: Mapping[str, Any], vocabulary: int, hidden: Small) -> dict[str, Any]:
    """Return a config's values, and those of its parts, made small."""
    sizes = hidden | small_sizes(values)  # `hidden` may have those of the whole, too
    small = {name: _value(name, value, vocabulary, sizes) for name, value in copy.deepcopy(dict(values)).items()}
    if values.get("model_type") == "mamba2":  # its heads have the names of attention heads
        small["num_heads"] = 2 * HIDDEN // HEAD
    _few_layers(values, small, sizes)
    _fit(values, small)
    return small


def _value(name: str, value: Any, vocabulary: int, sizes: Small) -> Any:
    if name in TOKENS and value is not None:
        return PAD if name == "pad_token_id" else PAD + 2 if name == "eos_token_id" else PAD + 1
    if name in ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"):
        return vocabulary
    if isinstance(value, Mapping) and ("model_type" in value or name.endswith("_config")) and name != "per_layer_config":
        return _small(value, vocabulary, sizes)
    if isinstance(value, list) and name in sizes:
        return [_value(name, each, vocabulary, sizes) for each in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name in sizes:
        return sizes[name].get(value, value)
    if name in SIZES:
        return min(value, SIZES[name]) if value > 0 else value
    return min(value, PERIODS[name]) if name in PERIODS else value


def _rope(value: Mapping[str, Any], head: int) -> dict[str, Any]:
    """Return RoPE settings for short documents; lists of factors get the length of half a head."""
    small: dict[str, Any] = {name: _rope(part, head) if isinstance(part, Mapping) else part for name, part in value.items()}
    for name in ("short_factor", "long_factor"):
        if small.get(name):
            small[name] = small[name][: int(head * (value.get("partial_rotary_factor") or 1.0)) // 2]
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = SHORT_POSITIONS
    if sections := small.get("mrope_section"):
        small["mrope_section"] = _shared_out(sections, int(head * (value.get("partial_rotary_factor") or 1.0)) // 2)
    return small


def _shared_out(sections: Sequence[int], total: int) -> list[int]:
    """Return sections of the same shares with another total."""
    whole = sum(sections)
    ends = [round(total * sum(sections[: place + 1]) / whole) for place in range(len(sections))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _few_layers(values: Mapping[str, Any], small: dict[str, Any], sizes: Small) -> None:
    """Keep as few layers as show each kind, and cut every list that has an entry for each layer."""
    for key in LAYERS:
        layers = values.get(key)
        if not isinstance(layers, int) or layers < 1:
            continue
        lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == layers and layers > 1}
        kept = _kinds(list(zip(*lists.values(), strict=True))) if lists else list(range(min(layers, 4)))
        for name in lists:
            small[name] = [small[name][i] for i in kept]
        if isinstance(settings := small.get("per_layer_config"), Mapping):  # by the layer's number
            small["per_layer_config"] = {
                number: _of_layer(settings, layer, sizes) for number, layer in enumerate(kept) if _of_layer(settings, layer, sizes)
            }
        small |= {name: len(kept) for name in LAYERS if values.get(name) == layers}  # xLSTM has two names for one number
        return


def _of_layer(settings: Mapping[Any, Any], layer: int, sizes: Small) -> dict[str, Any]:
    """Return the settings of one layer, made small; the numbers may be texts."""
    found = next((part for number, part in settings.items() if int(number) == layer), None)
    return {name: _value(name, value, 0, sizes) for name, value in (found or {}).items()}


def _kinds(rows: list[tuple[Any, ...]]) -> list[int]:
    """Return the indices of the first two layers of each kind, or the first one where there are many kinds."""
    places: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(repr(row), []).append(index)
    each = 2 if 2 * len(places) <= MOST_LAYERS else 1
    kept = [index for found in places.values() for index in found[:each]]
    return sorted(kept[:MOST_LAYERS] if len(kept) > 1 else [0, 1][: len(rows)])


def _fit(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Make sizes agree that depend on each other."""
    heads = next((small[name] for name in ("num_attention_heads", "n_head", "n_heads") if small.get(name)), HEADS)
    hidden = small.get("hidden_size") or HIDDEN
    if values.get("head_dim") and values.get("hidden_size") == values["head_dim"] * (values.get("num_attention_heads") or 0):
        small["head_dim"] = hidden // heads  # some code takes one for the other
    head = small.get("qk_rope_head_dim") or small.get("head_dim") or hidden // heads
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), Mapping):
            sections = SECTIONS.get(str(values.get("model_type")).removesuffix("_text"))
            small[name] = _rope(({"mrope_section": sections} if sections else {}) | values[name], head)
    if values.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = SHORT_POSITIONS
    if values.get("attention_head_dim"):  # Zamba: attention reads two hidden states side by side
        small["attention_hidden_size"], small["attention_head_dim"] = 2 * HIDDEN, 2 * HIDDEN // HEADS
    if values.get("qk_dim_factor"):  # xLSTM: its cache has these widths in multiples of 64, its layers as they are
        small["qk_dim_factor"], small["v_dim_factor"] = 1.0, 2.0
    if values.get("hybrid_layer_ids"):  # Zamba2: the layers that have attention, too
        small["hybrid_layer_ids"] = [i for i, kind in enumerate(small.get("layers_block_type") or []) if kind == "hybrid"]
    _fit_mixers(small)
    _fit_places(small)


def _fit_places(small: dict[str, Any]) -> None:
    """Make lists of layers, such as those whose outputs a vision part gives, name layers that are there."""
    layers = next((small[name] for name in (*LAYERS, "depth") if isinstance(small.get(name), int)), None)
    for name, places in small.items():
        if PLACES.search(name) and isinstance(places, list) and layers:
            small[name] = [place for place in places if place < layers] or [layers - 1]
        elif name == "vision_feature_layer":  # of another part, from its end
            one = isinstance(places, int)
            few = [place if place < 0 else -1 - number for number, place in enumerate([places] if one else places or [])]
            small[name] = few[0] if one else few


def _fit_mixers(small: dict[str, Any]) -> None:
    """Make the heads of state-space mixers fill their inner width."""
    for expand in ("mamba_expand", "expand"):
        if small.get(expand):
            small[expand] = 2
    for heads, size in MIXERS:
        if isinstance(small.get(heads), int) and isinstance(small.get(size), int):
            small[heads], small[size] = 2 * HIDDEN // HEAD, HEAD


def read_config(path: str) -> PretrainedConfig:
    """Read the config of a directory, a Hub name, or a config.json alone.

    Raises:
        UserError: there is none, or transformers does not know its model.
    """
    from verl.models.load import loading, resolve

    local = Path(path).expanduser()
    if not (local.is_file() and local.suffix == ".json") and not (local / "config.json").is_file():
        refuse_path(path)
    source = str(local) if local.is_file() else resolve(path)
    with loading("model", path):
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    return config
