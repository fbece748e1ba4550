"""A transformers model in this process: load it, put it into generation mode, check what is asked of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl import dist
from verl.engine.layers import decoder_layers
from verl.errors import UserError
from verl.models.load import check_vocabulary, load_for_inference
from verl.rollout import Options, Sampling


def load_model(path: str, tokenizer: PreTrainedTokenizerBase, options: Options) -> PreTrainedModel:
    """A checkpoint: on CUDA in its own dtype, otherwise on the CPU in float32.

    Args:
        path: a model directory, a LoRA adapter directory, or a Hub name.
        tokenizer: of the same checkpoint.
    Raises:
        UserError: it cannot be loaded, or the tokenizer belongs to another model.
    """
    device, dtype = ("cuda", None) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load_for_inference(path, device=device, dtype=dtype, trust_remote_code=options.trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    return model


def merge_stop_ids(stop_ids: Sequence[int], generation: GenerationConfig | None) -> list[int]:
    """The given stop tokens and those of a model's generation_config.json, without duplicates."""
    own = generation.eos_token_id if generation is not None else None
    own_ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([*stop_ids, *own_ids]))


@contextmanager
def generation_mode(model: PreTrainedModel, attention: str, forwards: Sequence[Callable[..., Any]] | None = None) -> Iterator[None]:
    """Put a model into evaluation mode with another attention for a while; then restore it.

    Its decoder layers run as their class defines them, neither compiled nor with activation checkpointing.

    Args:
        forwards: one for each decoder layer, to run in place of its own.
    """
    layers = decoder_layers(model)
    before = [(layer.__dict__.pop("forward", None), layer._compiled_call_impl) for layer in layers]
    training, own_attention = model.training, model.config._attn_implementation
    for number, layer in enumerate(layers):
        _set(layer, None if forwards is None else forwards[number], None)
    if training:
        model.eval()
    if own_attention != attention:
        model.set_attn_implementation(attention)
    try:
        yield
    finally:
        if own_attention != attention:
            model.set_attn_implementation(own_attention)
        if training:
            model.train()
        for layer, (forward, compiled) in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            _set(layer, forward, compiled)


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
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is no parameter of this model")
        own[name].copy_(tensor)


def check_positions(prompts: Sequence[list[int]], sampling: Sampling, positions: int | None) -> None:
    """Raises UserError if the longest prompt and its answer exceed the model's positions."""
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    if positions is not None and longest > positions:
        raise UserError(
            f"a prompt and its answer take {longest:,} tokens, the model has {positions:,} positions",
            fix="shorten the prompts, or set a smaller max_new_tokens",
        )


def out_of_memory(sequences: int, options: Options) -> UserError:
    """The error to raise when the GPU has run out of memory while it generated this many sequences."""
    fix = f"set {options.key}={sequences // 2}" if sequences > 1 else "set a smaller max_new_tokens"
    return UserError(f"{sequences:,} answers at a time do not fit into the GPU's memory", where=options.key, fix=fix)


def describe_model(model: PreTrainedModel) -> str:
    return f"{dist.describe_device(model.device)}, {str(model.dtype).removeprefix('torch.')}"
