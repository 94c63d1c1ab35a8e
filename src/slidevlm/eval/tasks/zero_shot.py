"""Zero-shot classification: the class whose prompts lie nearest to the slide."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slidevlm.batch import Predictions
from slidevlm.eval import metrics as m
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.classification import classify, log_odds, named, spread
from slidevlm.eval.labelled import Labelled, labelled
from slidevlm.eval.prompts import Labels, Prompts
from slidevlm.eval.task import TaskResult

log = logging.getLogger("slidevlm.eval")

_POINTS = ("least", "quartile_1", "median", "quartile_3", "most")
_DRAWS = 50  # of one prompt a class: what a user who writes one prompt may get


@dataclass(frozen=True)
class ClassTexts:
    """The embedded prompts of every class.

    Args:
        classes: C names, sorted; of two classes the second is the positive one.
        rows: C arrays [n, E], L2-normalised.
        sets: of a file that holds several ensembles, each one's rows of each class.
        ensemble: "mean" compares with the normalised mean of a class's prompts; "probabilities"
            adds up the probabilities of its prompts, in a softmax over the prompts of all classes.
    """

    classes: tuple[str, ...]
    rows: tuple[np.ndarray, ...]
    sets: tuple[tuple[np.ndarray, ...], ...] = ()
    ensemble: str = "mean"

    def logits(self, image: np.ndarray, scale: float) -> np.ndarray:
        """[N, E] slides -> [N, C] float64 whose softmax are the classes' probabilities."""
        slides = image.astype(np.float64)
        if self.ensemble == "mean":
            return scale * slides @ centres(self.rows).T
        columns = [scale * slides @ rows.astype(np.float64).T for rows in self.rows]
        return np.stack([_log_sum_exp(c) for c in columns], 1)

    def alternatives(self, seed: int) -> Iterator[np.ndarray]:
        """[C, E] of each ensemble of the file, or of seeded choices of one prompt a class."""
        if len(self.sets) > 1:
            for chosen in self.sets:
                yield centres([r[i] for r, i in zip(self.rows, chosen, strict=True)])
        elif any(len(rows) > 1 for rows in self.rows):
            random = np.random.default_rng(seed)
            for _ in range(_DRAWS):
                yield np.stack([rows[random.integers(len(rows))] for rows in self.rows])


def embed_prompts(
    prompts: Prompts, embed_text: Callable[[Sequence[str]], np.ndarray], ensemble: str = "mean"
) -> ClassTexts:
    """Embed every distinct prompt once.

    Args:
        prompts: classes and their texts.
        embed_text: texts -> [n, E], L2-normalised.
        ensemble: see `ClassTexts`.
    """
    distinct = list(dict.fromkeys(text for texts in prompts.texts for text in texts))
    embedded = dict(zip(distinct, embed_text(distinct), strict=True))
    rows = tuple(np.stack([embedded[t] for t in texts]) for texts in prompts.texts)
    sets = tuple(
        tuple(np.array([texts.index(t) for t in mine])
              for texts, mine in zip(prompts.texts, one, strict=True))
        for one in prompts.sets
    )  # fmt: skip
    return ClassTexts(prompts.classes, rows, sets, ensemble)


def centres(rows: Sequence[np.ndarray]) -> np.ndarray:
    """C arrays [n, E] -> [C, E]: the mean of each, normalised."""
    means = np.stack([np.mean(one, axis=0) for one in rows])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


@dataclass(frozen=True)
class ZeroShot:
    """Task: compare slides with class embeddings; specimens without a label are left out.

    Args:
        texts: the classes and their embedded prompts.
        labels: the true classes; several of a specimen make it a multi-label task.
    """

    texts: ClassTexts
    labels: Labels
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __call__(self, predictions: Predictions) -> TaskResult:
        """Metrics `zero_shot/<label file>/<metric>`, tables in the details."""
        image = predictions.image_embedding
        assert image is not None, "zero-shot classification needs slide embeddings"
        name = f"zero_shot/{self.labels.name}"
        known = labelled(predictions, self.labels, self.texts.classes)
        if not len(known):
            log.warning("%s: no specimen of this split has a label; left out", name)
            return TaskResult()
        odds = log_odds(self.texts.logits(image[known.rows], predictions.logit_scale))
        units = [self.bootstrap.units(predictions)[i] for i in known.rows]
        if self.labels.several:
            result = _multi_label(
                name, known.member, odds, self.texts.classes, units, self.bootstrap
            )
        else:
            result = classify(
                name,
                known.y_true,
                odds,
                self.texts.classes,
                units,
                self.bootstrap,
                known.rows,
                len(predictions),
            )
        if name in result.details:
            chances = 1 / (1 + np.exp(-np.clip(odds, -700, 700)))
            for c, column in zip(self.texts.classes, chances.T.tolist(), strict=True):
                key = f"{name}/probability/{c}"
                result.columns[key] = spread(column, known.rows, len(predictions))
            result.details[name]["without_label"] = len(predictions) - len(known)
            if not self.labels.several:
                self._sensitivity(name, image, known, result)
        return result

    def _sensitivity(
        self, name: str, image: np.ndarray, known: Labelled, result: TaskResult
    ) -> None:
        """Balanced accuracy over single prompts: the median, and the spread in the details."""
        classes, slides = len(self.texts.classes), image[known.rows].astype(np.float64)
        values = np.array(
            [
                m.balanced_accuracy(
                    m.confusion_matrix(known.y_true, (slides @ texts.T).argmax(1), classes)
                )
                for texts in self.texts.alternatives(self.bootstrap.seed)
            ]
        )
        if not len(values):
            return
        of = "ensemble" if len(self.texts.sets) > 1 else "single_prompt"
        key = f"{name}/{of}/balanced_accuracy"
        result.metrics[key] = float(np.median(values))
        result.intervals[key] = self.bootstrap.interval(values)
        result.numbers[key] = len(known)
        points = np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()
        result.details[name]["prompt_sensitivity"] = {
            "of": of,
            "draws": len(values),
            **dict(zip(_POINTS, points, strict=True)),
        }


def _multi_label(
    name: str,
    member: np.ndarray,
    odds: np.ndarray,
    classes: Sequence[str],
    units: Sequence[str],
    bootstrap: Bootstrap,
) -> TaskResult:
    """Ranking metrics of [N, C] bool memberships: no threshold, which nothing would justify."""

    def columns(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers = range(len(classes))
        return (
            np.stack([m.auroc(member[:, c], odds[:, c], counts) for c in numbers], -1),
            np.stack([m.average_precision(member[:, c], odds[:, c], counts) for c in numbers], -1),
        )

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        auroc, precision = columns(counts)
        return {
            "auroc_macro": m.mean_of_known(auroc),
            "average_precision_macro": m.mean_of_known(precision),
        }

    whole = m.ones(len(member))
    values = {k: float(v[0]) for k, v in statistic(whole).items()}
    auroc, precision = (v[0] for v in columns(whole))
    details: dict[str, Any] = {
        "classes": list(classes),
        "multi_label": True,
        "specimens": len(member),
        "per_class": {
            c: {
                "specimens": int(member[:, i].sum()),
                "auroc": float(auroc[i]),
                "average_precision": float(precision[i]),
            }
            for i, c in enumerate(classes)
        },
    }
    resampled = bootstrap.values(units, statistic)
    return named(name, values, {name: details}, resampled, len(member))


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    """[N, n] -> [N]."""
    most = values.max(1, keepdims=True)
    result: np.ndarray = most[:, 0] + np.log(np.exp(values - most).sum(1))
    return result
