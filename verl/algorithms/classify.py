"""Classification: each text gets one of n labels, several of them, or a number.

Documents are texts or chats with a label; the scorer is a LabelScorer. The losses are those of transformers' classes for sequence
classification: cross-entropy; binary cross-entropy, a mean over labels; squared error.

Dimensions: S documents; L labels; N documents of the data set.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from verl.data.batch import Batch
from verl.engine.contract import LossOut, ScoreOut
from verl.errors import UserError, one_of

scorer, trains = "labels", "a classifier"
PROBLEMS = ("one", "several", "number")


@dataclass
class Settings:
    # Names of the labels, in the order of the model's outputs; null: those of the classifier that the run starts from, else those of the
    # training rows, sorted.
    labels: list[str] | None = None
    # Labels of a row: "one", a text or a whole number; "several", a list of these, which may be empty; or a "number" in place of a label,
    # which is predicted by least squares.
    problem: str = "one"

    def check(self) -> None:
        """Raises UserError: a value is wrong."""
        one_of("problem", self.problem, PROBLEMS)
        if self.labels is None:
            return
        if self.problem == "number":
            raise UserError("a number has no labels", where="labels", fix="remove this key, or set algorithm.problem=one")
        if twice := [name for name in dict.fromkeys(self.labels) if self.labels.count(name) > 1]:
            raise UserError(f"names {twice[0]!r} twice", where="labels", fix="name each label once")
        if len(self.labels) < (2 if self.problem == "one" else 1):
            raise UserError(f"{len(self.labels)} labels leave nothing to choose", where="labels", fix="name at least two")


class Loss:
    """The loss of classification, a sum over documents.

    Args:
        labels_N: the label of each document of the data set: its number, int64 [N]; of several, which it has, float32 [N, L]; or a number,
            float32 [N].
    Attributes:
        predicted: the rows' numbers and predictions of each batch, in host memory, while they are kept; None: they are not.
    """

    def __init__(self, settings: Settings, labels_N: Tensor):
        self._problem, self._labels_N = settings.problem, labels_N
        self.predicted: list[tuple[Tensor, Tensor]] | None = None

    def loss(self, out: ScoreOut, batch: Batch) -> LossOut:
        """Compute the loss of one micro-batch. Metrics are means over documents: `accuracy`, or `mean_absolute_error` of a number."""
        numbers_S = batch.sample_ids_S[: batch.documents]
        label_S = self._labels_N.to(out.score_S.device)[numbers_S]
        loss_S, metric, predicted_S = self._of(out.score_S, label_S)
        if self.predicted is not None:
            self.predicted.append((numbers_S.cpu(), predicted_S.cpu()))
        name = "mean_absolute_error" if self._problem == "number" else "accuracy"
        return LossOut(loss_S.sum() / batch.parts, {}, {name: metric.detach().sum() / batch.parts})

    def _of(self, score_SL: Tensor, label_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the metric and the prediction of each document."""
        if self._problem == "number":
            error_S = score_SL.squeeze(-1) - label_S
            return error_S.square(), error_S.abs(), score_SL.detach().squeeze(-1)
        if self._problem == "several":
            loss_S = F.binary_cross_entropy_with_logits(score_SL, label_S, reduction="none").mean(-1)
            predicted_SL = score_SL.detach() > 0  # a probability above a half
            return loss_S, (predicted_SL == (label_S > 0)).all(-1).float(), predicted_SL
        predicted_S = torch.argmax(score_SL.detach(), -1)
        return F.cross_entropy(score_SL, label_S, reduction="none"), (predicted_S == label_S).float(), predicted_S

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        """Return the number of documents, divided by the number of processes that share the batch."""
        return batch.documents / batch.parts
