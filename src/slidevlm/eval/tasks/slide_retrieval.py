"""Slide-to-slide retrieval: are the slides nearest to a slide of its class?

Acc@k and the majority vote are those of Yottixel and SISH (Kalra et al., 2020; Chen et al., 2022).
mAP@k divides by min(k, slides of the class), as in TREC; some papers divide by the hits found,
which calls one hit in first place perfect.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.eval import metrics as m
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.classification import named
from slidevlm.eval.labelled import labelled
from slidevlm.eval.prompts import Labels
from slidevlm.eval.task import TaskResult

_ELEMENTS = 16_000_000  # of the similarity matrix held at a time
_ACC, _VOTE, _AP = (1, 3, 5), (3, 5), (5, 10)
_DECIMALS = 12  # equal embeddings score the same only up to rounding


@dataclass(frozen=True)
class SlideRetrieval:
    """Task: the specimens of the split are both queries and keys, never of one patient.

    A query whose class no other patient has is left out. Resamples draw queries.
    """

    labels: Labels
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __call__(self, predictions: Predictions) -> TaskResult:
        """Metrics `slide_retrieval/<label file>/<metric>`."""
        image = predictions.image_embedding
        assert image is not None, "retrieval needs slide embeddings"
        known = labelled(predictions, self.labels, self.labels.names)
        vectors, name = image[known.rows], f"slide_retrieval/{self.labels.name}"
        if len(known) < 2 or not np.isfinite(vectors).all():
            return TaskResult()
        patients = np.unique(np.array(predictions.patient_ids)[known.rows], return_inverse=True)[1]
        hits, votes, targets = neighbours(vectors, known.y_true, patients, max(_AP))
        found = np.flatnonzero(targets > 0)
        if not len(found):
            return TaskResult()
        columns: dict[str, np.ndarray] = {f"Acc@{k}": np.any(hits[:, :k], axis=1) for k in _ACC}
        columns |= {f"majority_vote@{k}": majority(votes[:, :k], hits[:, :k]) for k in _VOTE}
        columns |= {f"mAP@{k}": average_precision_at(hits[:, :k], targets) for k in _AP}
        table = {key: values[found].astype(np.float64) for key, values in columns.items()}

        def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
            return {key: m.mean(values, counts) for key, values in table.items()}

        values = {key: float(v[0]) for key, v in statistic(m.ones(len(found))).items()}
        details = {name: {"queries": len(found), "without_target": len(known) - len(found)}}
        units = self.bootstrap.units(predictions)
        resampled = self.bootstrap.values([units[known.rows[i]] for i in found], statistic)
        return named(name, values, details, resampled, len(found))


def neighbours(
    vectors: np.ndarray, y_true: np.ndarray, patients: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k nearest specimens of other patients to each, nearest first.

    Ties are pessimistic: of equally near specimens those of another class come first.

    Args:
        vectors: [n, E], L2-normalised.
        y_true: [n] class numbers.
        patients: [n] numbers.
        k: how many; fewer where there are not so many.

    Returns:
        [n, k] bool, whether each is of the class; [n, k] classes, -1 where there is none; [n] how
        many specimens of other patients have the class.
    """
    n, k = len(vectors), min(k, len(vectors))
    hits, votes = np.zeros((n, k), bool), np.full((n, k), -1)
    targets = np.zeros(n, np.int64)
    columns = vectors.T.astype(np.float64)
    rows = max(1, _ELEMENTS // n)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        scores = np.round(vectors[part].astype(np.float64) @ columns, _DECIMALS)
        same = y_true[part, None] == y_true[None, :]
        own = patients[part, None] == patients[None, :]
        scores -= same * 10.0 ** -(_DECIMALS + 1)
        scores[own] = -np.inf
        targets[part] = (same & ~own).sum(1)
        nearest = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, nearest, 1), axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, 1)
        there = np.take_along_axis(scores, nearest, 1) > -np.inf
        hits[part] = np.take_along_axis(same, nearest, 1) & there
        votes[part] = np.where(there, y_true[nearest], -1)
    return hits, votes, targets


def majority(votes: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """[n] whether more of [n, k] neighbours have the query's class than any other one."""
    most = np.zeros(len(votes), np.int64)
    for column in votes.T:  # votes for the class of each neighbour that is not of the query's
        other = (votes == column[:, None]).sum(1)
        wrong = (column >= 0) & ~(hits & (votes == column[:, None])).any(1)
        most = np.maximum(most, np.where(wrong, other, 0))
    result: np.ndarray = hits.sum(1) > most
    return result


def average_precision_at(hits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[n, k] hits, [n] targets that there are -> [n] average precision of the first k."""
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    result: np.ndarray = (precision * hits).sum(1) / np.clip(targets, 1, hits.shape[1])
    return result
