"""Probes: how much of a class is in the embeddings, learnt from a training split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.errors import DataError
from slidevlm.eval import learners
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.classification import classify
from slidevlm.eval.labelled import labelled
from slidevlm.eval.learners import Examples
from slidevlm.eval.prompts import Labels
from slidevlm.eval.task import TaskResult, merge

log = logging.getLogger("slidevlm.eval")

SHOTS = (1, 2, 4, 8, 16)
_EPISODES = {"class_mean": 1000, "logistic_regression": 10}


@dataclass(frozen=True)
class Probes:
    """Task: a linear probe, nearest neighbours, and k-shot curves.

    Specimens that taught the probes or chose their strength are left out of a split; a split of
    such specimens alone has no result.

    Args:
        name: of the label file.
        labels: the true classes.
        classes: those that the training split has.
        train: its labelled specimens.
        seen: specimens that are not judged.
        linear: the fitted linear probe.
        bootstrap: resamples the split, not the training.
    """

    name: str
    labels: Labels
    classes: tuple[str, ...]
    train: Examples
    seen: frozenset[str]
    linear: learners.Probe
    bootstrap: Bootstrap

    def __call__(self, predictions: Predictions) -> TaskResult:
        """Metrics `probe/<label file>/{linear,neighbours}/...` and `k_shot/<label file>/...`."""
        known = labelled(predictions, self.labels, self.classes)
        kept = np.array(
            [i for i, r in enumerate(known.rows) if predictions.specimen_ids[r] not in self.seen],
            np.int64,
        )
        image = predictions.image_embedding
        assert image is not None, "probes need slide embeddings"
        if not len(kept):
            return TaskResult()
        rows, y = known.rows[kept], known.y_true[kept]
        queries = image[rows].astype(np.float64)
        if not np.isfinite(queries).all():
            log.warning("probe/%s: embeddings are not finite; left out", self.name)
            return TaskResult()
        units = [self.bootstrap.units(predictions)[i] for i in rows]
        found = {
            "linear": self.linear(queries),
            "neighbours": learners.neighbours(self.train, queries),
        }
        parts = [
            classify(
                f"probe/{self.name}/{k}",
                y,
                scores,
                self.classes,
                units,
                self.bootstrap,
                rows,
                len(predictions),
            )
            for k, scores in found.items()
        ]
        parts[0].details[f"probe/{self.name}/linear"] |= {
            "strength": self.linear.strength,
            "chosen_on": self.linear.chosen_on,
            "strengths": learners.STRENGTHS.tolist(),
            "log_loss_of_strengths": list(self.linear.losses),
            "balanced_accuracy_of_strengths": list(self.linear.accuracies),
            "trained_on": len(self.train.y),
        }
        return merge([*parts, self._curves(queries, y)])

    def _curves(self, queries: np.ndarray, y: np.ndarray) -> TaskResult:
        """Accuracy from k examples a class; the interval is that of the episodes."""
        result, details = TaskResult(), dict[str, Any]()
        name = f"k_shot/{self.name}"
        run = {
            "class_mean": learners.class_mean_episodes,
            "logistic_regression": learners.logistic_episodes,
        }
        for learner, episodes in _EPISODES.items():
            for k in SHOTS:
                made = run[learner](self.train, queries, y, k, episodes, self.bootstrap.seed)
                for metric in ("accuracy", "balanced_accuracy"):
                    values, key = getattr(made, metric), f"{learner}/k={k}/{metric}"
                    result.metrics[f"{name}/{key}"] = float(values.mean())
                    result.intervals[f"{name}/{key}"] = self.bootstrap.interval(values)
                    result.numbers[f"{name}/{key}"] = len(y)
                    details[key] = {
                        "episodes": episodes,
                        "mean": float(values.mean()),
                        "standard_deviation": float(values.std()),
                    }
        sizes = np.bincount(self.train.y, minlength=len(self.classes)).tolist()
        result.details[name] = {
            "intervals": "of the episodes, not of resampled patients",
            "training_specimens": dict(zip(self.classes, sizes, strict=True)),
            "curves": details,
        }
        return result


def fit_probes(
    train: Predictions, validation: Sequence[Predictions], labels: Labels, bootstrap: Bootstrap
) -> Probes | None:
    """Fit the probes of a label file to a training split; None where it has fewer than 2 classes.

    Args:
        train: embeddings to learn from.
        validation: splits that choose the strength of the penalty; cross-validation without one.
        labels: classes.
        bootstrap: of the result.

    Raises:
        DataError: embeddings that are not finite.
    """
    assert not labels.several, "the suite has refused such label files"
    found = labelled(train, labels, labels.names)
    classes = tuple(labels.names[c] for c in np.unique(found.y_true)) if len(found) else ()
    if len(classes) < 2:
        log.warning(
            "--probe: the training split has %d classes of %s, and a probe learns to tell at least "
            "2 apart; left out",
            len(classes),
            labels.name,
        )
        return None
    examples = _examples(train, labels, classes)
    assert examples is not None, "it has two classes"
    judges = [one for split in validation if (one := _examples(split, labels, classes))]
    judge = None
    if judges:
        judge = Examples(
            np.concatenate([one.x for one in judges]),
            np.concatenate([one.y for one in judges]),
            np.concatenate([one.patients for one in judges]),
        )
    linear = learners.linear_probe(examples, judge, bootstrap.seed)
    log.info(
        "probe %s: %d training specimens, strength %.3g chosen on %s",
        labels.name, len(examples.y), linear.strength, linear.chosen_on,
    )  # fmt: skip
    seen = frozenset(s for split in (train, *validation) for s in split.specimen_ids)
    return Probes(labels.name, labels, classes, examples, seen, linear, bootstrap)


def _examples(
    predictions: Predictions, labels: Labels, classes: tuple[str, ...]
) -> Examples | None:
    known = labelled(predictions, labels, classes)
    if not len(known):
        return None
    image = predictions.image_embedding
    assert image is not None, "probes need slide embeddings"
    x = image[known.rows].astype(np.float64)
    if not np.isfinite(x).all():
        raise DataError("--probe: embeddings are not finite; the weights have diverged")
    return Examples(x, known.y_true, np.array(predictions.patient_ids)[known.rows])
