"""Survival: does the risk that embeddings tell order patients as their times do?"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.errors import DataError
from slidevlm.eval import metrics as m
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.classification import named
from slidevlm.eval.survival import PENALTIES, Cox, SurvivalTable, concordance, fit_cox
from slidevlm.eval.task import TaskResult

log = logging.getLogger("slidevlm.eval")


@dataclass(frozen=True)
class Survival:
    """Task: the concordance index of a Cox model learnt from a training split.

    Args:
        table: times and events.
        cox: the fitted model.
        seen: specimens that taught it, which are not judged.
        bootstrap: resamples the split, not the training.
    """

    table: SurvivalTable
    cox: Cox
    seen: frozenset[str]
    bootstrap: Bootstrap

    def __call__(self, predictions: Predictions) -> TaskResult:
        """Metric `survival/<table>/concordance`."""
        rows, time, event = _known(predictions, self.table, self.seen)
        name, image = f"survival/{self.table.name}", predictions.image_embedding
        assert image is not None, "survival needs slide embeddings"
        if not len(rows):
            return TaskResult()
        x = image[rows].astype(np.float64)
        risk = self.cox(x) if np.isfinite(x).all() else np.full(len(x), np.nan)

        def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
            if np.isnan(risk).any():
                return {"concordance": np.full(counts.shape[1], np.nan)}
            return {"concordance": concordance(time, event, risk, counts)}

        values = {k: float(v[0]) for k, v in statistic(m.ones(len(rows))).items()}
        details = {
            "specimens": len(rows),
            "events": int(event.sum()),
            "penalty": self.cox.penalty,
            "penalties": PENALTIES.tolist(),
            "concordance_of_penalties": list(self.cox.curve),
        }
        units = self.bootstrap.units(predictions)
        resampled = self.bootstrap.values([units[i] for i in rows], statistic)
        return named(name, values, {name: details}, resampled, len(rows))


def fit_survival(train: Predictions, table: SurvivalTable, bootstrap: Bootstrap) -> Survival:
    """Fit the Cox model to a training split.

    Raises:
        DataError: too few events, or embeddings that are not finite.
    """
    rows, time, event = _known(train, table, frozenset())
    image = train.image_embedding
    assert image is not None, "survival needs slide embeddings"
    x = image[rows].astype(np.float64)
    if not np.isfinite(x).all():
        raise DataError("--survival-table: embeddings are not finite; the weights have diverged")
    cox = fit_cox(x, time, event, np.array(train.patient_ids)[rows], bootstrap.seed)
    log.info("survival %s: %d training specimens, penalty %.3g", table.name, len(x), cox.penalty)
    return Survival(table, cox, frozenset(train.specimen_ids), bootstrap)


def _known(
    predictions: Predictions, table: SurvivalTable, seen: frozenset[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, times and events of the specimens that the table names."""
    found = [
        (i, *value)
        for i, (s, p) in enumerate(
            zip(predictions.specimen_ids, predictions.patient_ids, strict=True)
        )
        if s not in seen and (value := table.of(s, p)) is not None
    ]
    return (
        np.array([row[0] for row in found], np.int64),
        np.array([row[1] for row in found], np.float64),
        np.array([row[2] for row in found], bool),
    )
