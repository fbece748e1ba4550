"""Configurations of model families: transformers' defaults, completed where they lack something, and variants of some."""

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

# Families whose defaults make a model as they are.
PLAIN = """
afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cwm deepseek_v3 deepseek_v32
deepseek_v4 diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text
gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hy_v3 hy_v4 hyperclovax
inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm3 llama llama4_text
longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral
modernbert-decoder mpt nanochat nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe
qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
xglm xlstm youtu zamba zamba2 zaya gemma3 gemma4 qwen3_5 qwen3_5_moe llama4
""".split()

# Families whose defaults lack something, and variants of a family: the model type and what is added.
COMPLETED: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("bamba", {"attn_layer_indices": [1]}),
    "deepseek_v2": ("deepseek_v2", {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "dots1": ("dots1", {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}),
    "granitemoehybrid": ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 16}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 128}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 128, "num_experts": 4, "moe_topk": 2}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8}),
    "ministral": ("ministral", {"head_dim": 128}),
    "nemotron": ("nemotron", {"head_dim": 128, "num_key_value_heads": 8}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, grouped heads": ("llama", {"num_key_value_heads": 8}),
    "llama, rope llama3": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama, rope yarn": (
        "llama",
        {
            "max_position_embeddings": 16384,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096},
        },
    ),
    "llama, rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, rope dynamic": (
        "llama",
        {"max_position_embeddings": 48, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + 0.1 * i for i in range(48)],
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, one after the other": ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8}),
    "qwen3_moe, dense layers": ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 2, "output_router_logits": True}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "mistral, window": ("mistral", {"sliding_window": 4096}),
    "mixtral, jitter": ("mixtral", {"router_jitter_noise": 0.1}),
    "opt, functional dropout": ("opt", {"dropout": 0.1, "attention_dropout": 0.1}),
}
# In `make prove`, within minutes on two cores: each kind of layer, and the families that most people bring.
IN_CI = [
    *(
        "qwen2",
        "qwen3",
        "llama, rope llama3",
        "mistral, window",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "phi3",
        "gpt2",
        "olmo2",
        "granite",
    ),
    *("cohere2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "phimoe", "qwen3_next", "qwen3_5_text", "mamba2", "falcon_h1"),
    *("phi3, longrope", "lfm2"),
]
IN_TESTS = ["gemma2"]  # in `make test`


def families() -> dict[str, Callable[[], PretrainedConfig]]:
    """What makes the config of each family, by its name."""
    made: dict[str, Callable[[], PretrainedConfig]] = {name: CONFIG_MAPPING[name] for name in PLAIN}
    made |= {name: _completed(*parts) for name, parts in COMPLETED.items()}
    return dict(sorted(made.items()))


def _completed(model_type: str, changes: dict[str, Any]) -> Callable[[], PretrainedConfig]:
    return lambda: CONFIG_MAPPING[model_type](**changes)
