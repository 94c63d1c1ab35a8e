"""Slide-to-slide retrieval against a loop over sorted lists."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from slidevlm.batch import Predictions
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.prompts import Labels
from slidevlm.eval.tasks import slide_retrieval as module
from slidevlm.eval.tasks.slide_retrieval import SlideRetrieval


def split_of(image: np.ndarray, patients: list[str]) -> Predictions:
    names = tuple(f"s{i}" for i in range(len(image)))
    return Predictions(names, tuple(patients), names, np.arange(len(image)), image, None)


def labels_of(classes: list[str | None]) -> Labels:
    return Labels("t", {f"s{i}": (c,) for i, c in enumerate(classes) if c is not None})


def slow(image: np.ndarray, classes: list[str | None], patients: list[str]) -> dict[str, float]:
    """Each query sorts all others; equal scores put other classes first."""
    rows: dict[str, list[float]] = {}
    for i in range(len(image)):
        keys = [j for j in range(len(image)) if classes[j] and patients[j] != patients[i]]
        targets = sum(classes[j] == classes[i] for j in keys)
        if classes[i] is None or not targets:
            continue
        scored = [
            (-round(float(image[i] @ image[j]), 9), classes[j] == classes[i], j) for j in keys
        ]
        order = [j for *_, j in sorted(scored)]
        hits = [classes[j] == classes[i] for j in order]
        for k in (1, 3, 5):
            rows.setdefault(f"Acc@{k}", []).append(any(hits[:k]))
        for k in (3, 5):
            votes = Counter(classes[j] for j in order[:k])
            own = votes.pop(classes[i], 0)
            rows.setdefault(f"majority_vote@{k}", []).append(own > max(votes.values(), default=0))
        for k in (5, 10):
            total = sum(sum(hits[: n + 1]) / (n + 1) for n in range(min(k, len(hits))) if hits[n])
            rows.setdefault(f"mAP@{k}", []).append(total / min(k, targets))
    return {f"slide_retrieval/t/{name}": float(np.mean(v)) for name, v in rows.items()}


def case(n: int, seed: int, ties: bool) -> tuple[np.ndarray, list[str | None], list[str]]:
    random = np.random.default_rng(seed)
    image = random.integers(-1, 2, (n, 3)).astype(float) if ties else random.normal(size=(n, 8))
    image[~image.any(1)] = 1  # none of length 0
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    classes = [None if random.random() < 0.1 else "abc"[random.integers(3)] for _ in range(n)]
    return image, classes, [f"p{random.integers(max(2, n // 2))}" for _ in range(n)]


@pytest.mark.parametrize("n", [2, 3, 7, 30, 60])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("elements", [1, 100, 10**7])
def test_every_metric_is_that_of_the_loop(
    n: int,
    ties: bool,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    for seed in range(4):
        image, classes, patients = case(n, seed, ties)
        found = SlideRetrieval(labels_of(classes))(split_of(image, patients))
        assert found.metrics == pytest.approx(slow(image, classes, patients), abs=1e-12)


def test_slides_of_the_same_patient_are_no_keys() -> None:
    image = np.eye(4)[[0, 0, 1, 1]]
    labels = labels_of(["a", "a", "b", "b"])
    together = SlideRetrieval(labels)(split_of(image, ["p", "p", "q", "q"]))
    assert together.metrics == {}, "no query has a target of another patient"
    apart = SlideRetrieval(labels)(split_of(image, ["p", "q", "r", "s"]))
    assert apart.metrics["slide_retrieval/t/Acc@1"] == 1


def test_a_model_that_embeds_all_alike_gains_nothing() -> None:
    image = np.ones((12, 5)) / np.sqrt(5)
    classes: list[Any] = ["a"] * 6 + ["b"] * 6
    found = SlideRetrieval(labels_of(classes))(split_of(image, [f"p{i}" for i in range(12)]))
    assert found.metrics["slide_retrieval/t/Acc@5"] == 0


def test_resamples_are_of_queries() -> None:
    image, classes, patients = case(40, 9, ties=False)
    bootstrap = Bootstrap(30, seed=4)
    found = SlideRetrieval(labels_of(classes), bootstrap)(split_of(image, patients))
    assert found.resampled.keys() == found.metrics.keys()
    for name, value in found.metrics.items():
        lo, hi = bootstrap.interval(found.resampled[name])
        assert lo <= value <= hi and hi > lo
    assert found.numbers["slide_retrieval/t/Acc@1"] == found.details["slide_retrieval/t"]["queries"]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few(n: int) -> None:
    assert SlideRetrieval(labels_of(["a"] * n))(split_of(np.eye(3)[:n], ["p"] * n)).metrics == {}
