"""Attention over packed batches, registered with transformers so that every architecture can use it without changes.

A model that is loaded with `attn_implementation=PACKED` is called with one row of T tokens, positions that restart in each document, and
`packed_kwargs(batch)`. No token attends to another document. There are two exact implementations:

- CUDA in half precision: FlashAttention with variable lengths, from PyTorch or from an installed newer package;
- otherwise, and for soft-capped scores, attention sinks and heads that are too large for it: PyTorch alone, one document at a time.

`use_attention` selects the FlashAttention kernel of the process. A model that cannot be computed this way runs its own code
(`ForwardPath`).

Dimensions: T tokens of the packed batch, or of this rank's slice; N query heads, K key-value heads, D head size. A leading 1 is the batch
dimension of transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from verl import dist
from verl.data.batch import Batch
from verl.errors import UserError
from verl.models.attention import flash

if TYPE_CHECKING:
    from verl.models.attention.delta_rule import Rule

PACKED = "verl_packed"
# Options of transformers' attention functions that change what is computed.
UNSUPPORTED = {
    "dropout": "dropout of attention",
    "sinks": "attention sinks",
    "position_bias": "a bias of positions",
    "indices": "sparse attention, which chooses its keys",
    "is_causal": "two-way attention",
}
USE_ANOTHER = "this architecture cannot read packed batches yet; choose a model such as Qwen2, Qwen3, Llama or Mistral"


@dataclass(frozen=True)
class ForwardPath:
    """How a model computes a batch: all documents at once, or by its own code one document at a time. `verl.engine.trial` chooses it.

    Attributes:
        packed: whether documents are packed.
        fused: whether FlashAttention can compute its attention; it has neither soft-capped scores nor sinks.
        attention: name of the attention implementation in transformers.
        own_logits: whether log-probabilities come from the model's own logits, because more than a LogitRule follows its output layer.
        why: why documents are not packed, in a few words.
        recurrent: whether short convolutions or delta rules carry a state from token to token.
        rule: the delta rule; None: none.
    """

    packed: bool = True
    fused: bool = True
    attention: str = PACKED
    own_logits: bool = False
    why: str = ""
    recurrent: bool = False
    rule: "Rule | None" = None

    def describe(self) -> str:
        if self.packed:
            return "PyTorch's operations, one document at a time (no FlashAttention: it has no soft-capped scores and no sinks)"
        return f"the model's own ({self.attention}), one document at a time: exact, but slower than packed documents; {self.why}"


PACKED_PATH = ForwardPath()


@dataclass(frozen=True)
class AttentionChoice:
    """The attention kernel of a process on CUDA in half precision.

    Attributes:
        kernel: FlashAttention kernel, or "sdpa" for PyTorch's scaled dot-product attention.
        refused: kernels for this GPU that cannot be used, with the reason.
        too_large: sizes of heads that FlashAttention does not have; layers with them use scaled dot-product attention.
    """

    kernel: flash.Kernel | Literal["sdpa"] = "fa2"
    refused: dict[flash.Kernel, str] = field(default_factory=dict)
    too_large: tuple[int, ...] = ()


_kernel: flash.Kernel | Literal["sdpa"] = "fa2"  # global, because transformers' models call attention by name


def use_attention(choice: AttentionChoice) -> None:
    """Activate the chosen kernel for this process."""
    global _kernel
    _kernel = choice.kernel
    if choice.kernel != "sdpa":
        flash.activate(choice.kernel)


def uses_short_kernels() -> bool:
    """Return whether this process uses verl's kernels for short documents."""
    return _kernel == "short"


def packed_kwargs(batch: Batch) -> dict[str, Any]:
    """Return the arguments that a transformers model passes on to its attention.

    The names are those of transformers for packed batches. Only `context` and `prefixes` are verl's own.
    """
    return {
        "context": dist.context_name() if batch.parts > 1 else "",
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        **({} if batch.prefixes is None else {"prefixes": batch.prefixes}),
    }


