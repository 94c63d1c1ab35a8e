"""Classification metrics: pure, vectorised, equal to scikit-learn's where both are defined.

Classes are numbers 0..C-1 throughout. Where a metric is not defined (no specimen, a score that is
not a number, or for AUROC no class with both positives and negatives) the value is NaN, never a
made-up number.

Every metric takes resamples: `counts` [N, R] says how often each of R resamples drew each of N
specimens, and the result is [R]. Sorting is done once, a resample costs sums alone, and ties are
exact. Functions of a confusion matrix take [..., C, C] and return [...].
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

# Columns. The more specimens, the fewer resamples come at a time, and a step of Python for each row
# of each of these blocks would grow as the square of the specimens.
_NARROW = 64


def ones(n: int) -> Array:
    """[N, 1] counts of the sample itself: each specimen once."""
    return np.ones((n, 1), np.int32)


def confusion_matrix(y_true: Array, y_pred: Array, classes: int) -> Array:
    """[C, C] counts; row: true class, column: predicted class."""
    flat = np.bincount(y_true * classes + y_pred, minlength=classes * classes)
    return flat.reshape(classes, classes)


def confusion_matrices(y_true: Array, y_pred: Array, classes: int, counts: Array) -> Array:
    """[R, C, C]: the confusion matrix of each resample."""
    cells = y_true * classes + y_pred
    order = np.argsort(cells, kind="stable")
    present, starts = np.unique(cells[order], return_index=True)
    result = np.zeros((counts.shape[1], classes * classes), np.int64)
    if len(present):
        result[:, present] = np.add.reduceat(counts[order], starts, axis=0, dtype=np.int64).T
    return result.reshape(-1, classes, classes)


def accuracy(matrix: Array) -> Array:
    """Share of specimens on the diagonal of a confusion matrix."""
    return _ratio(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum((-2, -1)))


def recalls(matrix: Array) -> Array:
    """[..., C] share of each class that is predicted as such; NaN for a class that is absent."""
    return _ratio(_diagonal(matrix), matrix.sum(-1))


def precisions(matrix: Array) -> Array:
    """[..., C] share of each class's predictions that are right; NaN where there are none."""
    return _ratio(_diagonal(matrix), matrix.sum(-2))


def balanced_accuracy(matrix: Array) -> Array:
    """Mean recall over the classes that occur."""
    return mean_of_known(recalls(matrix))


def f1_scores(matrix: Array) -> Array:
    """[..., C] F1 of each class; 0 where a class is neither true nor predicted."""
    seen = matrix.sum(-2) + matrix.sum(-1)
    return np.where(seen > 0, 2 * _diagonal(matrix) / np.maximum(seen, 1), 0.0)


def f1_macro(matrix: Array) -> Array:
    """Mean F1 over the classes that are true or predicted at least once."""
    seen = matrix.sum(-2) + matrix.sum(-1) > 0
    return mean_of_known(np.where(seen, f1_scores(matrix), np.nan))


def f1_weighted(matrix: Array) -> Array:
    """Mean F1 weighted by how often each class occurs."""
    return _ratio((f1_scores(matrix) * matrix.sum(-1)).sum(-1), matrix.sum((-2, -1)))


def cohen_kappa(matrix: Array) -> Array:
    """Agreement beyond chance; NaN where chance agrees always (one class throughout)."""
    n = matrix.sum((-2, -1))
    chance = _ratio((matrix.sum(-2) * matrix.sum(-1)).sum(-1), n.astype(np.float64) ** 2)
    return _ratio(accuracy(matrix) - chance, 1 - chance)


