"""The steps of a method that reads more than tokens: numbers of the rows, a live reference, and what is estimated before a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from verl import dist
from verl.data.batch import Batch
from verl.data.loader import Loader, Step, TokenizedRows
from verl.data.numbered import NumberedRows
from verl.engine.engine import Engine
from verl.engine.references import AdapterOffReference


@dataclass(frozen=True)
class PreferenceLoader(Loader):
    """A loader whose micro-batches have all that the loss reads. Every rank goes through its steps, which the model may compute for.

    Attributes:
        loss: the loss of the method, see `verl.trainer.preference`.
        engine: the trained model, which computes the estimate with its weights before the step.
        reference: computes the reference's log-probabilities of each step; None: the documents have them, or there is no reference.
        validates: whether micro-batches are those of validation, whose estimates are computed as they are made.
    """

    loss: Any = None
    engine: Engine | None = None
    reference: AdapterOffReference | None = None
    validates: bool = False

    def micro_batches(self, documents: TokenizedRows, rows: np.ndarray) -> list[Batch]:
        """Return this rank's micro-batches of the rows, with their numbers."""
        batches = super().micro_batches(documents, rows)
        if not isinstance(documents, NumberedRows):
            return batches
        many = np.arange(len(documents)) if self.validates else rows
        numbered: list[Batch] = [documents.numbered(batch, many) for batch in batches]
        return self._estimated(documents, rows, numbered) if self.validates else numbered

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps, prepared ahead of time but for what depends on the weights before each of them."""
        for step in super().steps(start, stop):
            batches = self._with_reference(step.micro_batches)
            yield replace(step, micro_batches=self._estimated(self.documents, self.rows(step.number), batches))

    def _estimated(self, documents: TokenizedRows, rows: np.ndarray, batches: list[Batch]) -> list[Batch]:
        """Return the micro-batches of rows with the method's estimate, which is the same on all ranks."""
        others = getattr(documents, "mismatched", None)
        if others is None or not hasattr(self.loss, "estimate"):
            return batches
        assert self.engine is not None
        mine = super().micro_batches(others, rows)
        mine = mine if self.validates else self._with_reference(mine)
        outs = self.engine.score(mine)
        sums = [float(self.loss.estimate(out, batch.to(self.engine.device))) for batch, out in zip(mine, outs, strict=True)]
        (total,) = dist.total([sum(sums)])
        estimate = torch.tensor(total / max(1, len(rows)), dtype=torch.float32)
        return [replace(batch, estimate=estimate) for batch in batches]  # type: ignore[call-arg]

    def _with_reference(self, batches: Sequence[Batch]) -> list[Batch]:
        if self.reference is None:
            return list(batches)
        outs = self.reference.score(batches)
        return [replace(batch, ref_logprob_M=out.logprob_M) for batch, out in zip(batches, outs, strict=True)]


def preference_loader(loader: Loader, loss: Any, engine: Engine, reference: AdapterOffReference | None) -> PreferenceLoader:
    """Return a loader of the same steps whose micro-batches have all that the loss reads."""
    plain = {name: getattr(loader, name) for name in Loader.__dataclass_fields__}
    return PreferenceLoader(**plain, loss=loss, engine=engine, reference=reference)
