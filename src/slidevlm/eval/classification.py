"""What every classification task reports, whatever made the scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from slidevlm.eval import metrics as m
from slidevlm.eval.bootstrap import Bootstrap, Resampled
from slidevlm.eval.task import TaskResult

log = logging.getLogger("slidevlm.eval")

_TOP = (3, 5)
# Means over classes: over other classes than the sample's where a resample lacks one.
_COMPLETE = ("balanced_accuracy", "auroc_ovr", "auroc_ovo")


class Classification:
    """The metrics of scores against true classes, on any resample.

    Args:
        y_true: [N] class numbers.
        scores: [N, C]; the predicted class is that of the greatest score, the first in a tie.
        classes: C names; of two classes the second is the positive one.
    """

    def __init__(self, y_true: np.ndarray, scores: np.ndarray, classes: Sequence[str]) -> None:
        self.y_true, self.scores, self.classes = y_true, scores, tuple(classes)
        self.y_pred = scores.argmax(1)
        self._place = m.ranks_of_truth(y_true, scores)

    def __call__(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """[N, R] counts -> [R] values of each metric."""
        matrix = m.confusion_matrices(self.y_true, self.y_pred, len(self.classes), counts)
        values = {
            "accuracy": m.accuracy(matrix),
            "balanced_accuracy": m.balanced_accuracy(matrix),
            "f1_macro": m.f1_macro(matrix),
            "f1_weighted": m.f1_weighted(matrix),
            "auroc_ovr": m.auroc_ovr(self.y_true, self.scores, counts),
            "auroc_ovo": m.auroc_ovo(self.y_true, self.scores, counts),
            "cohen_kappa": m.cohen_kappa(matrix),
        }
        for k in (k for k in _TOP if k < len(self.classes)):
            values[f"top_{k}_accuracy"] = m.mean(self._place <= k, counts)
        if len(self.classes) == 2:
            values |= m.binary(matrix)
            positive = self.y_true == 1
            values["average_precision"] = m.average_precision(positive, self.scores[:, 1], counts)
        return values

    def details(self) -> dict[str, Any]:
        """Confusion matrix and a table of the classes."""
        matrix = m.confusion_matrix(self.y_true, self.y_pred, len(self.classes))
        columns = {
            "specimens": matrix.sum(1),
            "predicted": matrix.sum(0),
            "precision": m.precisions(matrix),
            "recall": m.recalls(matrix),
            "f1": m.f1_scores(matrix),
            "auroc": np.array(
                [m.auroc(self.y_true == c, self.scores[:, c]) for c in range(len(self.classes))]
            ),
        }
        return {
            "classes": list(self.classes),
            "confusion_matrix": matrix.tolist(),
            "per_class": {
                name: {column: values[c].item() for column, values in columns.items()}
                for c, name in enumerate(self.classes)
            },
        }


def classify(
    name: str,
    y_true: np.ndarray,
    scores: np.ndarray,
    classes: Sequence[str],
    units: Sequence[str],
    bootstrap: Bootstrap,
    rows: np.ndarray | None = None,
    split: int = 0,
) -> TaskResult:
    """Metrics `<name>/<metric>` of scores [N, C], with details and resamples.

    Where a score is not finite, no metric is defined. `rows` [N] are the specimens' places in a
    split of `split`, whose columns `<name>/label` and `<name>/predicted` are then filled.
    """
    task = Classification(y_true, scores, classes)
    values = {k: float(v[0]) for k, v in task(m.ones(len(y_true))).items()}
    broken = int((~np.isfinite(scores)).any(axis=1).sum())
    if broken:
        log.warning("%s: %d slide embeddings are not finite; no metric is defined", name, broken)
        return TaskResult({f"{name}/{k}": float("nan") for k in values})
    details = task.details() | {"specimens": len(y_true)}
    resampled = bootstrap.values(units, task, y_true, _COMPLETE)
    if bootstrap:
        details["resamples_redrawn"] = resampled.redrawn
    result = named(name, values, {name: details}, resampled, len(y_true))
    if rows is not None:
        for column, numbers in (("label", y_true), ("predicted", task.y_pred)):
            result.columns[f"{name}/{column}"] = spread([classes[c] for c in numbers], rows, split)
    return result


def spread(values: Sequence[Any], rows: np.ndarray, split: int) -> list[Any]:
    """A column of a split of which only some rows have a value; "" elsewhere."""
    column: list[Any] = [""] * split
    for row, value in zip(rows.tolist(), values, strict=True):
        column[row] = value
    return column


def named(
    name: str,
    values: dict[str, float],
    details: dict[str, Any],
    resampled: Resampled,
    number: int,
) -> TaskResult:
    """A result whose metrics are called `<name>/<metric>` and rest on `number` specimens."""
    return TaskResult(
        {f"{name}/{k}": v for k, v in values.items()},
        details,
        {f"{name}/{k}": v for k, v in resampled.values.items()},
        numbers={f"{name}/{k}": number for k in values},
    )


def log_odds(logits: np.ndarray) -> np.ndarray:
    """[N, C >= 2] -> logarithms of p / (1 - p) of the classes' probabilities p, their softmax.

    They order specimens as the probabilities do, but stay apart where those round to 1.
    """
    result = np.empty_like(logits)
    for c in range(logits.shape[1]):
        others = np.delete(logits, c, axis=1)
        most = others.max(1, keepdims=True)
        rest = most[:, 0] + np.log(np.exp(others - most).sum(1))
        result[:, c] = logits[:, c] - rest
    return result
