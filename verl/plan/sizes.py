"""A model's sizes and arithmetic, from its config alone."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from verl.config.shared import ModelConfig
from verl.engine.flops import training_flops
from verl.models.attention.packed import heads_of
from verl.models.load import cannot_load, resolve
from verl.plan.memory import Decoder


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of the model.

    Attributes:
        name: of its class.
        flops: of a token, forward and backward.
    """

    name: str
    sizes: Decoder
    flops: float


def read_model(settings: ModelConfig) -> Model:
    """A model's sizes and arithmetic, from its config.

    Raises:
        UserError: no such model, or adapters that it cannot have.
    """
    model = model_without_values(settings)
    flops = training_flops(model)(1, 1)  # before adapters are put into it
    return Model(type(model).__name__, decoder(model, settings), flops)


def model_without_values(settings: ModelConfig) -> PreTrainedModel:
    """A model of the right shapes, on no device.

    Raises:
        UserError: no such model.
    """
    source = resolve(settings.partial_pretrain)
    try:
        shape = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model", settings.partial_pretrain, error) from error
    return model


def decoder(model: PreTrainedModel, settings: ModelConfig) -> Decoder:
    """Sizes of a model without values, into which the adapters that the settings ask for are put."""
    text, heads = model.config.get_text_config(), heads_of(model.config)
    inner = model.get_decoder()
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
    if settings.lora_rank == 0 and settings.lora_adapter_path is None:
        return sizes
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    frozen = replace(sizes, frozen=everything, quantized=linear if settings.load_in_4bit else 0, root_trained=0, head_trained=False)
    return with_adapters(frozen, model, settings)


def with_adapters(frozen: Decoder, model: PreTrainedModel, settings: ModelConfig) -> Decoder:
    """Sizes of a model with adapters, which are put into it; they are in its layers, nearly always."""
    from peft import get_peft_model  # it takes its time

    from verl.models.adapters.lora import lora_config
    from verl.models.adapters.operators import use_operators

    with torch.device("meta"):
        adapted: Any = get_peft_model(model, lora_config(model, settings, None, ()), autocast_adapter_dtype=False)
    kinds = {name: type(module) for name, module in adapted.named_modules() if hasattr(module, "gate_proj")}
    use_operators(adapted)
    adapters = {name: module.r["default"] for name, module in adapted.named_modules() if "default" in getattr(module, "lora_A", ())}
    is_one = any(type(module) is not kinds[name] for name, module in adapted.named_modules() if name in kinds)
    return replace(
        frozen,
        trained=numel(p for p in adapted.parameters() if p.requires_grad),
        ranks=sum(adapters.values()) / frozen.layers,
        mlp_trained=not kinds or any(name.rpartition(".")[0] in kinds for name in adapters),
        mlp_is_one=is_one and not settings.load_in_4bit,
    )


def numel(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
