"""Every metric against scikit-learn, and where it is not defined."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.eval import metrics as m

TIGHT = {"abs": 1e-12, "rel": 0.0}
MANY = settings(max_examples=60, deadline=None)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """True and predicted classes; often some class is missing, or there is only one."""
    classes = draw(st.integers(1, 5))
    n = draw(st.integers(1, 30))
    used = draw(st.integers(1, classes)), draw(st.integers(1, classes))
    truth, guess = (
        draw(st.lists(st.integers(0, u - 1), min_size=n, max_size=n)) for u in used
    )  # fmt: skip
    shift = draw(st.integers(0, classes - max(used)))
    return np.array(truth) + shift, np.array(guess) + shift, classes


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Positives and scores, many of them tied."""
    n = draw(st.integers(1, 40))
    scores = st.one_of(st.integers(-3, 3).map(float), st.floats(-1, 1, allow_subnormal=False))
    return (
        np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n))),
        np.array(draw(st.lists(scores, min_size=n, max_size=n))),
    )


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_mean_and_median_of_resamples(n: int) -> None:
    random = np.random.default_rng(n)
    values = random.integers(1, 9, n)
    counts = random.integers(0, 4, (n, 40))
    for r in range(40):
        drawn = np.repeat(values, counts[:, r])
        expected = (drawn.mean(), np.median(drawn)) if len(drawn) else (math.nan, math.nan)
        found = m.mean(values, counts)[r], m.median(values, counts)[r]
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("columns", [1, 64, 65, 300])
def test_running_totals(columns: int) -> None:
    counts = np.random.default_rng(columns).integers(0, 4, (30, columns)).astype(np.int32)
    found = m.running_total(counts)
    assert found.dtype == np.int32
    assert (found == [[counts[:n, c].sum() for c in range(columns)] for n in range(31)]).all()


