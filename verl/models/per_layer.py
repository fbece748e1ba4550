"""Values of a config that differ between layers, such as Gemma 4's head sizes. transformers raises an error where the config as a whole is
asked for one of them."""

from typing import Any

from transformers import PretrainedConfig

from verl.models.attention.flash import Heads


def layer_values(text: Any, *names: str) -> list[tuple[Any, ...]]:
    """Return the values of these names in each layer without repetition, None where a config has no such name.

    Args:
        text: config of a language model.
    """
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    return list(dict.fromkeys(tuple(getattr(layer, name, None) for name in names) for layer in layers))


def layer_value(text: Any, name: str) -> Any:
    """Return the largest value of this name, which is a number, over the layers; None if no layer has it."""
    values = [each for (value,) in layer_values(text, name) for each in (value if isinstance(value, list | tuple) else [value])]
    return max((value for value in values if value is not None), default=None)


def heads_of(config: PretrainedConfig) -> tuple[Heads, ...]:
    """Return the attention heads of a causal language model, the largest first; more than one if layers differ."""
    text = config.get_text_config(decoder=True)
    found = []
    for query, key_value, size in layer_values(text, "num_attention_heads", "num_key_value_heads", "head_dim"):
        query = query or 1  # a recurrent model has none
        found.append(Heads(query, key_value or query, size or text.hidden_size // query))
    return tuple(sorted(dict.fromkeys(found), key=lambda heads: (heads.size, heads.key_value), reverse=True))
