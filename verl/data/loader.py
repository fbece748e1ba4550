"""The rows of each optimizer step, and one rank's micro-batches of them, prepared ahead in a thread.

The order of rows, and in a mixture their choice, depends on (seed, epoch) alone, and each step takes the next slice of it. So the rows of
a step do not depend on the number of ranks, and a resumed run continues at the next step.
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


class RowChoice(Protocol):
    """The choice of an epoch's rows, as in verl.data.mixture."""

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the numbers of an epoch's rows in their order, int64 [rows]; none is there twice."""
        ...


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

    @property
    def choice(self) -> RowChoice | None: ...

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
        share_prompts: whether the documents of a row are packed with their common beginning once.
    """

    rows: int
    token_budget: int | None
    multiple_of_tokens: int = 1
    share_prompts: bool = False


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


def epoch_rows(documents: TokenizedRows) -> int:
    """Return the number of rows of an epoch."""
    return len(documents) if documents.choice is None else documents.choice.rows


def epoch_order(documents: TokenizedRows, seed: int, epoch: int) -> np.ndarray:
    """Return the numbers of an epoch's rows in their order, int64 [epoch_rows]."""
    return row_order(len(documents), seed, epoch) if documents.choice is None else documents.choice.order(seed, epoch)


def epoch_lengths(documents: TokenizedRows, seed: int) -> np.ndarray:
    """Return the lengths of the documents of the first epoch, in tokens."""
    if documents.choice is None:
        return documents.lengths_N
    lengths: np.ndarray = documents.lengths_N.reshape(-1, documents.documents_per_row)[documents.choice.order(seed, 0)].ravel()
    return lengths


def describe_steps(rows: int, rows_per_step: int, kind: str = "rows") -> str:
    """Say how many rows a step has, such as `256 rows, the last of an epoch of 49 (7,473 = 29 × 256 + 49)`.

    Args:
        rows: rows of an epoch.
        kind: what rows are called.
    """
    steps, rest = divmod(rows, rows_per_step)
    if not steps:
        return f"{rows:,} {kind if rows > 1 else kind[:-1]}, all that there are ({rows_per_step:,} would fit)"
    last = f", the last of an epoch of {rest:,} ({rows:,} = {steps:,} × {rows_per_step:,} + {rest:,})" if rest else ""
    return f"{rows_per_step:,} {kind if rows_per_step > 1 else kind[:-1]}{last}"


def describe_untrained(rows: int, rows_per_step: int, total_steps: int, kind: str = "rows") -> str:
    """Say how many rows are not trained where the run ends within an epoch; empty if it does not."""
    epochs, steps = divmod(total_steps, -(-rows // rows_per_step))
    left = rows - steps * rows_per_step
    return f"the run ends within epoch {epochs + 1}: {left:,} of its {rows:,} {kind} are not trained" if steps else ""


def micro_batches(
    documents: TokenizedRows, rows: np.ndarray, packing: Packing, *, rank: int = 0, world_size: int = 1, part: int = 0, parts: int = 1
) -> list[Batch]:
    """Return one rank's micro-batches of the given rows. Every rank computes the same plan and takes its part of it.

    Args:
        rank, world_size: data-parallel rank and size.
        part, parts: context-parallel rank and size; these ranks share each micro-batch, and each takes a slice of its tokens.
    """
    numbers_RK = rows[:, None] * documents.documents_per_row + np.arange(documents.documents_per_row)
    if packing.share_prompts and packing.token_budget is not None:
        from verl.data.groups import micro_batches_of_rows  # pairs alone

        limits = {"token_budget": packing.token_budget, "multiple_of_tokens": packing.multiple_of_tokens}
        return micro_batches_of_rows(numbers_RK.tolist(), documents.document, documents.values, rank=rank, world_size=world_size, **limits)
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
        return -(-epoch_rows(self.documents) // self.rows_per_step)

    def rows(self, number: int) -> np.ndarray:
        """Return the numbers of the rows of step `number`, over all ranks."""
        epoch, within = divmod(number, self.steps_per_epoch)
        first = within * self.rows_per_step
        return epoch_order(self.documents, self.seed, epoch)[first : first + self.rows_per_step]

    def step(self, number: int) -> Step:
        """Build step `number`, counted from 0 over all epochs."""
        epoch, rows = number // self.steps_per_epoch, self.rows(number)
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
        each, plural = (f"each of {self.world_size} ", "s") if many else ("one ", "")
        owners = each + (f"process{'es' * many}" if self.parts == 1 else f"group{plural} of {self.parts} processes")
        in_epoch = epoch_rows(self.documents)
        untrained = describe_untrained(in_epoch, self.rows_per_step, total_steps, rows)
        return (
            f"{total_steps:,} step{'s' if total_steps > 1 else ''} ({self.steps_per_epoch:,} an epoch) of "
            f"{describe_steps(in_epoch, self.rows_per_step, rows)}, in micro-batches of {budget} on {owners}"
            f"{f'; {untrained}' if untrained else ''}"
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
