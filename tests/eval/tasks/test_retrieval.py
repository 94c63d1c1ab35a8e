"""Ranks against ones counted out pair by pair with exact sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.batch import Predictions
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.tasks import retrieval as module
from slidevlm.eval.tasks.retrieval import Retrieval
from slidevlm.eval.tasks.retrieval import ranks as both_ranks


def ranks(queries: np.ndarray, keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """One way; the other must be the same with the arguments exchanged."""
    one, other = both_ranks(queries, keys, ids)
    assert [a.tolist() for a in both_ranks(keys, queries, ids)] == [other.tolist(), one.tolist()]
    return one


def slow_ranks(queries: np.ndarray, keys: np.ndarray, ids: np.ndarray) -> list[int]:
    """For each query: the best of its targets, and all others that are not strictly worse."""
    found = []
    for i, query in enumerate(queries):
        scores = [
            math.fsum(float(a) * float(b) for a, b in zip(query, k, strict=True)) for k in keys
        ]
        best = max(s for s, name in zip(scores, ids, strict=True) if name == ids[i])
        before = [s for s, n in zip(scores, ids, strict=True) if n != ids[i] and s >= best]
        found.append(1 + len(before))
    return found


def unit(shape: tuple[int, int], seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def predictions(image: np.ndarray, text: np.ndarray, ids: np.ndarray) -> Predictions:
    names = tuple(f"s{i}" for i in range(len(image)))
    return Predictions(names, names, names, ids, image, text)


@pytest.mark.parametrize("n", [1, 2, 7, 60])
@pytest.mark.parametrize("rows", [1, 3, 7, 60, 1000])
def test_blocks_smaller_and_larger_than_the_split(
    n: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    monkeypatch.setattr(module, "_COLUMNS", max(1, rows // 2))
    image, text = unit((n, 5), 1), unit((n, 5), 2)
    ids = np.random.default_rng(3).integers(0, max(1, 2 * n // 3), n)
    assert ranks(image, text, ids).tolist() == slow_ranks(image, text, ids)
    assert ranks(text, image, ids).tolist() == slow_ranks(text, image, ids)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_ties_and_any_identical_reports(data: st.DataObject) -> None:
    """Small whole numbers: ties are exact and frequent."""
    n = data.draw(st.integers(1, 12))
    row = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    rows = st.lists(row, min_size=n, max_size=n)
    image, text = (np.array(data.draw(rows), dtype=np.float32) for _ in range(2))
    ids = np.array(data.draw(st.lists(st.integers(-2, 3), min_size=n, max_size=n)))
    assert ranks(image, text, ids).tolist() == slow_ranks(image, text, ids)


def test_identical_reports_are_one_target() -> None:
    keys = np.array([[1, 0], [0.6, 0.8], [0, 1]], dtype=np.float32)
    queries = np.array([[0, 1], [0, 1], [0, 1]], dtype=np.float32)
    # Query 0's own key is the worst, but the third has its report and is the best.
    assert ranks(queries, keys, np.array([7, 8, 7])).tolist() == [1, 2, 1]
    assert ranks(queries, keys, np.array([7, 8, 9])).tolist() == [3, 2, 1]


def test_ties_are_pessimistic() -> None:
    same = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (4, 1))
    assert ranks(same, same, np.arange(4)).tolist() == [4] * 4
    assert ranks(same, same, np.array([0, 0, 1, 2])).tolist() == [3, 3, 4, 4]
    assert ranks(same, same, np.zeros(4, np.int64)).tolist() == [1] * 4


@pytest.mark.parametrize("seed", range(30))
def test_a_model_that_embeds_all_texts_alike_finds_nothing(seed: int) -> None:
    """Matrix products round equal columns differently: without care these ranks are chance."""
    random = np.random.default_rng(seed)
    n, width = int(random.integers(2, 300)), int(random.integers(2, 300))
    image, text = unit((n, width), seed), np.tile(unit((1, width), seed + 99), (n, 1))
    assert set(ranks(image, text, np.arange(n)).tolist()) == {n}


def test_what_is_not_a_number_is_never_found() -> None:
    image, text = unit((4, 3), 1), unit((4, 3), 2)
    broken = image.copy()
    broken[1] = np.nan
    expected = slow_ranks(image, text, np.arange(4))
    expected[1] = 4
    assert ranks(broken, text, np.arange(4)).tolist() == expected
    found = ranks(text, broken, np.arange(4))
    assert found[1] == 4
    others = [0, 2, 3]
    clean = slow_ranks(text[others], image[others], np.arange(3))
    assert found[others].tolist() == [1 + rank for rank in clean], "a broken slide stands before"
    assert set(ranks(np.full((4, 3), np.nan), text, np.arange(4)).tolist()) == {4}


def test_metrics_both_ways() -> None:
    image, text = unit((40, 4), 5), unit((40, 4), 6)
    ids = np.arange(40) // 2
    metrics = Retrieval()(predictions(image, text, ids)).metrics
    assert len(metrics) == 12
    for name, queries, keys in (("image_to_text", image, text), ("text_to_image", text, image)):
        found = slow_ranks(queries, keys, ids)
        for k in (1, 5, 10):
            assert metrics[f"{name}/R@{k}"] == sum(rank <= k for rank in found) / 40
        assert metrics[f"{name}/mean_rank"] == pytest.approx(sum(found) / 40, abs=1e-12)
        assert metrics[f"{name}/median_rank"] == np.median(found)
        assert metrics[f"{name}/MRR"] == pytest.approx(sum(1 / r for r in found) / 40, abs=1e-12)
    assert metrics["image_to_text/mean_rank"] != metrics["text_to_image/mean_rank"]


def test_perfect_and_alone() -> None:
    vectors = unit((20, 8), 1)
    for n in (1, 2, 20):
        metrics = Retrieval()(predictions(vectors[:n], vectors[:n], np.arange(n))).metrics
        assert all(value == 1.0 for value in metrics.values())


def test_resamples_are_of_queries() -> None:
    image, text = unit((30, 4), 5), unit((30, 4), 6)
    ids = np.arange(30) // 2
    split = predictions(image, text, ids)
    split.patient_ids = tuple(f"p{i // 3}" for i in range(30))
    bootstrap = Bootstrap(40, seed=2)
    found = Retrieval(bootstrap)(split)
    counts = np.concatenate(list(bootstrap.blocks(split.patient_ids)))
    places = slow_ranks(text, image, ids)
    assert found.resampled.keys() == found.metrics.keys()
    for r, row in enumerate(counts):
        drawn = np.repeat(places, row)
        values = {name: found.resampled[f"text_to_image/{name}"][r] for name in ("R@5", "MRR")}
        assert values["R@5"] == pytest.approx(np.mean(drawn <= 5), abs=1e-12)
        assert values["MRR"] == pytest.approx(np.mean(1 / drawn), abs=1e-12)
        assert found.resampled["text_to_image/median_rank"][r] == np.median(drawn)
        assert found.resampled["text_to_image/mean_rank"][r] == pytest.approx(
            drawn.mean(), abs=1e-12
        )
    assert np.ptp(found.resampled["image_to_text/R@10"]) > 0.05