def auroc(positive: Array, score: Array, counts: Array | None = None) -> Array:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half.

    Args:
        positive: [N] bool.
        score: [N]; higher means more likely positive.
        counts: [N, R] of resamples; without it the sample itself.

    Returns:
        [R], or without `counts` one number.
    """
    if counts is None:
        return auroc(positive, score, ones(len(score)))[0]
    if np.isnan(score).any():
        return np.full(counts.shape[1], np.nan)
    order = np.argsort(score, kind="stable")
    drawn, ordered = counts[order], score[order]
    below = running_total(drawn)  # drawn before each place
    starts, ends = _ties(ordered)
    hits = np.flatnonzero(positive[order])
    mine = drawn[hits].astype(np.int64)
    p = mine.sum(0)
    q = below[-1] - p
    # Twice the sum of mean ranks of the positives; what they owe to each other is p * p.
    twice = np.einsum("ir,ir->r", mine, (below[starts[hits]] + below[ends[hits]]).astype(np.int64))
    return _ratio(twice - p * p, 2 * p * q)


def auroc_ovr(y_true: Array, y_score: Array, counts: Array | None = None) -> Array:
    """Mean one-versus-rest AUROC over the classes that have positives and negatives.

    Args:
        y_true: [N] class numbers.
        y_score: [N, C].
        counts: [N, R] of resamples.
    """
    per_class = [auroc(y_true == c, y_score[:, c], counts) for c in range(y_score.shape[1])]
    return mean_of_known(np.stack(per_class, -1))


def auroc_ovo(y_true: Array, y_score: Array, counts: Array | None = None) -> Array:
    """Mean one-versus-one AUROC over all pairs of classes that occur (Hand and Till, 2001).

    Of a pair, each class in turn is the positive one and is ranked by its own score.
    """
    pairs = []
    for a in range(y_score.shape[1]):
        for b in range(y_score.shape[1]):
            both = np.flatnonzero((y_true == a) | (y_true == b))
            if a != b and len(both):
                mine = None if counts is None else counts[both]
                pairs.append(auroc(y_true[both] == a, y_score[both, a], mine))
    if not pairs:
        shape = () if counts is None else counts.shape[1:]
        return np.full(shape, np.nan)
    return mean_of_known(np.stack(pairs, -1))


def average_precision(positive: Array, score: Array, counts: Array | None = None) -> Array:
    """Sum of precision times gain in recall over distinct thresholds; NaN without positives."""
    if counts is None:
        return average_precision(positive, score, ones(len(score)))[0]
    if np.isnan(score).any() or not len(score):
        return np.full(counts.shape[1], np.nan)
    order = np.argsort(-score, kind="stable")
    ordered, drawn = score[order], counts[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each group of ties
    hits = running_total(drawn * positive[order][:, None])[last + 1].astype(np.int64)
    seen = running_total(drawn)[last + 1]
    gain = np.diff(hits, axis=0, prepend=0)
    # Where nothing is drawn yet there are no hits either.
    return _ratio((gain * hits / np.maximum(seen, 1)).sum(0), hits[-1])


def running_total(counts: Array) -> Array:
    """[N, R] -> [N + 1, R], from 0."""
    result = np.zeros((len(counts) + 1, counts.shape[1]), counts.dtype)
    if counts.shape[1] <= _NARROW:
        np.cumsum(counts, axis=0, dtype=counts.dtype, out=result[1:])
        return result
    # numpy's own works column by column: of wide rows most of what it reads is not used.
    result[1:] = counts
    before = result[0]
    for row in result[1:]:
        row += before
        before = row
    return result


def mean(values: Array, counts: Array) -> Array:
    """[N] values -> [R] their mean over each resample."""
    return _ratio(values.astype(np.float64) @ counts, counts.sum(0))


def median(values: Array, counts: Array) -> Array:
    """[N] values -> [R] their median over each resample; of an even number, the middle of two."""
    order = np.argsort(values, kind="stable")
    ordered = np.append(values[order].astype(np.float64), np.nan)  # of an empty resample
    upto = running_total(counts[order])[1:]
    total = counts.sum(0)
    low, high = (total - 1) // 2, total // 2
    result: Array = (ordered[(upto <= low).sum(0)] + ordered[(upto <= high).sum(0)]) / 2
    return np.where(total > 0, result, np.nan)


def ranks_of_truth(y_true: Array, y_score: Array) -> Array:
    """[N] place of the true class among all, from 1; a class of the same score stands before it."""
    own = y_score[np.arange(len(y_true)), y_true]
    return (y_score >= own[:, None]).sum(1)


def binary(matrix: Array) -> dict[str, Array]:
    """Precision, recall and specificity of class 1 in [..., 2, 2] confusion matrices."""
    return {
        "precision": precisions(matrix)[..., 1],
        "recall": recalls(matrix)[..., 1],
        "specificity": recalls(matrix)[..., 0],
    }


def _ties(ordered: Array) -> tuple[Array, Array]:
    """Of each place in a sorted array, where its group of equal values starts and ends."""
    if not len(ordered):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    sizes = np.diff(np.append(first, len(ordered)))
    return np.repeat(first, sizes), np.repeat(first + sizes, sizes)


def _diagonal(matrix: Array) -> Array:
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def mean_of_known(values: Array) -> Array:
    """Mean over the last axis without NaN; NaN where nothing else is there."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1))


def _ratio(a: Array, b: Array) -> Array:
    """a / b, NaN where b is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    result: Array = np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b != 0)
    return result[()]
