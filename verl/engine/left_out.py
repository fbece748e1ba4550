"""Layers that a model leaves out at random in training, where several processes train it."""

from transformers import PretrainedConfig

from verl.config.shared import ModelConfig
from verl.engine.weights import Spread
from verl.errors import UserError
from verl.models.randomness import left_out_layers


def check_layers(config: PretrainedConfig, settings: ModelConfig, spread: Spread) -> None:
    """Raise UserError if processes that exchange weights or tokens in each layer would leave out different layers."""
    splits = settings.context_parallel_size > 1
    if spread.strategy == "ddp" and not splits:
        return
    if found := left_out_layers(config):
        named = " and ".join(f"{name}={value:g}" for name, value in found.items())
        zeros = " and ".join(f"{name}=0" for name in found)
        what = (
            f"this {config.model_type} model leaves out layers at random in training ({named}), each process other ones, and those "
            f"that share {'documents' if splits else 'weights'} would wait for each other for ever"
        )
        other = "" if splits else ", or model.strategy=ddp for whole weights on each process"
        raise UserError(what, where=settings.partial_pretrain, fix=f"set {zeros} in its config.json{other}")
