"""CUDA graphs for small micro-batches, whose kernels take longer to launch than to run.

A graph records kernels with fixed shapes and addresses, so each batch is padded to one of a few sizes and copied to the graph's input
tensors. The first batch of a size runs eagerly, the second is recorded, and later ones replay the recording. All of them run the same
kernels with the same shapes, so that a resumed run, which starts without recordings, computes the same. The padding is untrained and
does not affect the loss.

Dimensions: T tokens of the packed batch, M trained positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from verl.data.batch import Batch
from verl.engine.scorers import Scorer

if TYPE_CHECKING:
    from verl.engine.contract import Algorithm, LossOut

MAX_RECORDINGS = 16
EAGER_STEPS = 2  # the first steps run eagerly, because they compile the layers
# Granularity of the sizes: smaller values need less padding, but more recordings.
TOKENS, DOCUMENTS, SHARE_TRAINED = 1024, 64, 8


@dataclass(frozen=True)
class GraphSize:
    """The padded size of a recording's batch."""

    tokens: int
    documents: int
    trained: int
    max_seqlen: int

    @classmethod
    def of(cls, batch: Batch) -> "GraphSize":
        """Return the smallest size that holds the batch and one document of padding."""
        tokens, trained = filled_up(len(batch.input_ids_T), len(batch.trained_M))
        return cls(tokens, _up(len(batch.cu_seqlens), DOCUMENTS), trained, 1 << (max(batch.max_seqlen, TOKENS) - 1).bit_length())


def filled_up(tokens: int, trained: int) -> tuple[int, int]:
    """Round the numbers of tokens and trained positions up to those of a recording."""
    tokens = _up(tokens, TOKENS)
    return tokens, _up(trained, tokens // SHARE_TRAINED)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def fill_up(batch: Batch, size: GraphSize) -> tuple[Batch, Tensor]:
    """Pad a batch with a document of untrained tokens, and with empty documents.

    Returns:
        the padded batch, and real_M: 1.0 for its trained positions and 0.0 for padding, float32.
    """
    tokens, trained = len(batch.input_ids_T), len(batch.trained_M)
    more = size.tokens - tokens

    def append(values: Tensor, filler: Tensor) -> Tensor:
        return torch.cat([values, filler.to(values.dtype)])

    nothing, end = torch.zeros(more, dtype=torch.int64), size.tokens - 1
    filled = replace(
        batch,
        input_ids_T=append(batch.input_ids_T, nothing),
        position_ids_T=append(batch.position_ids_T, torch.arange(more)),
        cu_seqlens=append(batch.cu_seqlens, torch.full((size.documents + 1 - len(batch.cu_seqlens),), size.tokens)),
        max_seqlen=size.max_seqlen,
        target_T=append(batch.target_T, nothing),
        loss_mask_T=append(batch.loss_mask_T, nothing),
        real_T=None,
        sample_ids_S=append(batch.sample_ids_S, torch.full((size.documents - len(batch.sample_ids_S),), -1)),
        trained_M=append(batch.trained_M, torch.full((size.trained - trained,), end)),
    )
    return filled, (torch.arange(size.trained) < trained).float()


@dataclass
class _Recording:
    """A recorded graph and its input tensors."""

    replay: Callable[[], "LossOut"]
    batch: Batch
    real_M: Tensor


class CapturedBackward:
    """Forward and backward pass with CUDA graphs, for steps of one small micro-batch whose slope is known before the forward pass.

    Args:
        scorer: module whose parameters get the gradients.
        largest_tokens: largest micro-batch that is recorded.
        record: whether to record graphs; if false, every batch is padded and runs eagerly.
    """

    def __init__(self, scorer: Scorer, device: torch.device, largest_tokens: int, *, record: bool = True):
        self.scorer, self.device, self.record = scorer, device, record
        self._largest_tokens = largest_tokens
        self._scale = torch.zeros((), device=device)
        self._gradients: dict[torch.nn.Parameter, Tensor] = {}
        self._recordings: dict[GraphSize, _Recording] = {}
        self._ran: set[GraphSize] = set()
        self._steps = 0
        self._pool: Any = None

    def backward(self, batch: Batch, algorithm: "Algorithm", scale: Tensor) -> "LossOut | None":
        """Compute the batch's gradients and return its loss. Return None without computing anything if a graph cannot run the batch.

        Args:
            batch: batch in host memory.
            scale: factor that multiplies the loss, a scalar on the device.
        """
        is_plain = batch.parts == 1 and batch.prefixes is None
        if len(batch.input_ids_T) > self._largest_tokens or not is_plain or not isinstance(algorithm.slope(batch), Tensor):
            return None
        self._steps += 1
        self._attach_gradients()
        self._scale.copy_(scale)
        size = GraphSize.of(batch)
        filled, real_M = fill_up(batch, size)
        if not self._uses_recording(size):
            return self._run(filled.to(self.device), real_M.to(self.device), algorithm)
        if size not in self._recordings:
            self._recordings[size] = self._capture(filled.to(self.device), real_M.to(self.device), algorithm)
        recording = self._recordings[size]
        for field in fields(Batch):
            if isinstance(place := getattr(recording.batch, field.name), Tensor):
                place.copy_(getattr(filled, field.name), non_blocking=True)
        recording.real_M.copy_(real_M, non_blocking=True)
        return recording.replay()

    def _uses_recording(self, size: GraphSize) -> bool:
        """Return whether there is a recording of this size, or it should be made now."""
        if size in self._recordings:
            return True
        seen = size in self._ran
        self._ran.add(size)
        return seen and self._steps > EAGER_STEPS and len(self._recordings) < MAX_RECORDINGS

    def _attach_gradients(self) -> None:
        """Set each parameter's `.grad` to the same tensor in every step, because recordings write to fixed addresses."""
        if not self._gradients:
            self._gradients = {p: torch.empty_like(p) for p in self.scorer.parameters() if p.requires_grad}
        for p, gradient in self._gradients.items():
            p.grad = gradient

    def _run(self, batch: Batch, real_M: Tensor, algorithm: "Algorithm") -> "LossOut":
        torch._foreach_zero_(list(self._gradients.values()))
        slope_M = algorithm.slope(batch)
        assert isinstance(slope_M, Tensor)
        out = self.scorer(batch, slope_M * real_M * self._scale)
        out.logprob_M = out.logprob_M * real_M
        result = algorithm.loss(out, batch)
        (result.sum * self._scale).backward()
        return result.detached()

    def _capture(self, batch: Batch, real_M: Tensor, algorithm: "Algorithm") -> _Recording:
        if not self.record:
            return _Recording(lambda: self._run(batch, real_M, algorithm), batch, real_M)
        graph = torch.cuda.CUDAGraph()
        # thread_local, because the loader's thread pins the next batches during the capture, which a global capture would forbid.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = self._run(batch, real_M, algorithm)
        self._pool = graph.pool()

        def replay() -> "LossOut":
            graph.replay()
            return result

        return _Recording(replay, batch, real_M)
