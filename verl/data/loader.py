"""The rows of each optimizer step, and one rank's micro-batches of them, prepared ahead in a thread.

The order of rows depends on (seed, epoch) alone, and each step takes the next slice of it. So the rows of a step do not depend on the
number of ranks, and a resumed run continues at the next step.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from verl.config.shared import TrainerConfig
from verl.data.batch import Batch
from verl.data.pack import Document, collate, pack, pad_groups

AHEAD = 2  # steps prepared while the device works


class TokenizedRows(Protocol):
    """Tokenized documents with random access. The documents of a row are consecutive and stay in one micro-batch."""

    @property
    def lengths_N(self) -> np.ndarray: ...  # noqa: N802

    @property
    def trained_N(self) -> np.ndarray: ...  # noqa: N802

    @property
    def documents_per_row(self) -> int: ...

    @property
    def values(self) -> Mapping[str, Sequence[np.ndarray]]: ...

    def __len__(self) -> int: ...

    def document(self, index: int) -> Document: ...


@dataclass(frozen=True)
class Packing:
    """How rows become micro-batches.

    Attributes:
        rows: rows of a padded micro-batch.
        token_budget: maximum tokens of a packed micro-batch; None pads instead of packing.
        multiple_of_tokens: each rank's slice of a packed micro-batch is filled up to a multiple of this length, which makes matmuls
            faster on GPUs.
    """

    rows: int
    token_budget: int | None
    multiple_of_tokens: int = 1


@dataclass(frozen=True)
class Step:
    """One optimizer step, as seen by one rank.

    Attributes:
        number: index of the step, from 0 over all epochs.
        tokens, trained_tokens: totals over all ranks, without filler.
        micro_batches: this rank's micro-batches; every rank has the same number.
    """

    number: int
    epoch: int
    tokens: int
    trained_tokens: int
    micro_batches: list[Batch]


def row_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the rows in an epoch, int64 [rows]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def micro_batches(
    documents: TokenizedRows, rows: np.ndarray, packing: Packing, *, rank: int = 0, world_size: int = 1, part: int = 0, parts: int = 1
) -> list[Batch]:
    """Return one rank's micro-batches of the given rows. Every rank computes the same plan and takes its part of it.

    Args:
        rank, world_size: data-parallel rank and size.
        part, parts: context-parallel rank and size; these ranks share each micro-batch, and each takes a slice of its tokens.
    """
    numbers_RK = rows[:, None] * documents.documents_per_row + np.arange(documents.documents_per_row)
    lengths = documents.lengths_N[numbers_RK].sum(1).tolist()
    if packing.token_budget is None:
        groups = pad_groups(lengths, rows=packing.rows, multiple_of=world_size)
    else:
        groups = pack(lengths, token_budget=packing.token_budget, multiple_of=world_size)
    pad = packing.token_budget is None
    fill = parts * (1 if pad else packing.multiple_of_tokens)
    whole = [_collated(documents, numbers_RK[group].ravel().tolist(), pad, fill) for group in groups[rank::world_size]]
    return whole if parts == 1 else [batch.part(part, parts) for batch in whole]


def _collated(documents: TokenizedRows, numbers: list[int], pad: bool, fill: int) -> Batch:
    values = {name: [arrays[number] for number in numbers] for name, arrays in documents.values.items()}
    return collate([documents.document(number) for number in numbers], numbers, pad=pad, multiple_of_tokens=fill, values=values)


@dataclass(frozen=True)
class Loader:
    """The steps of a training run.

    Attributes:
        rows_per_step: global batch size in rows; the last step of an epoch may have fewer.
        rank, world_size: data-parallel rank and size.
        part, parts: context-parallel rank and size.
        pin: whether to pin the batches' memory, so that copies to a GPU are asynchronous.
    """

    documents: TokenizedRows
    packing: Packing
    rows_per_step: int
    seed: int
    rank: int = 0
    world_size: int = 1
    part: int = 0
    parts: int = 1
    pin: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.documents) // self.rows_per_step)

    def step(self, number: int) -> Step:
        """Build step `number`, counted from 0 over all epochs."""
        epoch, within = divmod(number, self.steps_per_epoch)
        first = within * self.rows_per_step
        rows = row_order(len(self.documents), self.seed, epoch)[first : first + self.rows_per_step]
        batches = self.micro_batches(self.documents, rows)
        return Step(
            number=number,
            epoch=epoch,
            tokens=int(self._of_rows(self.documents.lengths_N)[rows].sum()),
            trained_tokens=int(self._of_rows(self.documents.trained_N)[rows].sum()),
            micro_batches=[batch.pin() for batch in batches] if self.pin else batches,
        )

    def total_steps(self, config: TrainerConfig) -> int:
        """Optimizer steps of the whole run."""
        return config.total_training_steps or self.steps_per_epoch * config.total_epochs

    def describe(self, total_steps: int) -> str:
        """Its steps and their micro-batches, for a run's first lines."""
        many, packing = self.world_size > 1, self.packing
        rows = "rows" if self.documents.documents_per_row == 1 else "pairs"
        budget = f"up to {packing.token_budget:,} packed tokens" if packing.token_budget else f"{packing.rows} padded rows"
        owners = ("processes" if many else "process") if self.parts == 1 else f"group{'s' if many else ''} of {self.parts} processes"
        return (
            f"{total_steps:,} steps ({self.steps_per_epoch:,} an epoch) of {self.rows_per_step} {rows}, "
            f"in micro-batches of {budget} on each of {self.world_size} {owners}"
        )

    def _of_rows(self, values_N: np.ndarray) -> np.ndarray:
        return values_N.reshape(-1, self.documents.documents_per_row)

    def micro_batches(self, documents: TokenizedRows, rows: np.ndarray) -> list[Batch]:
        """Return this rank's micro-batches of the rows, in host memory. `documents` may be a data set other than `self.documents`."""
        ranks = {"rank": self.rank, "world_size": self.world_size, "part": self.part, "parts": self.parts}
        return micro_batches(documents, rows, self.packing, **ranks)

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield steps `start` to `stop - 1`, each prepared ahead of time."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as worker:
            ahead: list[Future[Step]] = []
            for number in range(start, stop):
                ahead += [worker.submit(self.step, n) for n in range(number + len(ahead), min(stop, number + AHEAD + 1))]
                yield ahead.pop(0).result()
