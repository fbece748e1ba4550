"""Sizes of a decoder model, from its outline (`verl.engine.outline`)."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from verl.engine.layers import decoder_layers
from verl.engine.outline import Outline
from verl.models.per_layer import layer_value
from verl.plan.memory import Decoder

WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner", "dff")  # names of the feed-forward width


def decoder(outline: Outline) -> Decoder:
    """Return the sizes of the model as it is trained, including its adapters."""
    model, layers = outline.model, decoder_layers(outline.model)
    heads = max(outline.heads, key=lambda each: each.size * (each.query + 2 * each.key_value))  # of layers that differ, the largest counts
    text = model.config.get_text_config()
    tables = {id(p): p for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    everything, in_layers = numel(model.parameters()), sum(numel(layer.parameters()) for layer in layers)
    if not layers:  # a class that does not name its blocks, such as CTRL
        in_layers = everything - numel(tables.values())
    sizes = Decoder(
        layers=len(layers) or text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=next(filter(None, (layer_value(text, name) for name in WIDTHS)), 4 * text.hidden_size),
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
