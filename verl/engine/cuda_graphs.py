"""Small micro-batches as CUDA graphs: launching their kernels one by one takes longer than running them.

A graph is a recording of kernels with their shapes and addresses, so a batch is filled up to one of a few sizes and copied to
where the recording reads it. The first batch of a size runs as it is written, the second is recorded, and from then on the
recording is played: the same kernels with the same shapes, so that a resumed run, which begins without recordings, computes
the same. What is filled in is untrained and counts for nothing.

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

LARGEST_NUMBER = 16  # of recordings
FIRST_STEPS = 2  # run as they are written: layers are compiled in them
# Sizes are multiples of these: the smaller, the less is filled in, and the more recordings there are.
TOKENS, DOCUMENTS, SHARE_TRAINED = 1024, 64, 8


@dataclass(frozen=True)
class Size:
    """What a recording's kernels were launched for."""

    tokens: int
    documents: int
    trained: int
    max_seqlen: int

    @classmethod
    def of(cls, batch: Batch) -> "Size":
        """The smallest that holds the batch and one more document, of what is filled in."""
        tokens, trained = filled_up(len(batch.input_ids_T), len(batch.trained_M))
        return cls(tokens, _up(len(batch.cu_seqlens), DOCUMENTS), trained, 1 << (max(batch.max_seqlen, TOKENS) - 1).bit_length())


def filled_up(tokens: int, trained: int) -> tuple[int, int]:
    """Tokens and trained positions of a recording that holds so many."""
    tokens = _up(tokens, TOKENS)
    return tokens, _up(trained, tokens // SHARE_TRAINED)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def fill_up(batch: Batch, size: Size) -> tuple[Batch, Tensor]:
    """The batch with untrained tokens behind it, in a document of their own, and more documents without any.

    Returns:
        the batch, and real_M: 1.0 for its trained positions, 0.0 for those filled in, float32.
    """
    tokens, trained = len(batch.input_ids_T), len(batch.trained_M)
    more = size.tokens - tokens

    def behind(values: Tensor, filler: Tensor) -> Tensor:
        return torch.cat([values, filler.to(values.dtype)])

    nothing, end = torch.zeros(more, dtype=torch.int64), size.tokens - 1
    filled = replace(
        batch,
        input_ids_T=behind(batch.input_ids_T, nothing),
        position_ids_T=behind(batch.position_ids_T, torch.arange(more)),
        cu_seqlens=behind(batch.cu_seqlens, torch.full((size.documents + 1 - len(batch.cu_seqlens),), size.tokens)),
        max_seqlen=size.max_seqlen,
        target_T=behind(batch.target_T, nothing),
        loss_mask_T=behind(batch.loss_mask_T, nothing),
        sample_ids_S=behind(batch.sample_ids_S, torch.full((size.documents - len(batch.sample_ids_S),), -1)),
        trained_M=behind(batch.trained_M, torch.full((size.trained - trained,), end)),
    )
    return filled, (torch.arange(size.trained) < trained).float()


@dataclass
class _Recording:
    """A graph, and where it reads its batch."""

    replay: Callable[[], "LossOut"]
    batch: Batch
    real_M: Tensor


class CapturedBackward:
    """The forward and backward pass of a step's only micro-batch, where it is small and the algorithm knows its slope beforehand.

    Args:
        scorer: whose parameters get the gradients.
        largest_tokens: of a micro-batch that is recorded.
        record: whether to record; else every batch is filled up and run as it is written.
    """

    def __init__(self, scorer: Scorer, device: torch.device, largest_tokens: int, *, record: bool = True):
        self.scorer, self.device, self.record = scorer, device, record
        self._largest_tokens = largest_tokens
        self._scale = torch.zeros((), device=device)
        self._gradients: dict[torch.nn.Parameter, Tensor] = {}
        self._recordings: dict[Size, _Recording] = {}
        self._ran: set[Size] = set()
        self._steps = 0
        self._pool: Any = None

    def backward(self, batch: Batch, algorithm: "Algorithm", scale: Tensor) -> "LossOut | None":
        """Give the parameters the batch's gradient and return its loss; or do nothing and return None.

        Args:
            batch: in host memory.
            scale: what the loss is multiplied with, a scalar on the device.
        """
        if len(batch.input_ids_T) > self._largest_tokens or batch.parts > 1 or not isinstance(algorithm.slope(batch), Tensor):
            return None
        self._steps += 1
        self._take_gradients()
        self._scale.copy_(scale)
        size = Size.of(batch)
        filled, real_M = fill_up(batch, size)
        if not self._plays(size):
            return self._run(filled.to(self.device), real_M.to(self.device), algorithm)
        if size not in self._recordings:
            self._recordings[size] = self._capture(filled.to(self.device), real_M.to(self.device), algorithm)
        recording = self._recordings[size]
        for field in fields(Batch):
            if isinstance(place := getattr(recording.batch, field.name), Tensor):
                place.copy_(getattr(filled, field.name), non_blocking=True)
        recording.real_M.copy_(real_M, non_blocking=True)
        return recording.replay()

    def _plays(self, size: Size) -> bool:
        """Whether there is a recording of this size, or it is time for one."""
        if size in self._recordings:
            return True
        seen = size in self._ran
        self._ran.add(size)
        return seen and self._steps > FIRST_STEPS and len(self._recordings) < LARGEST_NUMBER

    def _take_gradients(self) -> None:
        """Put the same tensors under the parameters as at every time, since that is where recordings add."""
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
        # Other threads pin the next batches meanwhile, which a capture of all threads would forbid.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = self._run(batch, real_M, algorithm)
        self._pool = graph.pool()

        def replay() -> "LossOut":
            graph.replay()
            return result

        return _Recording(replay, batch, real_M)
