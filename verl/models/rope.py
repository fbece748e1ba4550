"""Rotary embeddings whose frequencies depend on the length of the text: longrope and dynamic NTK.

transformers takes that length from the highest position of the whole batch, and dynamic NTK also keeps the longest length so far. So a
short document beside a long one, or after it, would get the frequencies of the long one. Here each document gets those of its own length.

Dimensions: T tokens of the packed batch, or of this rank's slice; D rotary dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from verl.data.batch import Batch
from verl.errors import UserError

Piece = tuple[slice, int]  # tokens of this rank's slice, and the length of the document that they belong to


class LengthRope:
    """The rotary embeddings of a model, with frequencies by document inside `documents`."""

    def __init__(self, modules: list[Any]):
        self._limit = min(_limit(module) for module in modules)
        self._pieces: list[Piece] = []
        for module in modules:
            module.forward = partial(self._forward, module, type(module).forward)

    @contextmanager
    def documents(self, batch: Batch) -> Iterator[None]:
        """Use the frequencies of each document of this packed batch in this context."""
        # If all documents are short, then so is the highest position, and one call is right for all of them.
        self._pieces = pieces(batch) if batch.max_seqlen > self._limit else []
        try:
            yield
        finally:
            self._pieces = []

    def _forward(self, module: Any, forward: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._pieces:
            _restart(module)
            alone: tuple[Tensor, Tensor] = forward(module, x, position_ids, *args, **kwargs)
            return alone
        found = []
        for tokens, length in self._pieces:
            _restart(module)
            last = torch.full_like(position_ids[:, :1], length - 1)  # the document may go on in another rank's slice
            inside = position_ids[:, tokens].clamp(max=length - 1)  # padding goes on behind the end
            cos_1TD, sin_1TD = forward(module, x, torch.cat([inside, last], 1), *args, **kwargs)
            found.append((cos_1TD[:, :-1], sin_1TD[:, :-1]))
        cos, sin = zip(*found, strict=True)
        return torch.cat(cos, 1), torch.cat(sin, 1)


def pieces(batch: Batch) -> list[Piece]:
    """Return the documents of a batch as far as they are in this rank's slice, with their whole lengths without padding.

    Raises:
        UserError: documents are padded, and split over ranks, so that no rank knows where they end.
    """
    bounds, first, here = batch.cu_seqlens.tolist(), batch.first_token, len(batch.input_ids_T)
    found = []
    for (start, stop), real in zip(pairwise(bounds), batch.real_lengths(), strict=True):
        tokens = slice(max(start - first, 0), min(stop - first, here))
        if tokens.start < tokens.stop:
            padding = tokens.stop - tokens.start - real
            if padding and batch.parts > 1:
                what = "the model's rotary embeddings depend on the length of a document, which padding hides where it is split over GPUs"
                raise UserError(what, where="data.packing=false with model.context_parallel_size", fix="set one of them to its default")
            found.append((tokens, stop - start - padding))
    return found


def length_rope(model: nn.Module) -> LengthRope | None:
    """Change the model's rotary embeddings in place if their frequencies depend on the length; return None if they do not."""
    modules: list[Any] = [module for module in model.modules() if by_length(getattr(module, "rope_type", None))]
    if not modules:
        return None
    if not hasattr(modules[0], "length_rope"):
        made = LengthRope(modules)
        for module in modules:
            module.length_rope = made
    found: LengthRope = modules[0].length_rope
    return found


def by_length(rope_type: Any) -> bool:
    """Return whether frequencies of this type, or of one of these types by kind of layer, depend on the length."""
    return any("dynamic" in name or name == "longrope" for name in _types(rope_type))


def _types(rope_type: Any) -> list[str]:
    return [str(name) for name in (rope_type.values() if isinstance(rope_type, dict) else [rope_type])]


def _limit(module: Any) -> int:
    """Return the length in tokens up to which the frequencies are the same."""
    given = getattr(module.config, "rope_parameters", None) or {}
    parameters = [given, *(value for value in given.values() if isinstance(value, dict))]
    limits = [value for each in parameters if (value := each.get("original_max_position_embeddings")) is not None]
    return int(min([*limits, module.original_max_seq_len]))


def _restart(module: Any) -> None:
    """Forget the longest length so far, which only dynamic NTK keeps."""
    if not any("dynamic" in name for name in _types(module.rope_type)):
        return
    module.max_seq_len_cached = module.original_max_seq_len
    for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]:
        original = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
        if isinstance(original, Tensor) and not name.endswith("original_inv_freq"):
            setattr(module, name, original.to(getattr(module, name).device, copy=True))
        prefix = name.removesuffix("inv_freq")
        if prefix and hasattr(module, f"{prefix}max_seq_len_cached"):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
