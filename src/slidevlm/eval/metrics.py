"""Classification metrics: pure, vectorised, equal to scikit-learn's where both are defined.

Classes are numbers 0..C-1 throughout. Where a metric is not defined (no specimen, a score that is
not a number, or for AUROC no class with both positives and negatives) the value is NaN, never a
made-up number.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def confusion_matrix(y_true: Array, y_pred: Array, classes: int) -> Array:
    """[C, C] counts; row: true class, column: predicted class."""
    flat = np.bincount(y_true * classes + y_pred, minlength=classes * classes)
    return flat.reshape(classes, classes)


def accuracy(matrix: Array) -> float:
    """Share of specimens on the diagonal of a confusion matrix."""
    return _ratio(np.trace(matrix), matrix.sum())


def balanced_accuracy(matrix: Array) -> float:
    """Mean recall over the classes that occur."""
    totals = matrix.sum(1)
    there = totals > 0
    return float(np.mean(np.diag(matrix)[there] / totals[there])) if there.any() else float("nan")


def f1_scores(matrix: Array) -> Array:
    """[C] F1 of each class; 0 where a class is neither true nor predicted."""
    denominator = matrix.sum(0) + matrix.sum(1)
    return np.divide(
        2 * np.diag(matrix), denominator, out=np.zeros(len(matrix)), where=denominator > 0
    )


def f1_macro(matrix: Array) -> float:
    """Mean F1 over the classes that are true or predicted at least once."""
    seen = matrix.sum(0) + matrix.sum(1) > 0
    return float(f1_scores(matrix)[seen].mean()) if seen.any() else float("nan")


def f1_weighted(matrix: Array) -> float:
    """Mean F1 weighted by how often each class occurs."""
    return _ratio(f1_scores(matrix) @ matrix.sum(1), matrix.sum())


def cohen_kappa(matrix: Array) -> float:
    """Agreement beyond chance; NaN where chance agrees always (one class throughout)."""
    n = matrix.sum()
    if n == 0:
        return float("nan")
    expected = float(matrix.sum(0) @ matrix.sum(1)) / n**2
    return _ratio(np.trace(matrix) / n - expected, 1 - expected)


def auroc(positive: Array, score: Array) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half.

    Args:
        positive: [N] bool.
        score: [N]; higher means more likely positive.
    """
    p = int(positive.sum())
    q = len(positive) - p
    if p == 0 or q == 0 or np.isnan(score).any():
        return float("nan")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(count) - (count - 1) / 2  # mean rank of each distinct score
    return float((ranks[place][positive].sum() - p * (p + 1) / 2) / (p * q))


def auroc_ovr(y_true: Array, y_score: Array) -> float:
    """Mean one-versus-rest AUROC over the classes that have positives and negatives.

    Args:
        y_true: [N] class numbers.
        y_score: [N, C].
    """
    values = [auroc(y_true == c, y_score[:, c]) for c in range(y_score.shape[1])]
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def average_precision(positive: Array, score: Array) -> float:
    """Sum of precision times gain in recall over distinct thresholds; NaN without positives."""
    p = int(positive.sum())
    if p == 0 or np.isnan(score).any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits, ordered = np.cumsum(positive[order]), score[order]
    last = np.append(ordered[1:] != ordered[:-1], True)  # the last of each group of ties
    hits, seen = hits[last], np.flatnonzero(last) + 1
    return float(np.sum(np.diff(hits, prepend=0) / p * hits / seen))


def binary(matrix: Array) -> dict[str, float]:
    """Precision, recall and specificity of class 1 in a [2, 2] confusion matrix."""
    (tn, fp), (fn, tp) = matrix.tolist()
    return {
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
    }


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else float("nan")
