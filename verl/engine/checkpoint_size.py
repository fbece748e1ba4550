"""The size of a checkpoint, from the tensors that it will hold."""

from torch import Tensor

from verl.engine.build import Built
from verl.engine.build_heads import Critic
from verl.engine.checkpoint import states_of


def checkpoint_bytes(built: Built, critic: Critic | None = None) -> int:
    """Return the bytes of the Hugging Face files and of the training state, without the tokenizer."""
    models = [_model_bytes(built)] + ([] if critic is None else [_whole_model_bytes(critic)])
    return sum(models) + _state_bytes(built, critic)


def _model_bytes(built: Built) -> int:
    if built.adapted is None:
        return _whole_model_bytes(built)
    return sum(map(_bytes, built.engine.trained))


def _whole_model_bytes(saved: Built | Critic) -> int:
    """Return the bytes of a model's weights in their dtypes on disk; a tied weight is written once."""
    dtypes = saved.loaded.saved_dtypes
    tensors = {id(tensor): (name, tensor) for name, tensor in saved.loaded.model.state_dict(keep_vars=True).items()}
    extra: int = getattr(dtypes, "extra_bytes", 0)  # what is saved as it was
    weights: int = sum(int(tensor.numel()) * dtypes.get(name, tensor.dtype).itemsize for name, tensor in tensors.values())
    return extra + weights


def _state_bytes(built: Built, critic: Critic | None) -> int:
    """Return the bytes of the trained weights and the optimizer states, of all ranks together."""
    states = states_of(built.engine, critic).values()
    return sum(_bytes(tensor) for state in states for part in (state["model"], *state["optimizer"].values()) for tensor in part.values())


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; of a sharded one, those of the whole."""
    return tensor.numel() * tensor.dtype.itemsize
