"""Classifiers learnt from embeddings: nearest class mean, logistic regression, neighbours.

Each gives scores [N, C] that order specimens as its probabilities or votes do.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from slidevlm.eval import metrics as m
from slidevlm.eval.classification import log_odds

# C of scikit-learn: the inverse of the weight of the L2 norm. Not `np.logspace`, whose last bit
# depends on the machine.
STRENGTHS = np.array([10.0**exponent for exponent in np.linspace(-5, 5, 45).tolist()])
_FOLDS, _NEIGHBOURS, _ELEMENTS = 5, 20, 16_000_000


@dataclass(frozen=True)
class Examples:
    """n embedded specimens with a class each; numbers 0..C-1 all occur."""

    x: np.ndarray  # [n, E] float64
    y: np.ndarray  # [n] class numbers
    patients: np.ndarray  # [n] names

    @property
    def classes(self) -> int:
        """C."""
        return int(self.y.max()) + 1


Learner = Callable[[Examples, np.ndarray], np.ndarray]


def class_mean(examples: Examples, queries: np.ndarray) -> np.ndarray:
    """Nearest class mean: [N, E] -> [N, C], minus half the squared distance (and a constant).

    Examples and queries are centred on the mean of the examples and normalised first, as in
    SimpleShot (Wang et al., 2019).
    """
    centre = examples.x.mean(0)
    means = class_means(_unit(examples.x - centre), examples.y, examples.classes)
    result: np.ndarray = _unit(queries - centre) @ means.T - (means**2).sum(1) / 2
    return result


def class_means(x: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
    """[n, E] -> [C, E] mean of each class."""
    return np.stack([x[y == c].mean(0) for c in range(classes)])


def logistic_regression(
    examples: Examples, queries: np.ndarray, strength: float | None = None
) -> np.ndarray:
    """Multinomial logistic regression with an L2 penalty: [N, E] -> [N, C] log odds.

    `strength` is scikit-learn's C; by default `default_strength`.
    """
    if strength is None:
        strength = default_strength(examples)
    return _decide(_fit(examples, strength), queries)


def default_strength(examples: Examples) -> float:
    """E * C / 100, as in UNI (Chen et al., 2024)."""
    return examples.x.shape[1] * examples.classes / 100


def _fit(examples: Examples, strength: float, start: Any = None) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = start or LogisticRegression(tol=1e-6, max_iter=1000, warm_start=True)
    with warnings.catch_warnings():
        # Without a penalty to speak of, separable classes have no best weights to converge to.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(C=strength).fit(examples.x, examples.y)
    return model


def _decide(model: Any, queries: np.ndarray) -> np.ndarray:
    found = model.decision_function(queries)
    logits = np.stack([np.zeros_like(found), found], 1) if found.ndim == 1 else found
    return log_odds(logits)


@dataclass(frozen=True)
class Probe:
    """A logistic regression whose strength was chosen."""

    model: Any
    strength: float
    chosen_on: str  # "validation", "5-fold cross-validation" (or of fewer), or "nothing"
    losses: tuple[float, ...]  # log loss at each of STRENGTHS; none without a choice
    accuracies: tuple[float, ...]  # balanced, likewise

    def __call__(self, queries: np.ndarray) -> np.ndarray:
        """[N, E] -> [N, C] log odds."""
        return _decide(self.model, queries)


def linear_probe(train: Examples, validation: Examples | None, seed: int) -> Probe:
    """Choose the strength of the penalty by log loss, the stronger one in a tie.

    Accuracies of some hundred specimens rise and fall by chance from one strength to the next; the
    loss does not. Judged by `validation`, or without one by five folds of the training examples, no
    patient in two of them, fewer where no class has five examples; then fitted to all of these.
    Where not even two folds can be made, nothing is chosen, and the strength is that of
    `logistic_regression`.
    """
    if validation is not None:
        judged, how = [_judged(train, validation)], "validation"
    elif folds := _folds(train, seed):
        judged = [_judged(a, b) for a, b in folds]
        how = f"{len(folds)}-fold cross-validation"
    else:
        strength = default_strength(train)
        return Probe(_fit(train, strength), strength, "nothing", (), ())
    known = max(1, sum(count for _, _, count in judged))
    losses = np.sum([loss for loss, _, _ in judged], axis=0) / known
    accuracies = np.mean([accuracy for _, accuracy, _ in judged], axis=0)
    strength = float(STRENGTHS[int(np.argmin(losses))])
    fitted = _fit(train, strength)
    return Probe(fitted, strength, how, tuple(losses.tolist()), tuple(accuracies.tolist()))


def _judged(train: Examples, judge: Examples) -> tuple[np.ndarray, np.ndarray, int]:
    """Sums of log losses and balanced accuracies at each strength, and of how many the losses are.

    These are the specimens of classes that have been learnt: of others no strength says anything.
    """
    model: Any = None
    losses, accuracies = [], []
    size = max(train.classes, judge.classes)
    known = np.isin(judge.y, train.y)
    for strength in STRENGTHS:  # each fit starts from the one before
        model = _fit(train, strength, model)
        odds = _decide(model, judge.x)
        guess = model.classes_[odds.argmax(1)]
        accuracies.append(m.balanced_accuracy(m.confusion_matrix(judge.y, guess, size)))
        columns = np.searchsorted(model.classes_, judge.y[known])
        losses.append(np.logaddexp(0, -odds[known, columns]).sum())
    return np.array(losses), np.array(accuracies), int(known.sum())


def _folds(train: Examples, seed: int) -> list[tuple[Examples, Examples]]:
    """Pairs of what is learnt from, of two classes at least, and what judges; two pairs or none."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(_FOLDS, len(np.unique(train.patients)), int(np.bincount(train.y).max()))
    if folds < 2:
        return []
    # scikit-learn takes 32 bits.
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer specimens than folds
        parts = list(splitter.split(train.x, train.y, train.patients))
    usable = [(a, b) for a, b in parts if len(b) and len(np.unique(train.y[a])) > 1]
    return [(_some(train, a), _some(train, b)) for a, b in usable] if len(usable) > 1 else []