@contextmanager
def attention_kept() -> Iterator[None]:
    """Restore the attention kernel of this process at the end of this context."""
    global _kernel
    before, had_fa3 = _kernel, flash.is_fa3_active()
    try:
        yield
    finally:
        _kernel = before
        flash.activate("fa3" if had_fa3 else "fa2")


def has_flash(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether FlashAttention, at least the version inside PyTorch, supports this device and dtype."""
    return device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def packed_attention(
    module: nn.Module,
    query_1NTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each document, with the signature of transformers' attention functions.

    Args:
        cu_seq_lens_q: offsets of the documents, int32; see `flash_attention`.
        max_length_q: length of the longest document, or more.
        options: other arguments of transformers, such as `scaling` and `sliding_window`; and `context`, the name of the group of ranks that
            share the batch's tokens, or "" if this rank has all tokens; and `prefixes` of documents, if any (`verl.data.prefixes`).
    Returns:
        output_1TND and None (no attention weights).
    Raises:
        UserError: the architecture needs an option that is not supported, or does not pass the document bounds on.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise UserError(f"{type(module).__name__} does not pass document bounds to its attention", fix=USE_ANOTHER)
    for option, name in UNSUPPORTED.items():
        if (value := options.get(option)) is not None and (not value if option == "is_causal" else isinstance(value, Tensor) or value):
            raise UserError(f"{type(module).__name__} needs {name}, which packed attention does not have", fix=USE_ANOTHER)
    scaling, sliding_window, context = options.get("scaling"), options.get("sliding_window"), options.get("context")
    if context is None and dist.context_size() > 1:
        raise UserError(f"{type(module).__name__} does not pass its arguments on to its attention", fix=USE_ANOTHER)
    query_TND, key_TKD, value_TKD = (x.squeeze(0).transpose(0, 1) for x in (query_1NTD, key_1KTD, value_1KTD))
    if context:
        from verl.models.attention.ulysses import to_heads, to_tokens  # only where ranks share a batch

        query_TND, key_TKD, value_TKD = to_heads((query_TND, key_TKD, value_TKD), context)
    soft_cap, sink_N = options.get("softcap"), options.get("s_aux")
    if sink_N is not None and context:
        raise UserError(f"{type(module).__name__} needs attention sinks, which a split document does not have", fix=USE_ANOTHER)
    options, prefixes = {"scale": scaling, "sliding_window": sliding_window}, options.get("prefixes")
    is_plain = soft_cap is None and sink_N is None and query_TND.shape[-1] <= flash.LARGEST_HEAD
    if prefixes is not None:  # FlashAttention has no windows that reach into a prefix
        is_plain = is_plain and (sliding_window is None or sliding_window >= prefixes.longest_document)
    if not (is_plain and _kernel != "sdpa" and has_flash(query_TND.device.type, query_TND.dtype)):
        from verl.models.attention.plain import attention_per_document  # FlashAttention has no use for it

        bounds, options = prefixes or cu_seq_lens_q, {**options, "soft_cap": soft_cap, "sink_N": sink_N}
        output_TND = attention_per_document(query_TND, key_TKD, value_TKD, bounds, **options)
    elif prefixes is not None:
        from verl.models.attention.shared import shared_attention  # only where documents share a prefix

        output_TND = shared_attention(query_TND, key_TKD, value_TKD, prefixes, scale=scaling, short=uses_short_kernels())
    else:
        output_TND = flash.flash_attention(query_TND, key_TKD, value_TKD, cu_seq_lens_q, max_length_q, kernel=_kernel, **options)
    if context:
        output_TND = to_tokens(output_TND, query_1NTD.shape[1], context)
    return output_TND.unsqueeze(0), None


# No mask function is registered under this name, so transformers makes no mask. It also does not search the positions for documents, for
# which the host would wait for the device.
AttentionInterface.register(PACKED, packed_attention)