@pytest.mark.parametrize("columns", [4, 80])
def test_a_long_running_total_of_few_resamples_takes_no_step_of_python_a_row(columns: int) -> None:
    """Of a million specimens four resamples come at a time: that were a billion steps of Python."""
    lines = 0

    def count(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    counts = np.ones((5000, columns), np.int32)
    before = sys.gettrace()
    sys.settrace(count)
    try:
        m.running_total(counts)
    finally:
        sys.settrace(before)
    assert (lines < 50) == (columns < 65), lines


def matrices(seed: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Random cases of 1 to 500 specimens, 1 to 15 classes, few of them present at times."""
    random = np.random.default_rng(seed)
    cases = []
    for n in (1, 2, 3, 20, 500):
        for classes in (1, 2, 3, 15):
            truth, guess = random.integers(0, classes, (2, n))
            cases.append((truth, np.where(random.random(n) < 0.5, truth, guess), classes))
    return cases


def check_against_scikit_learn(truth: np.ndarray, guess: np.ndarray, classes: int) -> None:
    matrix = m.confusion_matrix(truth, guess, classes)
    labels = list(range(classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are only predicted, and of kappa
        expected = sk.confusion_matrix(truth, guess, labels=labels)
        assert matrix.shape == (classes, classes) and matrix.tolist() == expected.tolist()
        assert m.accuracy(matrix) == pytest.approx(sk.accuracy_score(truth, guess), **TIGHT)
        assert m.balanced_accuracy(matrix) == pytest.approx(
            sk.balanced_accuracy_score(truth, guess), **TIGHT
        )
        f1 = sk.f1_score(truth, guess, labels=labels, average=None, zero_division=0)
        np.testing.assert_allclose(m.f1_scores(matrix), f1, rtol=0, atol=1e-12)
        for ours, average in ((m.f1_macro, "macro"), (m.f1_weighted, "weighted")):
            assert ours(matrix) == pytest.approx(
                sk.f1_score(truth, guess, average=average, zero_division=0), **TIGHT
            )
        kappa = m.cohen_kappa(matrix)
        if len({*truth, *guess}) == 1:
            assert math.isnan(kappa)
        else:
            assert kappa == pytest.approx(sk.cohen_kappa_score(truth, guess), **TIGHT)


@MANY
@given(labelled())
def test_metrics_of_the_confusion_matrix(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    check_against_scikit_learn(*case)


@pytest.mark.parametrize("case", matrices(0), ids=lambda case: f"n{len(case[0])}c{case[2]}")
def test_metrics_of_random_confusion_matrices(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    check_against_scikit_learn(*case)


def test_rows_are_true_and_columns_predicted() -> None:
    matrix = m.confusion_matrix(np.array([0, 0, 0, 2]), np.array([1, 1, 0, 2]), 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_a_case_by_hand() -> None:
    matrix = np.array([[3, 1, 0], [1, 1, 0], [0, 0, 0]])
    assert m.accuracy(matrix) == pytest.approx(4 / 6, **TIGHT)
    assert m.balanced_accuracy(matrix) == pytest.approx((3 / 4 + 1 / 2) / 2, **TIGHT)
    assert m.f1_scores(matrix).tolist() == [6 / 8, 2 / 4, 0]
    assert m.f1_macro(matrix) == pytest.approx((6 / 8 + 2 / 4) / 2, **TIGHT)
    assert m.f1_weighted(matrix) == pytest.approx((4 * 6 / 8 + 2 * 2 / 4) / 6, **TIGHT)
    expected = (4 * 4 + 2 * 2) / 36
    assert m.cohen_kappa(matrix) == pytest.approx((4 / 6 - expected) / (1 - expected), **TIGHT)


@MANY
@given(scored())
def test_auroc_and_average_precision(case: tuple[np.ndarray, np.ndarray]) -> None:
    positive, score = case
    if 0 < positive.sum() < len(positive):
        assert m.auroc(positive, score) == pytest.approx(sk.roc_auc_score(positive, score), **TIGHT)
    else:
        assert math.isnan(m.auroc(positive, score))
    if positive.any():
        expected = sk.average_precision_score(positive, score)
        assert m.average_precision(positive, score) == pytest.approx(expected, **TIGHT)
    else:
        assert math.isnan(m.average_precision(positive, score))


@pytest.mark.parametrize("n", [2, 3, 50, 2000])
@pytest.mark.parametrize("levels", [1, 2, 7, 10**6])
def test_auroc_and_average_precision_at_random(n: int, levels: int) -> None:
    random = np.random.default_rng(n + levels)
    positive = random.random(n) < 0.3
    positive[:2] = True, False
    score = random.integers(0, levels, n) / levels
    assert m.auroc(positive, score) == pytest.approx(sk.roc_auc_score(positive, score), **TIGHT)
    assert m.average_precision(positive, score) == pytest.approx(
        sk.average_precision_score(positive, score), **TIGHT
    )


def test_infinite_scores_tie_like_others() -> None:
    positive = np.array([True, False, True, False])
    score = np.array([np.inf, np.inf, -np.inf, -np.inf])
    finite = np.array([1.0, 1.0, 0.0, 0.0])
    assert m.auroc(positive, score) == m.auroc(positive, finite) == 0.5
    assert m.average_precision(positive, score) == m.average_precision(positive, finite) == 0.5


def test_a_score_that_is_not_a_number_gives_none() -> None:
    positive, score = np.array([True, False, True]), np.array([0.3, np.nan, 0.1])
    assert math.isnan(m.auroc(positive, score))
    assert math.isnan(m.average_precision(positive, score))
    assert math.isnan(m.auroc_ovr(np.array([0, 1, 0]), np.stack([score, score], 1)))


@pytest.mark.parametrize("n", [15, 200])
@pytest.mark.parametrize("classes", [3, 5])
def test_auroc_one_versus_rest(n: int, classes: int) -> None:
    random = np.random.default_rng(n * classes)
    truth = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    score = np.round(random.random((n, classes)), 1) + 0.1 + np.eye(classes)[truth] / 2
    score /= score.sum(1, keepdims=True)
    expected = sk.roc_auc_score(truth, score, multi_class="ovr", average="macro")
    assert m.auroc_ovr(truth, score) == pytest.approx(expected, **TIGHT)


def test_auroc_of_two_classes_is_that_of_either() -> None:
    random = np.random.default_rng(2)
    truth = random.integers(0, 2, 60)
    score = random.integers(0, 9, 60) / 8  # p and 1 - p are exact, ties stay ties
    expected = sk.roc_auc_score(truth, score)
    assert m.auroc_ovr(truth, np.stack([1 - score, score], 1)) == pytest.approx(expected, **TIGHT)


def test_a_class_without_positives_is_left_out_of_the_mean() -> None:
    truth = np.array([0, 0, 2, 2, 0])
    score = np.random.default_rng(0).random((5, 4))
    expected = [sk.roc_auc_score(truth == c, score[:, c]) for c in (0, 2)]
    assert m.auroc_ovr(truth, score) == pytest.approx(np.mean(expected), **TIGHT)
    for alone in (np.array([1, 1]), np.array([1])):
        assert math.isnan(m.auroc_ovr(alone, score[: len(alone)]))


@MANY
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_metrics_of_two_classes(pairs: list[tuple[bool, bool]]) -> None:
    truth, guess = np.array(pairs, dtype=np.int64).T
    ours = m.binary(m.confusion_matrix(truth, guess, 2))
    expected = {
        "precision": sk.precision_score(truth, guess, zero_division=np.nan),
        "recall": sk.recall_score(truth, guess, zero_division=np.nan),
        "specificity": sk.recall_score(truth, guess, pos_label=0, zero_division=np.nan),
    }
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, nan_ok=True, **TIGHT), name


def test_nothing_gives_no_number() -> None:
    none = np.zeros(0, np.int64)
    for classes in (1, 2, 5):
        matrix = m.confusion_matrix(none, none, classes)
        assert matrix.tolist() == [[0] * classes] * classes
        for metric in (
            m.accuracy,
            m.balanced_accuracy,
            m.f1_macro,
            m.f1_weighted,
            m.cohen_kappa,
        ):
            assert math.isnan(metric(matrix)), metric
        assert m.f1_scores(matrix).tolist() == [0.0] * classes
    assert all(math.isnan(v) for v in m.binary(np.zeros((2, 2), np.int64)).values())
    assert math.isnan(m.auroc(none > 0, none / 1))
    assert math.isnan(m.average_precision(none > 0, none / 1))
    assert math.isnan(m.auroc_ovr(none, np.zeros((0, 3))))


def test_everything_is_a_plain_number() -> None:
    """What JSON can hold: no numpy scalars."""
    truth, guess = np.array([0, 1, 1]), np.array([0, 1, 0])
    matrix = m.confusion_matrix(truth, guess, 2)
    values = [
        *(f(matrix) for f in (m.accuracy, m.balanced_accuracy, m.f1_macro, m.f1_weighted)),
        m.cohen_kappa(matrix),
        *m.binary(matrix).values(),
        m.auroc(truth == 1, guess / 1),
        m.average_precision(truth == 1, guess / 1),
        m.auroc_ovr(truth, np.random.default_rng(0).random((3, 2))),
    ]
    assert all(np.ndim(v) == 0 and np.asarray(v).dtype == np.float64 for v in values)
