"""A tiny twin of an architecture: a few layers of each kind, small sizes, windows and chunks of 16 tokens, and random weights.

The twin is made from the config alone. Everything that changes what a layer computes stays as it is: activations, biases, norms, soft caps,
kinds of layers, experts, RoPE. What only makes it large becomes small. Windows are shorter than the documents that it is proved on.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from verl.errors import UserError
from verl.models.foreign import refuse_path
from verl.prove.tokenizer import PAD, VOCABULARY, byte_tokenizer

WINDOW = 16  # tokens of windows and chunks
POSITIONS = 256  # longer than any document of the proofs
SHORT_POSITIONS = 48  # where RoPE that depends on the length changes: some documents are shorter, some longer
HIDDEN, HEADS, HEAD = 64, 4, 16
MOST_LAYERS = 6
MOST_PARAMETERS = 20_000_000
SCALE = 3.0  # of the random weights: large enough that attention to a wrong token shows in the log-probabilities

# Small values by the names that configs use. A config's own value counts where it is smaller, or None.
SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_dim", "lru_width", "dim", "ffn_hidden_size_in", "word_embed_proj_dim"), HIDDEN
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads", "num_heads", "swa_num_attention_heads"),
        HEADS,
    ),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "num_query_groups"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "kv_channels", "d_kv", "v_head_dim", "qk_nope_head_dim"), HEAD),
    "qk_rope_head_dim": 8,
    "qk_head_dim": HEAD + 8,
    "rotary_dim": 8,
    "attention_hidden_size": HIDDEN,
    "attention_head_dim": HEAD,
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dense_intermediate_size"), 96
    ),
    **dict.fromkeys(("intermediate_size_mlp", "shared_intermediate_size", "shared_expert_intermediate_size", "dff", "dim_ff"), 64),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "zero_expert_num"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank", "hc_lowrank", "gated_norm_rank"), 16),
    "router_hidden_size": 32,
    "o_groups": 2,
    "index_head_dim": HEAD,
    "index_n_heads": 16,  # with few, most scores are 0 after the ReLU, and which of equal ones are the largest is not defined
    "index_topk": WINDOW,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD),
    "mamba_d_ssm": 2 * HIDDEN,
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_chunk_size", "block_size"), WINDOW),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length"), POSITIONS),
    "max_target_positions": POSITIONS,
    "floor_scale": 32,
    "log_scaling_n_floor": 32,
    "hidden_size_per_layer_input": 16,
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 97,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 1,
    "num_mem_blocks": 1,
    "num_kv_shared_layers": 2,
    "rel_extent": WINDOW,
    "d_rel": 8,
    "block_multiple_of": 16,
    "image_size": 32,
    "patch_size": 16,
    "num_mel_bins": 16,
    "depth": 2,
    "out_hidden_size": HIDDEN,
}
# Numbers of layers, and what says where a kind of layer begins or comes again; the config's own value counts where it is smaller.
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "num_layers_per_stack",
)
PERIODS: dict[str, int] = {
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "prefix_dense_sliding_window_pattern"), 1),
    **dict.fromkeys(("max_window_layers",), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "interleave_moe_layer_step", "sliding_window_pattern"), 2),
    **dict.fromkeys(("global_attn_every_n_layers", "no_rope_layer_interval", "layer_group_size", "_sliding_window_pattern"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "n_layers_per_attn_res_block"), 1),
    "moe_layer_end_index": 3,
    "rescale_every": 2,
}
# Heads of state-space mixers and their size.
MIXERS = (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"), ("n_mamba_heads", "mamba_headdim"))
RANDOM = re.compile(r"dropout|pdrop|layerdrop|jitter")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "eod_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id")


def write_twin(config: PretrainedConfig, folder: Path, *, seed: int = 1) -> Path:
    """Write a model directory with a tiny twin of a config's architecture: float32 weights, and the byte-level tokenizer.

    Raises:
        UserError: transformers cannot build a model of the config.
    """
    tokenizer = byte_tokenizer()
    small = twin_config(config, VOCABULARY)
    try:
        model = random_model(small, seed=seed)
    except Exception as error:  # an architecture may need anything
        what = f"transformers cannot build a small {config.model_type}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(what, where="MODEL", fix="report it with the config; verl prove --real MODEL needs no twin") from error
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_model(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """Build a model with random weights, in float32. Matrices are scaled, and vectors such as norms moved, so that each shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config, dtype=torch.float32).num_parameters()
        if size > MOST_PARAMETERS:
            raise ValueError(f"the twin has {size:,} parameters: a size of this architecture is not known")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(SCALE) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def twin_config(config: PretrainedConfig, vocabulary: int) -> PretrainedConfig:
    """Return the config of the twin. Nothing in it is random, and its routers' loss is off: those have proofs of their own."""
    values = _small(config.to_dict(), vocabulary)
    for part in _parts(values):
        part.update(dict.fromkeys(randomness(part), 0.0))
        if "output_router_logits" in part:
            part["output_router_logits"] = False
    for name in ("auto_map", "quantization_config", "torch_dtype", "dtype", "_name_or_path", "transformers_version", "architectures"):
        values.pop(name, None)
    if config.architectures:
        values["architectures"] = config.architectures
    return type(config).from_dict(values)


