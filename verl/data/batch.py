"""The one batch that goes from file to loss: documents side by side in one dimension.

Dimensions: T tokens of the packed batch, or of this process's part of it; S documents in all of it; M trained positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# The fields with one value for each trained position that reinforcement learning adds.
VALUES = ("advantage_M", "old_logprob_M", "ref_logprob_M", "rollout_logprob_M", "value_M", "return_M")


@dataclass
class Batch:
    """A packed micro-batch. A document is `[cu_seqlens[s], cu_seqlens[s + 1])`; tokens of one never see another.

    Attributes:
        input_ids_T: token ids, int64.
        position_ids_T: positions, from 0 in each document, int64.
        cu_seqlens: S + 1 ascending offsets, int32, from 0 to T.
        max_seqlen: tokens of the longest document.
        target_T: the next token of the same document, int64; of a document's last token nothing is predicted, and the value is 0.
        loss_mask_T: whether the *target* at this position is trained, bool.
        sample_ids_S: number of each document's row in its data set; -1 for filler.
        trained_M: positions of loss_mask_T in ascending order, int64; made on the host, so that no step waits for the device.
        parts: processes over which the tokens are spread. With several, what ends in _T or _M is of this process's part,
            which may cut documents and may have no trained token; the documents are described whole on each.
        first_token: of this process's part, counted over all of them.
        has_filler: whether the last document is filler.

    For reinforcement learning, a float32 value for each trained position, in the order of trained_M; None: not known.
        advantage_M: how much better the token was than expected.
        old_logprob_M: log-probability under the policy before the batch's first update.
        ref_logprob_M: under the reference model.
        rollout_logprob_M: under the weights and arithmetic that drew the token.
        value_M: the critic's value before the token, when the answers were scored.
        return_M: what the critic is to learn.
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
    advantage_M: Tensor | None = None
    old_logprob_M: Tensor | None = None
    ref_logprob_M: Tensor | None = None
    rollout_logprob_M: Tensor | None = None
    value_M: Tensor | None = None
    return_M: Tensor | None = None

    @property
    def documents(self) -> int:
        """How many there are, without filler."""
        return len(self.sample_ids_S) - self.has_filler

    def part(self, number: int, parts: int) -> "Batch":
        """The tokens of one of several processes that share this batch: as many on each, one after the other.

        Args:
            number: of the process, from 0.
            parts: of which the number of tokens is a multiple.
        """
        tokens, rest = divmod(len(self.input_ids_T), parts)
        assert rest == 0, f"{len(self.input_ids_T)} tokens over {parts} processes"
        here = slice(number * tokens, (number + 1) * tokens)
        mine_M = (self.trained_M >= here.start) & (self.trained_M < here.stop)
        values = {name: value[mine_M] for name in VALUES if (value := getattr(self, name)) is not None}
        return replace(
            self,
            input_ids_T=self.input_ids_T[here],
            position_ids_T=self.position_ids_T[here],
            target_T=self.target_T[here],
            loss_mask_T=self.loss_mask_T[here],
            trained_M=self.trained_M[mine_M] - here.start,
            parts=parts,
            first_token=here.start,
            **values,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on the device; from pinned memory it does not wait."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """A copy in page-locked host memory."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)
