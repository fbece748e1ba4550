"""Small checkpoints with vision parts, as transformers writes them, with a tokenizer and the files of a processor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from verl.models.tiny import tiny_tokenizer

VOCABULARY = 448
IDS = {"image_token_id": 440, "video_token_id": 441, "vision_start_token_id": 442, "vision_end_token_id": 443}
TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=0,
)  # fmt: skip
TOWER: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
QWEN_TOWER: dict[str, Any] = dict(depth=1, hidden_size=16, num_heads=2, patch_size=14, intermediate_size=24)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
LINEAR: dict[str, Any] = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4
)
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma3": lambda: _config(
        "gemma3", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, TOWER, mm_tokens_per_image=4,
        image_token_index=440, boi_token_index=441, eoi_token_index=442,
    ),
    "qwen2_5_vl": lambda: _config(
        "qwen2_5_vl", {"rope_parameters": ROPE, "tie_word_embeddings": False},
        {**QWEN_TOWER, "out_hidden_size": 32, "fullatt_block_indexes": [0]}, **IDS,
    ),
    "qwen3_vl_moe": lambda: _config(
        "qwen3_vl_moe", {**EXPERTS, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        {**QWEN_TOWER, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}, **IDS,
    ),
    "qwen3_5": lambda: _config(
        "qwen3_5",
        {**LINEAR, "layer_types": ["linear_attention", "full_attention"], "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        {**QWEN_TOWER, "out_hidden_size": 32, "num_position_embeddings": 4}, **IDS,
    ),
    "llama4": lambda: _config(
        "llama4", {**EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 8, "num_experts_per_tok": 1},
        {**TOWER, "intermediate_size": 64, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
        image_token_index=440, boi_token_index=441, eoi_token_index=442,
    ),
    "mistral3": lambda: _config(
        "mistral3", {"model_type": "mistral"}, {**TOWER, "head_dim": 8}, image_token_index=440, spatial_merge_size=2
    ),
    "gemma4, unequal heads": lambda: _gemma4(
        global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True, enable_moe_block=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=16,
    ),
    "gemma4": lambda: _gemma4(global_head_dim=8),
}  # fmt: skip
# The language part has no attention but eager, though the whole takes PyTorch's.
EAGER: dict[str, Callable[[], PretrainedConfig]] = {
    "llava over gemma 2": lambda: _config(
        "llava", {"model_type": "gemma2", "sliding_window": 8}, {**TOWER, "model_type": "clip_vision_model"}, image_token_index=440
    ),
    "paligemma 2": lambda: _config(
        "paligemma", {"model_type": "gemma2", "sliding_window": 8}, {**TOWER, "model_type": "siglip_vision_model"},
        image_token_index=440, projection_dim=32,
    ),
}  # fmt: skip


def _gemma4(**text: Any) -> PretrainedConfig:
    kinds = ["sliding_attention", "full_attention"]
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
    return _config(
        "gemma4",
        {"sliding_window": 8, "layer_types": kinds, "final_logit_softcapping": 5.0, **own, **text},
        {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "position_embedding_size": 16},
        image_token_id=440,
        boi_token_id=441,
        eoi_token_id=442,
    )


def _config(kind: str, text: dict[str, Any], vision: dict[str, Any], **others: Any) -> PretrainedConfig:
    return AutoConfig.for_model(kind, text_config={**TEXT, **text}, vision_config=vision, **others)


def write_checkpoint(kind: str, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
    """A checkpoint with random weights.

    Args:
        dtype: of all weights; None: bfloat16, and float32 for norms and some others, in the language part and in the vision part.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config({**CONFIGS, **EAGER}[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.data = parameter.data.to(dtype or torch.bfloat16)  # buffers may be complex
    model.save_pretrained(folder)
    if dtype is None:
        tensors = tensors_of(folder)
        for number, name in enumerate(sorted(tensors)):
            if "norm" in name or number % 7 == 3:
                tensors[name] = tensors[name].float() + 0.01 * torch.rand(tensors[name].shape)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer(["to be or not to be"], vocab_size=400).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", "size": 28}, indent=4))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def whole_model(folder: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it, with all of its parts."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model
