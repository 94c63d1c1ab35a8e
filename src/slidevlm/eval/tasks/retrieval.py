"""Retrieval: does a slide find its report among all reports, and a report its slide?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.eval import metrics as m
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.task import TaskResult

_ROWS, _COLUMNS = 1024, 8192  # of the similarity matrix held at a time: 64 MiB
_AT = (1, 5, 10)
# Matrix products add up in an order that depends on a column's place, so equal embeddings score
# the same only up to rounding; a model that embeds all alike must not gain from that.
_SAME = 1e-12


@dataclass(frozen=True)
class Retrieval:
    """Task: R@1, R@5, R@10, mean and median rank and mean reciprocal rank, both ways.

    Resamples draw queries; the keys stay all those of the split.
    """

    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __call__(self, predictions: Predictions) -> TaskResult:
        """Metrics `image_to_text/...` and `text_to_image/...`; none of a language model."""
        image, text = predictions.image_embedding, predictions.text_embedding
        if image is None or text is None:
            return TaskResult({})
        both = ranks(image, text, predictions.report_ids)
        found = dict(zip(("image_to_text", "text_to_image"), both, strict=True))

        def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
            return {
                f"{way}/{name}": values
                for way, places in found.items()
                for name, values in rank_metrics(places, counts).items()
            }

        values = {k: float(v[0]) for k, v in statistic(m.ones(len(predictions))).items()}
        result = TaskResult(values)
        result.columns.update({f"{way}/rank": places.tolist() for way, places in found.items()})
        units = self.bootstrap.units(predictions)
        result.resampled.update(self.bootstrap.values(units, statistic).values)
        return result


def rank_metrics(places: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """[N] ranks from 1, [N, R] counts -> [R] values of each metric."""
    columns = [places <= k for k in _AT]
    # One product serves all means.
    table = np.stack([*columns, places, 1 / places], axis=0).astype(np.float64)
    sums = table @ counts
    total = np.maximum(counts.sum(0), 1)
    *recalls, mean, reciprocal = np.where(counts.sum(0) > 0, sums / total, np.nan)
    return {
        **{f"R@{k}": values for k, values in zip(_AT, recalls, strict=True)},
        "mean_rank": mean,
        "median_rank": m.median(places, counts),
        "MRR": reciprocal,
    }


def ranks(
    image: np.ndarray, text: np.ndarray, report_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each slide's best report among all reports, and of each report's best slide.

    Every key with the query's report id is a target, so identical reports are one target. Ties
    are pessimistic: a key that is no target and scores the same stands before it, and so does
    every key where a score is not a number.

    Args:
        image: [N, E].
        text: [N, E]; row i belongs to row i of `image`.
        report_ids: [N].

    Returns:
        Two [N] int64, from 1. Memory: a block of the similarity matrix at a time.
    """
    a, b = image.astype(np.float64), text.astype(np.float64)
    best_text, best_image = _best_targets(a, b, report_ids)
    to_text, to_image = np.ones((2, len(a)), np.int64)
    for rows in _slices(len(a), _ROWS):
        for columns in _slices(len(b), _COLUMNS):
            scores = a[rows] @ b[columns].T
            other = report_ids[rows, None] != report_ids[None, columns]
            to_text[rows] += (~(scores < best_text[rows, None] - _SAME) & other).sum(1)
            to_image[columns] += (~(scores < best_image[None, columns] - _SAME) & other).sum(0)
    return to_text, to_image


def _best_targets(
    image: np.ndarray, text: np.ndarray, report_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[N] highest score of each slide with a text of its report id, and the other way."""
    best_text = np.einsum("ne,ne->n", image, text)
    best_image = best_text.copy()
    order = np.argsort(report_ids, kind="stable")
    _, starts, sizes = np.unique(report_ids[order], return_index=True, return_counts=True)
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        group = order[start : start + size]
        for rows in (group[part] for part in _slices(size, _ROWS)):
            for columns in (group[part] for part in _slices(size, _COLUMNS)):
                scores = image[rows] @ text[columns].T
                best_text[rows] = np.maximum(best_text[rows], scores.max(1))
                best_image[columns] = np.maximum(best_image[columns], scores.max(0))
    return best_text, best_image


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
