"""The packed batch, from the data loader to the loss: documents concatenated along one dimension.

Dimensions: T tokens of the batch, or of this rank's slice under context parallelism; S documents of the whole batch; M trained positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from verl.data.prefixes import Prefixes

# Fields of reinforcement learning, with one value per trained position.
VALUES = ("advantage_M", "old_logprob_M", "ref_logprob_M", "rollout_logprob_M", "value_M", "return_M")


@dataclass
class Batch:
    """A packed micro-batch. Document s is `[cu_seqlens[s], cu_seqlens[s + 1])`; no token attends to another document.

    Attributes:
        input_ids_T: token ids, int64.
        position_ids_T: positions, restarting at 0 in each document, int64.
        cu_seqlens: S + 1 ascending offsets from 0 to the number of tokens, int32.
        max_seqlen: length of the longest document, in tokens.
        target_T: next token of the same document, int64; 0 at a document's last token, which has no target.
        loss_mask_T: whether the *target* at this position is trained, bool.
        sample_ids_S: row number of each document in its data set; -1 for filler.
        trained_M: indices where loss_mask_T is true, ascending, int64; computed on the host, so that no step waits for the device.
        parts: ranks that share the tokens. With several, fields that end in _T or _M hold this rank's slice, which may cut
            documents and may have no trained token; cu_seqlens, max_seqlen and sample_ids_S describe the whole batch on every rank.
        first_token: index of this rank's first token in the whole batch.
        has_filler: whether the last document is filler.
        prefixes: beginnings that documents share (`verl.data.prefixes`), which are a part of the last, filling document; None: none.
        real_T: which tokens belong to a row, bool; None: all do. The others are filler or padding.

    For reinforcement learning, one float32 value per trained position, in the order of trained_M, or None if not computed:
        advantage_M: advantage of the token.
        old_logprob_M: log-probability under the policy before the batch's first update.
        ref_logprob_M: log-probability under the reference model.
        rollout_logprob_M: log-probability under the weights and arithmetic that sampled the token.
        value_M: the critic's value before the token, computed when the answers were scored.
        return_M: regression target of the critic.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    target_T: Tensor
    loss_mask_T: Tensor
    sample_ids_S: Tensor
    trained_M: Tensor
    parts: int = 1
    first_token: int = 0
    has_filler: bool = False
    prefixes: "Prefixes | None" = None
    real_T: Tensor | None = None
    advantage_M: Tensor | None = None
    old_logprob_M: Tensor | None = None
    ref_logprob_M: Tensor | None = None
    rollout_logprob_M: Tensor | None = None
    value_M: Tensor | None = None
    return_M: Tensor | None = None

    @property
    def documents(self) -> int:
        """Number of documents, without filler."""
        return len(self.sample_ids_S) - self.has_filler

    def part(self, number: int, parts: int) -> "Batch":
        """Return the contiguous slice of tokens of one of the ranks that share this batch.

        Args:
            number: index of the slice, from 0.
            parts: number of equal slices; it must divide the number of tokens.
        """
        assert self.prefixes is None, "ranks cannot share the tokens of documents that share a prefix"
        tokens, rest = divmod(len(self.input_ids_T), parts)
        assert rest == 0, f"{len(self.input_ids_T)} tokens cannot be split into {parts} equal parts"
        here = slice(number * tokens, (number + 1) * tokens)
        mine_M = (self.trained_M >= here.start) & (self.trained_M < here.stop)
        values = {name: value[mine_M] for name in VALUES if (value := getattr(self, name)) is not None}
        return replace(
            self,
            input_ids_T=self.input_ids_T[here],
            position_ids_T=self.position_ids_T[here],
            target_T=self.target_T[here],
            loss_mask_T=self.loss_mask_T[here],
            real_T=None if self.real_T is None else self.real_T[here],
            trained_M=self.trained_M[mine_M] - here.start,
            parts=parts,
            first_token=here.start,
            **values,
        )

    def real_lengths(self) -> list[int]:
        """Return the number of tokens of each document in this slice, without padding. A document of filler alone keeps its length."""
        bounds = (self.cu_seqlens.long() - self.first_token).clamp(0, len(self.input_ids_T))
        real_T = torch.ones_like(self.input_ids_T) if self.real_T is None else self.real_T
        real, lengths = F.pad(real_T.cumsum(0), (1, 0))[bounds].diff(), bounds.diff()
        return list(torch.where(real > 0, real, lengths).tolist())

    def to(self, device: torch.device | str) -> "Batch":
        """Return a copy on the device; a copy from pinned memory is asynchronous."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """Return a copy in pinned host memory."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **tensors, prefixes=self.prefixes and self.prefixes.with_offsets(change))
