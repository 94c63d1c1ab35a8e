"""N-grams."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.eval.text_metrics.ngrams import ngrams


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("ab"), max_size=10), st.integers(1, 5))
def test_ngrams_are_all_runs(tokens: list[str], n: int) -> None:
    counts = ngrams(tokens, n)
    assert counts == Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    assert sum(counts.values()) == max(0, len(tokens) - n + 1)


def test_ngrams_by_hand() -> None:
    tokens = ["a", "b", "a", "b", "c"]
    assert ngrams(tokens, 1) == {("a",): 2, ("b",): 2, ("c",): 1}
    assert ngrams(tokens, 2) == {("a", "b"): 2, ("b", "a"): 1, ("b", "c"): 1}
    assert ngrams(tokens, 5) == {tuple(tokens): 1}
    assert ngrams(tokens, 6) == {} == ngrams([], 1)
