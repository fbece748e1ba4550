"""verl's own engine: continuous batching, prefix sharing and CUDA graphs, directly on the trainer's model.

`engine.NativeRollout.stream` is the main loop; read it first.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl.rollout import Options
from verl.rollout._model import load_model
from verl.rollout.native.engine import NativeRollout

__all__ = ["NativeRollout", "load", "share"]


def load(path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> NativeRollout:
    """See `verl.rollout.load_rollout`."""
    return NativeRollout(load_model(path, tokenizer, options), stop_ids, options)


def share(
    model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options
) -> NativeRollout:
    """See `verl.rollout.share`. The engine computes with the trainer's weights."""
    return NativeRollout(model, stop_ids, options, is_shared=True)