def _some(examples: Examples, rows: np.ndarray) -> Examples:
    return Examples(examples.x[rows], examples.y[rows], examples.patients[rows])


def neighbours(train: Examples, queries: np.ndarray) -> np.ndarray:
    """Votes of the 20 nearest training specimens by cosine: [N, E] -> [N, C].

    Equal votes are decided by the sum of similarities.
    """
    k = min(_NEIGHBOURS, len(train.y))
    keys, member = _unit(train.x).T, np.eye(train.classes)[train.y]
    scores = np.empty((len(queries), train.classes))
    rows = max(1, _ELEMENTS // len(train.y))
    for start in range(0, len(queries), rows):
        similar = _unit(queries[start : start + rows]) @ keys
        nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(similar, nearest, 1)
        voted = member[nearest]  # [n, k, C]
        decide = np.einsum("nk,nkc->nc", near, voted) / (4 * k)  # less than half a vote
        scores[start : start + rows] = voted.sum(1) + decide
    return scores


@dataclass(frozen=True)
class Episodes:
    """Accuracies of E classifiers, each learnt from k specimens of each class."""

    accuracy: np.ndarray  # [episodes]
    balanced_accuracy: np.ndarray  # [episodes]


def class_mean_episodes(
    train: Examples, queries: np.ndarray, y: np.ndarray, k: int, episodes: int, seed: int
) -> Episodes:
    """`class_mean` from k random training specimens a class, `episodes` times.

    A class with fewer specimens gives all. Vectorised: queries are never centred one by one, since
    for query q, centre m and mean u of a class: (q - m) u / |q - m| needs products with q alone.

    Args:
        train: what is drawn from.
        queries: [N, E].
        y: [N] their classes.
        k: specimens a class.
        episodes: how many.
        seed: decides the draws.
    """
    random, classes = np.random.default_rng((seed, k)), train.classes
    members = [np.flatnonzero(train.y == c) for c in range(classes)]
    squares = (queries**2).sum(1)
    order = np.argsort(y, kind="stable")
    _, starts, sizes = np.unique(y[order], return_index=True, return_counts=True)
    right: list[np.ndarray] = []
    largest = max(len(queries) * (classes + 1), k * classes * train.x.shape[1], len(train.y))
    block = max(1, _ELEMENTS // largest)
    for first in range(0, episodes, block):
        number = min(block, episodes - first)
        drawn = [random.random((number, len(rows))).argsort(1)[:, :k] for rows in members]
        chosen = [rows[d] for rows, d in zip(members, drawn, strict=True)]  # C of [e, <= k]
        everything = train.x[np.concatenate(chosen, 1)]  # [e, n, E]
        centre = everything.mean(1)
        parts = _unit(everything - centre[:, None])
        bounds = np.cumsum([0, *(c.shape[1] for c in chosen)])
        means = np.stack(
            [parts[:, a:b].mean(1) for a, b in itertools.pairwise(bounds)], 1
        )  # [e, C, E]
        flat = np.concatenate([means, centre[:, None]], 1).reshape(-1, queries.shape[1])
        products = (queries @ flat.T).reshape(len(queries), number, classes + 1)
        shift = np.einsum("ecd,ed->ec", means, centre)
        distance = squares[:, None] - 2 * products[..., -1] + (centre**2).sum(1)
        scores = (products[..., :-1] - shift) / np.sqrt(np.maximum(distance, 1e-30))[..., None]
        guess = (scores - (means**2).sum(2) / 2).argmax(2)  # [N, e]
        hits = (guess == y[:, None])[order]
        right.append(np.add.reduceat(hits, starts, axis=0, dtype=np.int64))
    hits = np.concatenate(right, 1)  # [classes present, episodes]
    return Episodes(hits.sum(0) / len(y), (hits / sizes[:, None]).mean(0))


def logistic_episodes(
    train: Examples, queries: np.ndarray, y: np.ndarray, k: int, episodes: int, seed: int
) -> Episodes:
    """The same of `logistic_regression`, one fit an episode."""
    random, classes = np.random.default_rng((seed, k)), train.classes
    members = [np.flatnonzero(train.y == c) for c in range(classes)]
    matrices = []
    for _ in range(episodes):
        rows = np.concatenate([random.permutation(rows)[:k] for rows in members])
        guess = logistic_regression(_some(train, rows), queries).argmax(1)
        matrices.append(m.confusion_matrix(y, guess, classes))
    stacked = np.stack(matrices)
    return Episodes(m.accuracy(stacked), m.balanced_accuracy(stacked))


def _unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    result: np.ndarray = x / np.maximum(length, 1e-15)  # one example is its own centre
    return result
