"""ROUGE-L against pycocoevalcap's recorded score, a count by hand, and the usual table."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.eval.text_metrics import rouge
from slidevlm.eval.text_metrics.rouge import longest_common_subsequence


def table(a: list[str], b: list[str]) -> int:
    """Longest common subsequence by dynamic programming, cell by cell."""
    cells = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longer = max(cells[i][j + 1], cells[i + 1][j])
            cells[i + 1][j + 1] = cells[i][j] + 1 if x == y else longer
    return cells[-1][-1]


def subsequences(tokens: list[str]) -> set[tuple[str, ...]]:
    return {
        chosen for n in range(len(tokens) + 1) for chosen in itertools.combinations(tokens, n)
    }  # fmt: skip


def slow_rouge(candidate: list[str], reference: list[str]) -> float:
    common = table(candidate, reference)
    if not common:
        return 0.0
    precision, recall = common / len(candidate), common / len(reference)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def test_recorded_score_of_pycocoevalcap(recorded) -> None:
    found = rouge.statistics(*recorded).mean()
    assert found == pytest.approx(0.6891037126, abs=1e-9, rel=0)


def test_slow_reference(texts) -> None:
    expected = [slow_rouge(c, r) for c, r in zip(*texts, strict=True)]
    found = rouge.statistics(*texts)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_by_hand() -> None:
    # "a c d" is common: precision 3/4, recall 3/5.
    value = rouge.statistics([["a", "c", "x", "d"]], [["a", "b", "c", "d", "e"]])[0]
    assert value == pytest.approx(2.44 * 3 / 4 * 3 / 5 / (3 / 5 + 1.44 * 3 / 4), abs=1e-12)
    # Recall weighs more than precision.
    short, long = rouge.statistics([["a"], ["a", "b", "c", "d"]], [["a", "b"], ["a", "b"]])
    assert (short, long) == pytest.approx((2.44 * 0.5 / (0.5 + 1.44), 2.44 * 0.5 / (1 + 0.72)))


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [([], ["a"], 0), (["a"], [], 0), ([], [], 0), (["a"], ["b"], 0), (["a"], ["a"], 1)],
)
def test_edges(candidate: list[str], reference: list[str], expected: float) -> None:
    assert rouge.statistics([candidate], [reference]).tolist() == [expected]


words = st.lists(st.sampled_from("abcd"), max_size=8)


@settings(max_examples=100, deadline=None)
@given(words, words)
def test_longest_common_subsequence(a: list[str], b: list[str]) -> None:
    assert longest_common_subsequence(a, b) == table(a, b)
    assert table(a, b) == max(len(s) for s in subsequences(a) & subsequences(b))


def test_long_texts_cross_the_borders_of_machine_words() -> None:
    for n in (63, 64, 65, 200):
        a = [f"{i * i % 17}" for i in range(n)]
        b = [f"{i * 5 % 13}" for i in range(n + 7)]
        assert longest_common_subsequence(a, b) == table(a, b) > 10
        assert longest_common_subsequence(a, a) == n


def test_lists_of_different_lengths_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        rouge.statistics([["a"]], [["a"], ["b"]])
