"""Learners against scikit-learn and loops written out."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import sklearn.metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from slidevlm.eval import learners
from slidevlm.eval.learners import Examples


def examples(n: int, classes: int, seed: int, width: int = 6, noise: float = 1.0) -> Examples:
    random = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    means = np.random.default_rng(99).normal(size=(classes, width))
    x = means[y] + noise * random.normal(size=(n, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Examples(x, y, np.array([f"p{i}" for i in range(n)]))


def slow_class_mean(train: Examples, queries: np.ndarray) -> np.ndarray:
    """SimpleShot (Wang et al., 2019), one query and class at a time."""
    centre = train.x.mean(0)

    def move(v: np.ndarray) -> np.ndarray:
        return (v - centre) / np.linalg.norm(v - centre)

    means = [
        np.mean([move(x) for x, y in zip(train.x, train.y, strict=True) if y == c], axis=0)
        for c in range(train.classes)
    ]
    return np.array([[-np.sum((move(q) - m) ** 2) for m in means] for q in queries])


@pytest.mark.parametrize("classes", [2, 5])
def test_class_mean_is_the_nearest_one(classes: int) -> None:
    train, test = examples(20, classes, 0), examples(50, classes, 1)
    ours, theirs = learners.class_mean(train, test.x), slow_class_mean(train, test.x)
    np.testing.assert_array_equal(ours.argmax(1), theirs.argmax(1))
    # Up to a constant and a factor they are the distances themselves.
    np.testing.assert_allclose(2 * ours - 1, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_is_that_of_scikit_learn(classes: int) -> None:
    train, test = examples(60, classes, 0), examples(40, classes, 1)
    for strength in (None, 0.01, 10.0):
        model = LogisticRegression(C=strength or 6 * classes / 100, max_iter=1000, tol=1e-6)
        p = model.fit(train.x, train.y).predict_proba(test.x)
        odds = learners.logistic_regression(train, test.x, strength)
        np.testing.assert_allclose(odds, np.log(p / (1 - p)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("n", [5, 20, 200])
def test_neighbours_are_those_of_scikit_learn(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "_ELEMENTS", 150)
    train, test = examples(n, 3, 0), examples(60, 3, 1)
    model = KNeighborsClassifier(min(20, n), metric="cosine", algorithm="brute")
    votes = model.fit(train.x, train.y).predict_proba(test.x) * min(20, n)
    np.testing.assert_array_equal(np.round(learners.neighbours(train, test.x)), np.round(votes))


def test_equal_votes_go_to_the_nearer_class() -> None:
    train = Examples(np.array([[1.0, 0], [0, 1]]), np.array([0, 1]), np.array(["p", "q"]))
    scores = learners.neighbours(train, np.array([[0.8, 0.6], [0.6, 0.8]]))
    assert scores.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_episodes_are_class_means_of_drawn_examples(k: int, monkeypatch) -> None:
    """Each episode is repeated by the slow rule from the examples that were drawn."""
    monkeypatch.setattr(learners, "_ELEMENTS", 3000)
    train, test = examples(40, 4, 0), examples(70, 4, 1)
    found = learners.class_mean_episodes(train, test.x, test.y, k, 12, seed=5)
    # The same draws: blocks draw one class after the other.
    random = np.random.default_rng((5, k))
    members = [np.flatnonzero(train.y == c) for c in range(4)]
    block = max(1, 3000 // max(70 * 5, k * 4 * 6))
    done = 0
    while done < 12:
        number = min(block, 12 - done)
        drawn = [random.random((number, len(rows))).argsort(1)[:, :k] for rows in members]
        for e in range(number):
            rows = np.concatenate([m[d[e]] for m, d in zip(members, drawn, strict=True)])
            part = Examples(train.x[rows], train.y[rows], train.patients[rows])
            guess = slow_class_mean(part, test.x).argmax(1)
            expected = sk.accuracy_score(test.y, guess), sk.balanced_accuracy_score(test.y, guess)
            values = found.accuracy[done + e], found.balanced_accuracy[done + e]
            assert values == pytest.approx(expected, abs=1e-12)
        done += number
    if k == 50:
        assert np.ptp(found.accuracy) == 0, "every class gives all it has"


def test_drawing_from_many_training_specimens_takes_a_bounded_memory(monkeypatch) -> None:
    """All draws at a time from a million would be tens of gigabytes, few queries or not."""
    monkeypatch.setattr(learners, "_ELEMENTS", 100_000)
    random = np.random.default_rng(0)
    train = Examples(random.normal(size=(4000, 2)), np.arange(4000) % 2, np.zeros(4000))
    queries = random.normal(size=(5, 2))
    tracemalloc.start()
    try:
        learners.class_mean_episodes(train, queries, np.zeros(5, int), 1, 1000, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 8 * 100_000, peak


def test_more_examples_help() -> None:
    train, test = examples(300, 4, 0), examples(300, 4, 1)
    for run in (learners.class_mean_episodes, learners.logistic_episodes):
        few, many = (run(train, test.x, test.y, k, 10, seed=0) for k in (1, 16))
        assert many.balanced_accuracy.mean() > few.balanced_accuracy.mean() + 0.05
        assert len(np.unique(few.accuracy)) > 2


def test_a_class_that_the_queries_lack() -> None:
    train, test = examples(30, 3, 0), examples(40, 3, 1)
    kept = test.y != 1
    found = learners.class_mean_episodes(train, test.x[kept], test.y[kept], 2, 7, seed=0)
    assert ((found.balanced_accuracy >= 0) & (found.balanced_accuracy <= 1)).all()


def test_the_probe_takes_what_validation_says() -> None:
    train, judge = examples(80, 3, 0, noise=1.5), examples(60, 3, 1, noise=1.5)
    probe = learners.linear_probe(train, judge, seed=0)
    accuracies, losses = [], []
    for strength in learners.STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000, tol=1e-6).fit(train.x, train.y)
        accuracies.append(sk.balanced_accuracy_score(judge.y, model.predict(judge.x)))
        losses.append(sk.log_loss(judge.y, model.predict_proba(judge.x)))
    assert len(learners.STRENGTHS) == 45 and learners.STRENGTHS[[0, -1]].tolist() == [1e-5, 1e5]
    # Fits end within a tolerance.
    np.testing.assert_allclose(probe.accuracies[:35], accuracies[:35], atol=0.03)
    np.testing.assert_allclose(probe.losses[:25], losses[:25], rtol=0.01)
    assert probe.strength == learners.STRENGTHS[int(np.argmin(losses))]
    assert probe.strength != learners.STRENGTHS[int(np.argmax(accuracies))]
    assert probe.chosen_on == "validation" and np.ptp(probe.accuracies) > 0.05
    again = LogisticRegression(C=probe.strength, max_iter=1000, tol=1e-6).fit(train.x, train.y)
    np.testing.assert_array_equal(probe(judge.x).argmax(1), again.predict(judge.x))


def test_classes_that_were_not_learnt_do_not_choose() -> None:
    """They are wrong at any strength; where there is no other, the strongest penalty is taken."""
    train, judge = examples(80, 3, 0, noise=1.5), examples(60, 3, 1, noise=1.5)
    probe = learners.linear_probe(train, judge, seed=0)
    further = Examples(
        np.concatenate([judge.x, judge.x[:20]]),
        np.concatenate([judge.y, np.full(20, 3)]),
        np.concatenate([judge.patients, judge.patients[:20]]),
    )
    again = learners.linear_probe(train, further, seed=0)
    assert (again.strength, again.losses) == (probe.strength, probe.losses)
    assert max(again.accuracies) < max(probe.accuracies)
    strange = Examples(judge.x[:20], np.full(20, 3), judge.patients[:20])
    assert learners.linear_probe(train, strange, seed=0).strength == learners.STRENGTHS[0]


def test_folds_keep_patients_together_and_every_specimen_is_judged_once() -> None:
    train = examples(60, 3, 0)
    patients = np.array([f"p{i // 3}" for i in range(60)])
    parts = learners._folds(Examples(train.x, train.y, patients), seed=0)
    assert len(parts) == 5
    judged = np.concatenate([b.x for _, b in parts])
    assert len(np.unique(judged, axis=0)) == 60 == len(judged)
    assert all(not set(a.patients) & set(b.patients) for a, b in parts)
    probe = learners.linear_probe(Examples(train.x, train.y, patients), None, seed=0)
    assert (
        probe.chosen_on == "5-fold cross-validation"
        and len(probe.losses) == len(probe.accuracies) == 45
    )


def test_any_seed_of_the_arguments_makes_folds() -> None:
    train = examples(30, 2, 0)
    probes = [learners.linear_probe(train, None, seed=s) for s in (0, 10**18)]
    assert all(len(probe.losses) == len(learners.STRENGTHS) for probe in probes)


def test_a_class_of_one_specimen_survives_cross_validation() -> None:
    train = examples(30, 3, 0)
    y = np.where(train.y == 2, 0, train.y)
    y[7] = 2
    probe = learners.linear_probe(Examples(train.x, y, train.patients), None, seed=0)
    assert probe(train.x).shape == (30, 3)


FEW = {  # classes, patients, what chooses
    "one a class": ([0, 1], "ab", "nothing"),
    "three a class": ([0, 0, 0, 1, 1, 1], "abcdef", "3-fold cross-validation"),
    "one patient": ([0, 0, 0, 1, 1, 1], "aaaaaa", "nothing"),
    "a class a patient": ([0, 0, 0, 1, 1, 1], "aaabbb", "nothing"),
    "one patient has both classes": ([0, 0, 0, 1, 0, 0], "aaaabb", "nothing"),
}


@pytest.mark.parametrize("case", FEW)
def test_a_probe_of_few_examples(case: str) -> None:
    y, patients, chosen_on = FEW[case]
    x = np.random.default_rng(0).normal(size=(len(y), 4)) + 9 * np.array(y)[:, None]
    train = Examples(x, np.array(y), np.array(list(patients)))
    probe = learners.linear_probe(train, None, seed=0)
    assert probe.chosen_on == chosen_on and probe(x).argmax(1).tolist() == y
    if chosen_on == "nothing":
        assert probe.strength == 4 * 2 / 100 and probe.losses == probe.accuracies == ()


def test_a_fold_that_nobody_is_in_is_left_out() -> None:
    """scikit-learn's way of sharing patients out may leave a fold empty."""
    random = np.random.default_rng(0)
    for seed in range(300):
        n = random.integers(4, 9)
        y = np.array([0, 1, *random.integers(0, 2, n - 2)])
        patients = np.array([f"p{i}" for i in random.integers(0, 4, n)])
        train = Examples(random.normal(size=(n, 3)), y, patients)
        parts = learners._folds(train, seed)
        assert len(parts) != 1
        assert all(len(b.y) and len(np.unique(a.y)) > 1 for a, b in parts)
