"""Sizes of a decoder model, from its outline (`verl.engine.outline`)."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from verl.engine.outline import Outline
from verl.plan.memory import Decoder


def decoder(outline: Outline) -> Decoder:
    """Return the sizes of the model as it is trained, including its adapters."""
    model, heads = outline.model, outline.heads
    text, inner = model.config.get_text_config(), model.get_decoder()
    assert isinstance(inner, nn.Module)
    layers: Any = inner.layers
    tables = {id(p): p for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    everything, in_layers = numel(model.parameters()), numel(layers.parameters())
    sizes = Decoder(
        layers=len(layers),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads.query,
        key_heads=heads.key_value,
        head_size=heads.size,
        vocabulary=text.vocab_size,
        trained=everything,
        root=everything - in_layers,
        root_trained=everything - in_layers,
        tied=len(tables) == 1,
    )
    return with_adapters(sizes, outline) if outline.has_adapters else sizes


def with_adapters(sizes: Decoder, outline: Outline) -> Decoder:
    """Return the sizes with frozen weights and trained adapters. All adapters are assumed to be inside the layers."""
    kinds = {name: type(module) for name, module in outline.model.named_modules() if hasattr(module, "gate_proj")}
    adapted: dict[str, Any] = dict(outline.adapted.named_modules())
    adapters = {name: module.r["default"] for name, module in adapted.items() if "default" in getattr(module, "lora_A", ())}
    return replace(
        sizes,
        trained=outline.trained_parameters,
        frozen=sizes.trained,
        quantized=outline.quantized,
        root_trained=0,
        head_trained=False,
        ranks=sum(adapters.values()) / sizes.layers,
        mlp_trained=not kinds or any(name.rpartition(".")[0] in kinds for name in adapters),
        fused_mlp=any(type(adapted[name]) is not kind for name, kind in kinds.items()) and not outline.settings.load_in_4bit,
    )


def numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
