"""The model of a run without weights: its sizes and FLOP, from its config alone."""

import copy
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from verl.config.shared import ModelConfig
from verl.engine.layers import decoder_layers
from verl.models.attention.flash import Heads
from verl.models.attention.packed import ForwardPath
from verl.models.load import numel, outline, read_config

ADAPTER_KEYS = ("lora_rank", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora", "lora_adapter_path")


class Outline:
    """The model named by the `model` section of a config, without weights. It is built on the meta device once, when first needed.

    Args:
        settings: the `model` section.
        model: result of `verl.models.load.outline`, if it is built already.
    Raises:
        UserError: raised by the properties if there is no such model, or it cannot have the adapters.
    """

    def __init__(self, settings: ModelConfig, model: PreTrainedModel | None = None):
        self.settings = settings
        self._made: dict[str, PreTrainedModel] = {} if model is None else {"": model}  # by adapter settings

    def with_settings(self, settings: ModelConfig) -> "Outline":
        """Return the outline of the same model with other settings."""
        other = Outline(settings)
        other._made = self._made
        return other

    @property
    def model(self) -> PreTrainedModel:
        """The model without adapters."""
        if "" not in self._made:
            self._made[""] = outline(self.settings.partial_pretrain, trust_remote_code=self.settings.trust_remote_code)
        return self._made[""]

    @property
    def adapted(self) -> PreTrainedModel:
        """The model with the adapters of the settings, if any."""
        if not self.has_adapters:
            return self.model
        key = repr([getattr(self.settings, name) for name in ADAPTER_KEYS])
        if key not in self._made:
            self._made[key] = _with_adapters(self.model, self.settings)
        return self._made[key]

    @property
    def has_adapters(self) -> bool:
        return self.settings.lora_rank > 0 or self.settings.lora_adapter_path is not None

    @cached_property
    def heads(self) -> tuple[Heads, ...]:
        """The model's attention heads, the largest first (`heads_of`). This needs only the config."""
        from verl.models.per_layer import heads_of  # once in a run

        return heads_of(self.config)

    @cached_property
    def config(self) -> PretrainedConfig:
        if "" in self._made:
            return self._made[""].config
        return read_config(self.settings.partial_pretrain, trust_remote_code=self.settings.trust_remote_code)

    @cached_property
    def path(self) -> ForwardPath:
        """How the model computes a batch, from a trial on a tiny twin.

        Raises:
            UserError: it cannot be computed exactly.
        """
        from verl.engine.trial import choose_path  # once a run

        of = self.settings
        options: dict[str, Any] = {"trust_remote_code": of.trust_remote_code, "context_size": of.context_parallel_size}
        return choose_path(self.config, of.partial_pretrain, **options)

    @cached_property
    def parameters(self) -> int:
        """Number of weights, without adapters."""
        return count(self.model)

    @property
    def layers(self) -> int:
        return len(decoder_layers(self.model))

    @property
    def stored_numbers(self) -> int:
        """Number of elements of all parameter tensors, with adapters; one 16-bit element holds four 4-bit weights."""
        return count(self.adapted) - self.quantized + self.quantized // 4

    @property
    def quantized(self) -> int:
        """Number of 4-bit weights: those of the linear modules inside the layers."""
        if not self.settings.load_in_4bit:
            return 0
        linear = (m for layer in decoder_layers(self.model) for m in layer.modules() if isinstance(m, nn.Linear))
        return sum(m.weight.numel() for m in linear)

    @property
    def trained_parameters(self) -> int:
        """Number of weights that the optimizer updates."""
        return sum(p.numel() for p in self.adapted.parameters() if p.requires_grad)

    def flops(self, tokens: int, *, scalar_head: bool = False) -> float:
        """Return the FLOP of the forward and backward pass over `tokens` trained tokens (see `training_flops`).

        Args:
            scalar_head: whether to count a scalar head in place of the output layer. Such a model has no adapters.
        """
        if scalar_head:
            hidden_size: int = self.model.config.get_text_config().hidden_size
            return training_flops(self.model)(tokens, 0) + 6.0 * hidden_size * tokens
        return training_flops(self.adapted)(tokens, tokens)


def _with_adapters(model: PreTrainedModel, settings: ModelConfig) -> PreTrainedModel:
    from verl.models.adapters.lora import inject, lora_config  # slow to import
    from verl.models.adapters.operators import use_operators

    model = copy.deepcopy(model)
    with torch.device("meta"):
        use_operators(inject(model, lora_config(model, settings, None, ())))
    return model


def count(model: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def training_flops(model: PreTrainedModel) -> Callable[[int, int], float]:
    """Return a function of (tokens, trained tokens) that gives the FLOP of forward and backward pass.

    Each token costs 6 FLOP per trained weight, and 4 per frozen weight, which has no gradient of its own but passes one on. Of a mixture
    of experts, only the active weights count. The output layer sees the trained tokens only. Attention scores and recomputed activations
    are not counted.
    """
    from verl.models.experts import active_shares  # once in a run

    output, shares = model.get_output_embeddings(), active_shares(model)  # no output layer for a model with a scalar head
    head = 0.0 if output is None else _flops(output.parameters(), {})
    parts = [model.get_input_embeddings(), *([output] if output is not None else [])]
    embeddings = {id(p) for part in parts for p in part.parameters()}
    inner = _flops((p for p in model.parameters() if id(p) not in embeddings), shares)
    return lambda tokens, trained_tokens: inner * tokens + head * trained_tokens


def _flops(parameters: Iterable[nn.Parameter], shares: dict[int, float]) -> float:
    matrices = (p for p in parameters if p.ndim > 1)
    return sum((6.0 if p.requires_grad else 4.0) * numel(p) * shares.get(id(p), 1.0) for p in matrices)
