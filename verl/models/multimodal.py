"""Checkpoints with vision or audio parts: their language part is loaded as a causal language model of its own.

The class of the checkpoint is built without the modules that text does not reach, so rows of text run through the architecture's own code
under the checkpoint's own names. The other tensors stay on disk and are written back as they are (`verl.models.on_disk`).
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import cached_file

from verl.errors import UserError

# What a processor is loaded from, beside the tokenizer's files.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")


class Absent(nn.Module):
    """In place of a part that was left out, such as a vision tower."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(f"its text runs through {self.name}, which is not loaded", fix="choose a model whose text does not need that part")


class LanguagePart:
    """Mixed into the class of a checkpoint, it leaves out the other parts.

    Attributes:
        absent: names of the modules and parameters that were left out.
    """

    _keys_to_ignore_on_load_unexpected = ("",)  # all: the files have the other parts too

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        parent: Any = super()
        parent.__init__(config, *args, **kwargs)
        model: Any = self
        kept = {id(module) for module in (model.get_decoder(), model.get_output_embeddings())}
        self.absent = tuple(_leave_out(model, "", kept))
        tied = getattr(model, "all_tied_weights_keys", {})
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        model.all_tied_weights_keys = {name: source for name, source in tied.items() if {name, source} <= names}

    def get_decoder(self) -> Any:
        """Return the part that computes the last hidden states. In some classes it is inside a causal language model."""
        parent: Any = super()
        decoder = parent.get_decoder()
        if decoder.get_output_embeddings() is None:
            return decoder
        return next(part for part in decoder.children() if isinstance(part, PreTrainedModel))

    @classmethod
    def from_config(cls, config: Any, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
        """Build a model, as an Auto class does."""
        kind: Any = cls
        model: PreTrainedModel = kind._from_config(config, **options)
        return model


def language_part(config: PretrainedConfig) -> Any:
    """Return the class that loads the language part of a checkpoint; None if the checkpoint has no other part, or none of this kind.

    Raises:
        UserError: the language part is not a module of its own, or it is a decoder whose encoder reads the text.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or config.get_text_config(decoder=True) is config:
        return None
    if config.is_encoder_decoder:
        what = f"is an encoder-decoder model ({config.model_type}), not a causal language model"
        raise UserError(what, where=config.name_or_path or None, fix="choose a causal language model, such as Qwen3 or Gemma 3")
    return _class_of(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])


@functools.cache
def _class_of(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # Of the same name and module, by which transformers finds the conversions of its checkpoints, and which config.json has.
    return type(kind.__name__, (LanguagePart, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _leave_out(module: nn.Module, prefix: str, kept: set[int]) -> Iterator[str]:
    """Replace the parts of a module that are not kept, and hold none that is kept. Yield their names."""
    for name in [name for name, parameter in module._parameters.items() if parameter is not None]:
        delattr(module, name)
        setattr(module, name, torch.empty(0))  # code that initializes it still finds a tensor
        yield prefix + name
    for name, child in list(module.named_children()):
        inside = {id(part) for part in child.modules()}
        if id(child) in kept:
            continue
        if inside & kept:
            yield from _leave_out(child, f"{prefix}{name}.", kept)
        elif any(True for _ in (*child.parameters(), *child.buffers())):
            setattr(module, name, Absent(prefix + name))
            yield prefix + name


def copy_processor(model: PreTrainedModel, directory: Path) -> None:
    """Copy the files of the processor from where the model was loaded."""
    name_or_path = str(model.name_or_path)
    local = Path(name_or_path).expanduser()
    source = str(local) if local.is_dir() else name_or_path
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in PROCESSOR_FILES:
        if (found := cached_file(source, name, **quiet)) is not None:
            (directory / name).write_bytes(Path(found).read_bytes())


def name_in_full(model: PreTrainedModel, settings: Any) -> None:
    """Change the settings of an adapter, in place, so that they name the same modules in the whole model: its other parts have such, too.

    Args:
        model: language part with the adapter.
        settings: peft's settings of the adapter in memory.
    """
    targets = settings.target_modules
    if isinstance(targets, str):  # a regular expression of whole names
        decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        settings.target_modules = rf"(?=({re.escape(decoder)}|{re.escape(head)})(\.|$))({targets})"
    elif targets:
        ends = tuple(f".{target}" for target in targets)
        settings.target_modules = sorted(name for name, _ in model.named_modules() if f".{name}".endswith(ends))
