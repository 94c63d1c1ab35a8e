"""Zero-shot classification: the class whose prompts lie nearest to the slide."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.eval import metrics as m
from slidevlm.eval.prompts import Labels, Prompts
from slidevlm.eval.task import TaskResult

log = logging.getLogger("slidevlm.eval")


def class_embeddings(
    prompts: Prompts, embed_text: Callable[[Sequence[str]], np.ndarray]
) -> np.ndarray:
    """Embed every prompt, average those of a class, normalise: [C, E] float32.

    Args:
        prompts: classes and their texts.
        embed_text: texts -> [n, E], L2-normalised.
    """
    distinct = list(dict.fromkeys(text for texts in prompts.texts for text in texts))
    embedded = dict(zip(distinct, embed_text(distinct), strict=True))
    means = np.stack([np.mean([embedded[t] for t in texts], axis=0) for texts in prompts.texts])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@dataclass(frozen=True)
class ZeroShot:
    """Task: compare slides with class embeddings; specimens without a label are left out.

    Args:
        embeddings: [C, E], L2-normalised.
        classes: C names, sorted; of two classes the second is the positive one.
        labels: the true classes.
    """

    embeddings: np.ndarray
    classes: tuple[str, ...]
    labels: Labels

    def __call__(self, predictions: Predictions) -> TaskResult:
        """Metrics `zero_shot/<label file>/<metric>`, a confusion matrix in the details."""
        image = predictions.image_embedding
        assert image is not None, "zero-shot classification needs slide embeddings"
        names = zip(predictions.specimen_ids, predictions.patient_ids, strict=True)
        labels = [self.labels.of(specimen, patient) for specimen, patient in names]
        known = [i for i, label in enumerate(labels) if label is not None]
        name = f"zero_shot/{self.labels.name}"
        if not known:
            log.warning("%s: no specimen of this split has a label; left out", name)
            return TaskResult()
        number = {c: i for i, c in enumerate(self.classes)}
        y_true = np.array([number[label] for label in labels if label is not None])
        logits = predictions.logit_scale * image[known].astype(np.float64) @ self.embeddings.T
        odds = log_odds(logits)
        matrix = m.confusion_matrix(y_true, logits.argmax(1), len(self.classes))
        values = {
            "accuracy": m.accuracy(matrix),
            "balanced_accuracy": m.balanced_accuracy(matrix),
            "f1_macro": m.f1_macro(matrix),
            "f1_weighted": m.f1_weighted(matrix),
            "auroc_ovr": m.auroc_ovr(y_true, odds),
            "cohen_kappa": m.cohen_kappa(matrix),
        }
        if len(self.classes) == 2:
            values |= m.binary(matrix)
            values["average_precision"] = m.average_precision(y_true == 1, odds[:, 1])
        broken = int((~np.isfinite(logits)).any(axis=1).sum())
        if broken:
            log.warning(
                "%s: %d slide embeddings are not finite; no metric is defined", name, broken
            )
            return TaskResult({f"{name}/{k}": float("nan") for k in values})
        details = {
            "classes": list(self.classes),
            "confusion_matrix": matrix.tolist(),
            "specimens": len(known),
            "without_label": len(predictions) - len(known),
        }
        return TaskResult({f"{name}/{k}": v for k, v in values.items()}, {name: details})


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
