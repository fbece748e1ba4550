"""Helpers of engines that run a transformers model in this process: load the model, switch to generation mode, and check requests."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl import dist
from verl.engine.layers import decoder_layers
from verl.errors import UserError
from verl.models.inference import load_for_inference
from verl.models.load import check_vocabulary
from verl.rollout import Options, Sampling


def load_model(path: str, tokenizer: PreTrainedTokenizerBase, options: Options) -> PreTrainedModel:
    """Load a checkpoint: to a GPU in the dtype on disk if there is one, else to the CPU in float32.

    Args:
        path: model directory, LoRA adapter directory, or Hub name.
        tokenizer: tokenizer of the same checkpoint.
    Raises:
        UserError: the checkpoint cannot be loaded, or lacks embeddings for some tokens of the tokenizer.
    """
    device, dtype = ("cuda", None) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load_for_inference(path, device=device, dtype=dtype, trust_remote_code=options.trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    return model


def merge_stop_ids(stop_ids: Sequence[int], generation: GenerationConfig | None) -> list[int]:
    """Return the given stop tokens and those of a model's generation_config.json, without duplicates."""
    own = generation.eos_token_id if generation is not None else None
    own_ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([*stop_ids, *own_ids]))


def positions_of(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model; None if it has no limit."""
    config, limit = model.config.get_text_config(), rope_limit(model)
    if limit is not None and limit.grows:
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(positions := getattr(config, name, None), int):
            return positions
    return None


@dataclass(frozen=True)
class RopeLimit:
    """Length of a text beyond which a model's rotary embeddings are others, at all of its positions.

    Attributes:
        tokens: longest text with the first embeddings.
        grows: whether they change with each further token (dynamic scaling), not only once (longrope).
    """

    tokens: int
    grows: bool


def rope_limit(model: PreTrainedModel) -> RopeLimit | None:
    """Return the limit of rotary embeddings that depend on the length of the text; None if they do not."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    for one in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        kind = one.get("rope_type")
        if kind == "longrope":
            return RopeLimit(one.get("original_max_position_embeddings") or config.max_position_embeddings, grows=False)
        if kind == "dynamic":
            return RopeLimit(config.max_position_embeddings, grows=True)
    return None


def restart_rope(model: PreTrainedModel) -> None:
    """Let rotary embeddings with dynamic scaling forget the longest text so far, by which they would scale shorter ones."""
    rope: Any
    for rope in model.modules():
        if hasattr(rope, "max_seq_len_cached") and isinstance(original := getattr(rope, "original_inv_freq", None), Tensor):
            rope.max_seq_len_cached, rope.inv_freq = rope.original_max_seq_len, original.to(rope.inv_freq.device, copy=True)


@contextmanager
def generation_mode(
    model: PreTrainedModel, attention: str, forwards: Mapping[nn.Module, Callable[..., Any]] | None = None
) -> Iterator[None]:
    """Put a model into evaluation mode with another attention implementation in this context.

    Its decoder layers run the forward function of their class, without compilation and activation checkpointing.

    Args:
        attention: name of the attention implementation in transformers.
        forwards: functions that replace the forward functions of decoder layers; None: do not replace them.
    """
    layers = decoder_layers(model)
    before = [(layer.__dict__.pop("forward", None), layer._compiled_call_impl) for layer in layers]
    training, own_attention = model.training, _attention_of(model.config)
    changes = model.config.get_text_config()._attn_implementation != attention and model._can_set_attn_implementation()
    try:
        for layer in layers:
            _set(layer, None if forwards is None else forwards.get(layer), None)
        if training:
            model.eval()
        if changes:
            model.set_attn_implementation(attention)
        yield
    finally:
        if changes:
            model.set_attn_implementation(own_attention)
        if training:
            model.train()
        for layer, (forward, compiled) in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            _set(layer, forward, compiled)


def _attention_of(config: PretrainedConfig) -> Any:
    """Return the attention implementations of a model and of its parts: around Gemma 2, which has eager alone, the whole may have sdpa."""
    parts = {name: part._attn_implementation for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    return {"": config._attn_implementation, **parts}


def _set(layer: nn.Module, forward: Callable[..., Any] | None, compiled: Any) -> None:
    if forward is not None:
        layer.__dict__["forward"] = forward
    layer._compiled_call_impl = compiled


@torch.no_grad()
def copy_weights(model: PreTrainedModel, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into the model's parameters, one at a time.

    Raises:
        ValueError: the model has no parameter of that name and shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in named_tensors:
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not a parameter of this model")
        own[name].copy_(tensor)


def check_positions(prompts: Sequence[list[int]], sampling: Sampling, positions: int | None) -> None:
    """Raise UserError if the longest prompt with its response exceeds the model's positions."""
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    if positions is not None and longest > positions:
        raise UserError(
            f"a prompt with its response may have {longest:,} tokens, but the model has {positions:,} positions",
            fix="shorten the prompts, or set a smaller max_new_tokens",
        )


def out_of_memory(sequences: int, options: Options) -> UserError:
    """Return the error to raise when the GPU runs out of memory while it generates this many sequences."""
    fix = f"set {options.key}={sequences // 2}" if sequences > 1 else "set a smaller max_new_tokens"
    return UserError(f"{sequences:,} responses at a time do not fit into the GPU's memory", where=options.key, fix=fix)


def describe_model(model: PreTrainedModel) -> str:
    """Return the device and dtype of a model, for `Rollout.describe`."""
    return f"{dist.describe_device(model.device)}, {str(model.dtype).removeprefix('torch.')}"
