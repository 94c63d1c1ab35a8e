"""Retrieval: does a slide find its report among all reports, and a report its slide?"""

from __future__ import annotations

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.eval.task import TaskResult

_ROWS = 2048  # of the similarity matrix held at a time
_AT = (1, 5, 10)
# Matrix products add up in an order that depends on a column's place, so equal embeddings score
# the same only up to rounding; a model that embeds all alike must not gain from that.
_SAME = 1e-12


def retrieval(predictions: Predictions) -> TaskResult:
    """R@1, R@5, R@10, mean and median rank and mean reciprocal rank, both ways."""
    image, text = predictions.image_embedding, predictions.text_embedding
    assert image is not None and text is not None, "retrieval needs both embeddings"
    metrics: dict[str, float] = {}
    for name, queries, keys in (("image_to_text", image, text), ("text_to_image", text, image)):
        found = ranks(queries, keys, predictions.report_ids)
        metrics |= {f"{name}/R@{k}": float(np.mean(found <= k)) for k in _AT}
        metrics[f"{name}/mean_rank"] = float(np.mean(found))
        metrics[f"{name}/median_rank"] = float(np.median(found))
        metrics[f"{name}/MRR"] = float(np.mean(1 / found))
    return TaskResult(metrics)


def ranks(queries: np.ndarray, keys: np.ndarray, report_ids: np.ndarray) -> np.ndarray:
    """Rank of each query's best target among all keys, from 1.

    Every key with the query's report id is a target, so identical reports are one target. Ties
    are pessimistic: a key that is no target and scores the same stands before it, and so does
    every key where a score is not a number.

    Args:
        queries: [N, E].
        keys: [N, E]; row i belongs to query i.
        report_ids: [N].

    Returns:
        [N] int64. Memory: a block of rows of the similarity matrix at a time.
    """
    result = np.empty(len(queries), dtype=np.int64)
    columns = keys.T.astype(np.float64)
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        scores = queries[rows].astype(np.float64) @ columns
        target = report_ids[rows, None] == report_ids[None, :]
        best = np.where(target, scores, -np.inf).max(1)
        result[rows] = 1 + (~(scores < best[:, None] - _SAME) & ~target).sum(1)
    return result
