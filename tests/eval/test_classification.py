"""Resampled metrics against scikit-learn on each resample written out."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics as sk

from slidevlm.eval import metrics as m
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.classification import Classification, classify


def case(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of unequal frequency, and scores with many ties that know something of them."""
    random = np.random.default_rng(seed)
    truth = np.minimum(random.geometric(0.4, n) - 1, classes - 1)
    scores = np.round(random.random((n, classes)) + 0.5 * np.eye(classes)[truth], 1)
    return truth, scores


def slow(truth: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """By scikit-learn, or written out where it has another definition or refuses."""
    classes, guess = scores.shape[1], scores.argmax(1)
    there = np.unique(truth)
    areas = {
        c: sk.roc_auc_score(truth == c, scores[:, c]) for c in there if (truth != c).any()
    }  # fmt: skip
    pairs = [
        sk.roc_auc_score(truth[both] == a, scores[both, a])
        for a in there
        for b in there
        if a != b
        for both in [(truth == a) | (truth == b)]
    ]
    place = [sum(row >= row[t]) for row, t in zip(scores, truth, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {
            "accuracy": sk.accuracy_score(truth, guess),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, guess),
            "f1_macro": sk.f1_score(truth, guess, average="macro", zero_division=0),
            "f1_weighted": sk.f1_score(truth, guess, average="weighted", zero_division=0),
            "auroc_ovr": np.mean(list(areas.values())) if areas else math.nan,
            "auroc_ovo": np.mean(pairs) if pairs else math.nan,
            "cohen_kappa": sk.cohen_kappa_score(truth, guess),
        }
        for k in (k for k in (3, 5) if k < classes):
            values[f"top_{k}_accuracy"] = np.mean(np.array(place) <= k)
        if classes == 2:
            nan = {"zero_division": np.nan}
            values["precision"] = sk.precision_score(truth, guess, **nan)
            values["recall"] = sk.recall_score(truth, guess, **nan)
            values["specificity"] = sk.recall_score(truth, guess, pos_label=0, **nan)
            known = (truth == 1).any()
            values["average_precision"] = (
                sk.average_precision_score(truth, scores[:, 1]) if known else math.nan
            )
    return values


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (2, 2), (2, 3), (30, 2), (40, 4), (60, 7)])
@pytest.mark.parametrize("seed", range(2))
def test_every_resample_is_that_of_scikit_learn(n: int, classes: int, seed: int) -> None:
    truth, scores = case(n, classes, seed)
    random = np.random.default_rng(seed + 100)
    counts = np.stack([np.bincount(random.integers(n, size=n), minlength=n) for _ in range(8)], 1)
    found = Classification(truth, scores, [str(c) for c in range(classes)])(counts)
    for r in range(8):
        drawn = np.repeat(np.arange(n), counts[:, r])
        expected = slow(truth[drawn], scores[drawn])
        values = {name: values[r] for name, values in found.items()}
        assert values == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_scikit_learn_agrees_with_what_is_written_out() -> None:
    truth, scores = case(200, 4, 0)
    p = scores / scores.sum(1, keepdims=True)
    for kind in ("ovr", "ovo"):
        expected = sk.roc_auc_score(truth, p, multi_class=kind)
        assert slow(truth, p)[f"auroc_{kind}"] == pytest.approx(expected, abs=1e-12)
        value = getattr(m, f"auroc_{kind}")(truth, p)
        assert value == pytest.approx(expected, abs=1e-12)


def test_a_resample_without_a_class_is_drawn_again_and_counted() -> None:
    """With one specimen of class 2, more than a third of the resamples lack it."""
    truth = np.array([0] * 8 + [1] * 8 + [2])
    scores = np.random.default_rng(0).random((17, 3)) + 0.3 * np.eye(3)[truth]
    units = [f"s{i}" for i in range(17)]
    bootstrap = Bootstrap(400, seed=3)
    result = classify("t", truth, scores, "abc", units, bootstrap)
    counts = np.concatenate(list(bootstrap.blocks(units)))
    lacking = np.stack([counts[:, truth == c].sum(1) == 0 for c in range(3)]).any(0)
    plain = Classification(truth, scores, "abc")(counts.T)
    assert 100 < lacking.sum() < 200
    assert result.details["t"]["resamples_redrawn"] >= lacking.sum()
    for name in ("balanced_accuracy", "auroc_ovr", "auroc_ovo"):
        values = result.resampled[f"t/{name}"]
        np.testing.assert_array_equal(values[~lacking], plain[name][~lacking])
        assert (values[lacking] != plain[name][lacking]).any() and not np.isnan(values).any()
    # A recall of class 2 takes part in every resample, so thirds are never averaged over two.
    recall_2 = float(scores[16].argmax() == 2)
    thirds = result.resampled["t/balanced_accuracy"]
    assert (thirds >= recall_2 / 3 - 1e-12).all() and (thirds <= (2 + recall_2) / 3 + 1e-12).all()
    np.testing.assert_array_equal(result.resampled["t/accuracy"], plain["accuracy"])


def test_what_cannot_have_every_class_is_not_defined() -> None:
    """Sixty classes of one patient each: no draw has them all."""
    truth = np.arange(60)
    scores = np.eye(60)
    result = classify("t", truth, scores, [str(c) for c in truth], [str(c) for c in truth],
                      Bootstrap(3))  # fmt: skip
    assert np.isnan(result.resampled["t/balanced_accuracy"]).all()
    assert result.details["t"]["resamples_redrawn"] == 300
    assert (result.resampled["t/accuracy"] == 1).all()


def test_numbers_and_no_resamples_without_a_bootstrap() -> None:
    truth, scores = case(20, 3, 1)
    result = classify("t", truth, scores, "abc", ["x"] * 20, Bootstrap())
    assert result.resampled == {} and set(result.numbers.values()) == {20}
    assert result.metrics == pytest.approx({f"t/{k}": v for k, v in slow(truth, scores).items()})
