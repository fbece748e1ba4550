"""Small values for the sizes of a config, by the names that configs use.

Sizes of one kind that differ in the model differ in the twin, too: code that takes one for the other is then seen.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

WINDOW = 16  # tokens of windows and chunks
POSITIONS = 512  # longer than any document of the proofs, also where a model counts positions from behind the padding's id (RoBERTa)
SHORT_POSITIONS = 48  # where RoPE that depends on the length changes: some documents are shorter, some longer
HIDDEN, HEADS, HEAD = 64, 4, 16

# Small values by the names that configs use. A config's own value counts where it is smaller, or None.
SIZES: dict[str, int] = {
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "num_query_groups"), HEADS),
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "attention_head_dim": HEAD,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "zero_expert_num"), 2),
    **dict.fromkeys(("laurel_rank", "adapter_rank", "hc_lowrank", "gated_norm_rank"), 16),
    "router_hidden_size": 32,
    "o_groups": 2,
    "index_head_dim": HEAD,
    "index_n_heads": 16,  # with few, most scores are 0 after the ReLU, and which of equal ones are the largest is not defined
    "index_topk": WINDOW,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    "linear_num_value_heads": 4,
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
    **dict.fromkeys(("depth", "encoder_layers", "layers", "num_global_layers"), 2),
    "encoder_hash_byte_group_vocab": 509,
    **dict.fromkeys(("alignment_intermediate_size", "projector_hidden_size", "projection_dim"), 96),
    "max_source_positions": POSITIONS,
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
# Widths of hidden states. They are compared over all parts of a config, because a part states the width of another one.
HIDDEN_NAMES = (
    *("hidden_size", "d_model", "n_embd", "embedding_dim", "lru_width", "dim", "ffn_hidden_size_in", "word_embed_proj_dim", "embed_dim"),
    *("emb_dim", "embedding_size", "hidden_size_global", "attention_hidden_size", "text_hidden_size", "out_hidden_size"),
    *("vision_hidden_size", "encoder_hidden_size", "adapter_in_dim", "adapter_out_dim"),
)
HEAD_NAMES: tuple[str, ...] = ("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads", "num_heads")
HEAD_NAMES += ("swa_num_attention_heads", "num_sliding_attention_heads", "num_attention_heads_per_layer")
GROUP_NAMES = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads")
HEAD_SIZES: tuple[str, ...] = ("head_dim", "swa_head_dim", "global_head_dim", "kv_channels", "d_kv", "d_head", "dim_head")
HEAD_SIZES += ("v_head_dim", "swa_v_head_dim", "qk_nope_head_dim")
# Further sizes that are compared in a part of a config: the small value of the smallest one, what each further one has more, and names.
KINDS: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (HEAD, HEAD, ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim")),
    (16, 8, ("q_lora_rank", "kv_lora_rank", "o_lora_rank")),
    (
        96,
        16,
        ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dense_intermediate_size"),
    ),
    (96, 16, ("d_inner", "feed_forward_size", "mlp_dim")),
    (64, 16, ("intermediate_size_mlp", "shared_intermediate_size", "shared_expert_intermediate_size", "dff", "dim_ff")),
    (64, 16, ("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size")),
    (32, 16, ("moe_intermediate_size", "expert_ffn_hidden_size")),
)
# Shares of RoPE's frequencies for time, height and width, where a model's code has them as a default that its config need not state.
SECTIONS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "paddleocr_vl"), (16, 24, 24)),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm_ocr"), (8, 12, 12)),
    "ernie4_5_vl_moe": (22, 22, 20),
}
Small = dict[str, dict[int, int]]  # by a size's name, its small value for each value of the model


def small_hidden_sizes(parts: Iterable[Mapping[str, Any]], of_text: int | None) -> Small:
    """Return the small widths of all parts of a config; that of the language part is HIDDEN."""
    found = {value for part in parts for value in _stated(part, HIDDEN_NAMES)}
    ordered = sorted(found, key=lambda value: (value != of_text, value))
    ladder = _ladder(ordered, HIDDEN, HIDDEN)
    return dict.fromkeys(HIDDEN_NAMES, ladder)


def small_sizes(part: Mapping[str, Any]) -> Small:
    """Return the small values of the other sizes of a part of a config that come in kinds."""
    small: Small = {}
    for first, step, names in KINDS:
        ladder = _ladder(sorted(_stated(part, names)), first, step)
        kept = {value: min(value, size) for value, size in ladder.items()}
        small |= dict.fromkeys(names, kept)
    return small | _head_sizes(part) | _heads(part)


def _head_sizes(part: Mapping[str, Any]) -> Small:
    """Return the small sizes of heads. Where a part of a head is rotated (DeepSeek), `head_dim` may be the size of that part or both."""
    rotated, plain = part.get("qk_rope_head_dim"), _stated(part, ["qk_nope_head_dim"])
    whole = {rotated + size: size for size in plain} if rotated else {}
    is_whole = part.get("head_dim") in (rotated, *whole)
    names = [name for name in HEAD_SIZES if name != "head_dim" or not is_whole]
    small = {value: min(value, size) for value, size in _ladder(sorted(_stated(part, names)), HEAD, HEAD).items()}
    wholes = {both: small[size] + SIZES["qk_rope_head_dim"] for both, size in whole.items()}
    of_head = {rotated: SIZES["qk_rope_head_dim"], **wholes} if is_whole and rotated else small
    return dict.fromkeys(HEAD_SIZES, small) | {"head_dim": of_head, "qk_head_dim": wholes or small}


def _heads(part: Mapping[str, Any]) -> Small:
    """Return the small numbers of heads, and of those of keys and values: one, as many as heads, or some in between, as in the model."""
    counts = sorted(value for value in _stated(part, HEAD_NAMES) if value not in (1, 2))
    heads = _ladder(counts, HEADS, HEADS) | {1: 1, 2: 2}
    between = sorted(value for value in _stated(part, GROUP_NAMES) if value != 1 and value not in heads.keys() - {2})
    groups = {**heads, **{value: 2 if value == between[-1] else 1 for value in between}}
    return dict.fromkeys(HEAD_NAMES, heads) | dict.fromkeys(GROUP_NAMES, groups)


def _ladder(values: Iterable[int], first: int, step: int) -> dict[int, int]:
    return {value: first + step * place for place, value in enumerate(values)}


def _stated(part: Mapping[str, Any], names: Iterable[str]) -> set[int]:
    """Return the values of sizes in a part of a config, also those of single layers."""
    layers = part.get("per_layer_config")
    places = [part, *(layers.values() if isinstance(layers, Mapping) else ())]
    return {value for place in places for name in names for value in _numbers(place.get(name))}


def _numbers(value: Any) -> Iterator[int]:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and not isinstance(number, bool) and number > 0:
            yield number