def randomness(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a config that make training random, such as dropout, where they are not 0."""
    found = {name: value for name, value in values.items() if RANDOM.search(name) and isinstance(value, float) and value > 0}
    return {name: value for name, value in found.items() if "classifier" not in name and "summary" not in name}


def _parts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config's values and those of its parts."""
    yield values
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config") and name != "per_layer_config":
            yield from _parts(value)


def _small(values: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Return a config's values, and those of its parts, made small."""
    small = {name: _value(name, value, vocabulary) for name, value in copy.deepcopy(dict(values)).items()}
    if values.get("model_type") == "mamba2":  # its heads have the names of attention heads
        small["num_heads"] = 2 * HIDDEN // HEAD
    _few_layers(values, small)
    _fit(values, small)
    return small


def _value(name: str, value: Any, vocabulary: int) -> Any:
    if name in TOKENS and value is not None:
        return PAD if name == "pad_token_id" else PAD + 2 if name == "eos_token_id" else PAD + 1
    if name in ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"):
        return vocabulary
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
        return _rope(value)
    if isinstance(value, Mapping) and ("model_type" in value or name.endswith("_config")):
        return _small(value, vocabulary)
    if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
        return min(value, SIZES[name]) if value > 0 else value
    if name in PERIODS and isinstance(value, int) and not isinstance(value, bool):
        return min(value, PERIODS[name])
    return value


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE settings for short documents; lists of factors get the length of half a head."""
    small: dict[str, Any] = {name: _rope(part) if isinstance(part, Mapping) else part for name, part in value.items()}
    for name in ("short_factor", "long_factor"):
        if small.get(name):
            small[name] = small[name][: int(HEAD * (value.get("partial_rotary_factor") or 1.0)) // 2]
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = SHORT_POSITIONS
    return small


def _few_layers(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Keep as few layers as show each kind, and cut every list that has an entry for each layer."""
    for key in LAYERS:
        layers = values.get(key)
        if not isinstance(layers, int) or layers < 1:
            continue
        lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == layers and layers > 1}
        kept = _kinds(list(zip(*lists.values(), strict=True))) if lists else list(range(min(layers, 4)))
        for name, value in lists.items():
            small[name] = [value[i] for i in kept]
        if isinstance(settings := small.get("per_layer_config"), Mapping):  # by the layer's number
            small["per_layer_config"] = {
                number: _of_layer(settings, layer) for number, layer in enumerate(kept) if _of_layer(settings, layer)
            }
        small[key] = len(kept)
        return


def _of_layer(settings: Mapping[Any, Any], layer: int) -> dict[str, Any]:
    """Return the settings of one layer, made small; the numbers may be texts."""
    found = next((part for number, part in settings.items() if int(number) == layer), None)
    return {name: _value(name, value, 0) for name, value in (found or {}).items()}


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
    heads = next((name for name in ("num_attention_heads", "n_head", "n_heads") if values.get(name)), None)
    for groups in ("num_key_value_heads", "num_kv_heads"):
        if heads and values.get(groups):
            small[groups] = _groups(values[heads], values[groups])
    if values.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = SHORT_POSITIONS
    if values.get("head_dim") and values.get("head_dim") == values.get("qk_rope_head_dim"):  # DeepSeek: that of the rotated part
        small["head_dim"] = small["qk_rope_head_dim"]
    if values.get("attention_head_dim"):  # Zamba: attention reads two hidden states side by side
        small["attention_hidden_size"], small["attention_head_dim"] = 2 * HIDDEN, 2 * HIDDEN // HEADS
    if values.get("hybrid_layer_ids"):  # Zamba2: the layers that have attention, too
        small["hybrid_layer_ids"] = [i for i, kind in enumerate(small.get("layers_block_type") or []) if kind == "hybrid"]
    _fit_mixers(small)


def _fit_mixers(small: dict[str, Any]) -> None:
    """Make the heads of state-space mixers fill their inner width."""
    for expand in ("mamba_expand", "expand"):
        if small.get(expand):
            small[expand] = 2
    for heads, size in MIXERS:
        if isinstance(small.get(heads), int) and isinstance(small.get(size), int):
            small[heads], small[size] = 2 * HIDDEN // HEAD, HEAD


def _groups(heads: int, groups: int) -> int:
    """Return the key and value heads of the twin: one, as many as heads, or some in between, as in the model."""
    return 1 if groups == 1 else HEADS if groups == heads else 2


def read_config(path: str) -> PretrainedConfig:
    """Read the config of a directory, a Hub name, or a config.json alone.

    Raises:
        UserError: there is none, or transformers does not know its model.
    """
    from verl.models.load import loading

    local = Path(path).expanduser()
    if not (local.is_file() and local.suffix == ".json") and not (local / "config.json").is_file():
        refuse_path(path)
    with loading("model", path):
        config: PretrainedConfig = AutoConfig.from_pretrained(local if local.exists() else path)
    return config
