"""Tokens and n-grams."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.eval.text_metrics.ngrams import ngrams, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        (" \n\t ", []),
        ("Breast, core-needle biopsy;", ["breast", "core-needle", "biopsy"]),
        ("Gleason 3+4 = 7", ["gleason", "3", "4", "7"]),
        ("0.5 cm, 3/12 nodes.", ["0.5", "cm", "3/12", "nodes"]),
        ("pT2. N0", ["pt2", "n0"]),
        ("(grade II)!", ["grade", "ii"]),
        ("... -- ; ,", []),
        ("-positive", ["positive"]),
        ("Größe 3 µm", ["größe", "3", "µm"]),
        ("1.2.3-4/5", ["1.2.3-4/5"]),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_tokens_are_of_the_text_and_tokenise_to_themselves(text: str) -> None:
    tokens = tokenize(text)
    place = 0
    for token in tokens:  # in order, none made up
        place = text.lower().index(token, place) + len(token)
        assert not any(c.isspace() for c in token)


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
