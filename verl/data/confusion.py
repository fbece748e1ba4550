"""What a classifier takes for what: counts of actual and predicted labels, and the measures that follow from them.

Dimensions: N rows, L labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from verl.data.labels import Labels

MOST_SHOWN = 20  # labels in a table


@dataclass(frozen=True, eq=False)
class Confusion:
    """Counts of labels.

    Attributes:
        rows, exact: the rows, and those whose label, or whose labels are all predicted and no others.
        actual_L, predicted_L, right_L: rows that have a label, for which it is predicted, and both.
        counts_LL: rows by their label and, across, the predicted one; None if a row has several labels.
    """

    labels: Labels
    rows: int
    exact: int
    actual_L: np.ndarray
    predicted_L: np.ndarray
    right_L: np.ndarray
    counts_LL: np.ndarray | None

    @staticmethod
    def of(labels: Labels, actual_N: np.ndarray, predicted_N: np.ndarray) -> "Confusion":
        """Count.

        Args:
            actual_N, predicted_N: the label's number of each row; of several labels, [N, L], which it has.
        """
        many = len(labels.names)
        if labels.problem == "several":
            has_NL, said_NL = (np.asarray(one).reshape(-1, many) > 0 for one in (actual_N, predicted_N))
            exact = int((has_NL == said_NL).all(1).sum())
            return Confusion(labels, len(has_NL), exact, has_NL.sum(0), said_NL.sum(0), (has_NL & said_NL).sum(0), None)
        actual_N, predicted_N = (np.asarray(one, dtype=np.int64) for one in (actual_N, predicted_N))
        counts_LL = np.bincount(actual_N * many + predicted_N, minlength=many * many).reshape(many, many)
        right_L = counts_LL.diagonal()
        return Confusion(labels, len(actual_N), int(right_L.sum()), counts_LL.sum(1), counts_LL.sum(0), right_L, counts_LL)

    @property
    def accuracy(self) -> float:
        """Return the share of rows that are right; with several labels, of rows all of whose labels are."""
        return self.exact / max(1, self.rows)

    @property
    def f1(self) -> np.ndarray:
        """Return 2 right / (actual + predicted) of each label, float64 [L]; 0 for one that is nowhere."""
        f1_L: np.ndarray = 2 * self.right_L / np.maximum(1, self.actual_L + self.predicted_L)
        return f1_L

    @property
    def macro_f1(self) -> float:
        """Return the mean F1 of the labels that are a row's or are predicted for one, as scikit-learn has it."""
        is_there_L = self.actual_L + self.predicted_L > 0
        return float(self.f1[is_there_L].mean()) if is_there_L.any() else 0.0

    def metrics(self, prefix: str, most_named: int) -> dict[str, float]:
        """Return macro F1, and the F1 of each label if there are not too many."""
        found = {f"{prefix}macro_f1": self.macro_f1}
        if len(self.labels.names) > most_named:
            return found
        return found | {f"{prefix}f1/{name}": float(f1) for name, f1 in zip(self.labels.shown, self.f1, strict=True)}

    def table(self) -> list[dict[str, Any]]:
        """Return the counts and measures of each label."""
        precision_L, recall_L = (self.right_L / np.maximum(1, of_L) for of_L in (self.predicted_L, self.actual_L))
        columns = (self.actual_L, self.predicted_L, self.right_L, precision_L, recall_L, self.f1)
        names = ("rows", "predicted", "right", "precision", "recall", "f1")
        return [
            {"label": label, **{name: one.item() for name, one in zip(names, values, strict=True)}}
            for label, *values in zip(self.labels.names, *columns, strict=True)
        ]

    def describe(self) -> str:
        """Return accuracy, macro F1 and the counts of each label, over several lines."""
        lines = [f"accuracy {self.accuracy:.4f}, macro F1 {self.macro_f1:.4f} of {self.rows:,} rows"]
        for label, one in zip(self.labels.shown[:MOST_SHOWN], self.table(), strict=False):
            counts = f"{one['rows']:,} rows, {one['predicted']:,} predicted, {one['right']:,} right"
            lines.append(f"  {label}: {counts}; precision {one['precision']:.3f}, recall {one['recall']:.3f}, F1 {one['f1']:.3f}")
        more = len(self.labels.names) - MOST_SHOWN
        return "\n".join([*lines, *([f"  and {more:,} more labels"] if more > 0 else [])])
