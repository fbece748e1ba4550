"""What is measured at each validation: the loss over the validation rows, and the answers to a few of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from verl import dist
from verl.data.batch import Batch
from verl.data.documents import Documents
from verl.data.loader import Loader
from verl.engine.build import Built
from verl.engine.contract import Algorithm
from verl.errors import AbandonedError
from verl.run import Run
from verl.trainer.samples import Samples

VALIDATION_ROWS = 1024  # rows that are packed at a time


@dataclass(frozen=True)
class Validation:
    """Measures the model in training. Every rank calls its methods, after the same steps.

    Attributes:
        loader: loader of the training rows, whose packing is that of the validation.
        samples: the rows that are answered, or None.
    """

    rows: Documents
    algorithm: Algorithm
    loader: Loader
    built: Built
    run: Run
    samples: Samples | None

    def names(self, step: int) -> dict[str, float]:
        """Return metrics by the names that `measure` will give them, of only a few rows."""
        answered = {} if self.samples is None else dict.fromkeys(self.samples.names, 0.0)
        return self._losses(step, most=dist.data_size()) | answered

    def measure(self, step: int) -> dict[str, float]:
        """Return the metrics after a step. If the run stops meanwhile, there are none."""
        found = self._losses(step)
        if self.samples is None or not found:
            return found
        answered = self.samples.answer(step)
        return {} if answered is None else found | answered

    def _losses(self, step: int, most: int | None = None) -> dict[str, float]:
        """Compute the mean loss and metrics over at most so many rows, packed like training rows."""
        total = len(self.rows) if most is None else min(most, len(self.rows))
        self.run.enter("validating", step, limited=True)
        try:
            found = self.built.engine.evaluate(self._batches(total), self.algorithm)
        except AbandonedError:  # on every rank
            return {}
        return {f"val/{name}": float(value) for name, value in found.items()}

    def _batches(self, total: int) -> Iterator[Batch]:
        for first in range(0, total, VALIDATION_ROWS):
            for batch in self.loader.micro_batches(self.rows, np.arange(first, min(first + VALIDATION_ROWS, total))):
                if self.run.should_stop():
                    raise AbandonedError("the run stops")
                dist.moved()
                yield batch


@contextmanager
def validating(
    rows: Documents | None, algorithm: Algorithm, loader: Loader, built: Built, run: Run, samples: Samples | None = None
) -> Iterator[Validation | None]:
    """In this context, a run validates. It is None if there are no validation rows.

    Raises:
        UserError: the model cannot generate answers.
    """
    if rows is None:
        yield None
        return
    try:
        if samples is not None:
            samples.begin(built)
        yield Validation(rows, algorithm, loader, built, run, samples)
    finally:
        if samples is not None:
            samples.close()
