"""What is random in a model while it trains: dropout, layers that are left out, jitter in routers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

# Config values by this name make something random in training. Those of classification heads do not reach a language model.
RANDOM = re.compile(r"drop(out|path|_path|_rate)|pdrop|_drop$|layer_?drop|jitter")
LEFT_OUT = re.compile(r"^(decoder_)?layer_?drop$")
OF_HEADS = re.compile(r"^(classifier|summary|cls|token_classifier)_|classifier_dropout")


def random_settings(config: PretrainedConfig) -> dict[str, float]:
    """Return the values of a config that make its language model random in training, by name, such as {"attention_dropout": 0.1}."""
    return dict(_random(config.get_text_config().to_dict()))


def left_out_layers(config: PretrainedConfig) -> dict[str, float]:
    """Return the values of a config by which its language model leaves out whole layers at random in training, as {"layerdrop": 0.1}."""
    return {name: value for name, value in random_settings(config).items() if LEFT_OUT.search(name)}


def _random(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _random(value)
        elif isinstance(value, float | int) and value is not True and value and RANDOM.search(name) and not OF_HEADS.search(name):
            yield name, value


def is_random(module: nn.Module, config: PretrainedConfig) -> bool:
    """Return whether a module in training mode may give other numbers each time: by its parts, or by its model's config."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()) or bool(random_settings(config))
