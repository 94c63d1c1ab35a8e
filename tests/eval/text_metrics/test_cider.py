"""CIDEr-D against pycocoevalcap's recorded score, a count by hand, and the formula spelt out."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from slidevlm.eval.text_metrics import cider


def cider_d(generated: list[list[str]], references: list[list[str]]) -> np.ndarray:
    return cider.statistics(generated, references)[:, 0]


def slow_cider(generated: list[list[str]], references: list[list[str]]) -> list[float]:
    """Vedantam et al., section 3 and the D form: vectors over the whole vocabulary of n-grams."""

    def grams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    totals = [0.0] * len(references)
    for n in (1, 2, 3, 4):
        vocabulary = sorted({g for text in generated + references for g in grams(text, n)})
        idf = []
        for gram in vocabulary:
            documents = sum(gram in grams(reference, n) for reference in references)
            idf.append(math.log(len(references) / max(1, documents)))
        for i, (candidate, reference) in enumerate(zip(generated, references, strict=True)):
            c = [grams(candidate, n).count(g) * w for g, w in zip(vocabulary, idf, strict=True)]
            r = [grams(reference, n).count(g) * w for g, w in zip(vocabulary, idf, strict=True)]
            norms = math.sqrt(sum(x * x for x in c)) * math.sqrt(sum(x * x for x in r))
            if norms:
                clipped = sum(min(x, y) * y for x, y in zip(c, r, strict=True))
                gap = len(candidate) - len(reference)
                totals[i] += clipped / norms * math.exp(-(gap**2) / 72)
    return [10 * total / 4 for total in totals]


def test_recorded_score_of_pycocoevalcap(recorded) -> None:
    found = cider_d(*recorded).mean()
    assert found == pytest.approx(4.7434083699, abs=1e-9, rel=0)


def test_slow_reference(texts) -> None:
    expected = slow_cider(*texts)
    found = cider_d(*texts)
    assert found.tolist() == pytest.approx(expected, abs=1e-10)
    if len(expected) == 40:
        assert max(expected) > 5 and min(expected) == 0


def test_n_grams_of_one_report_take_no_memory() -> None:
    """All n-grams of 50,000 long reports as tuples would take nine gigabytes."""
    letters = [[f"{i}-{j}" for j in range(200)] for i in range(60)]  # no n-gram comes twice
    tracemalloc.start()
    try:
        found = cider.statistics(letters, letters)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tolist() == pytest.approx(np.full((60, 2), 10.0))
    n_grams = 60 * (200 + 199 + 198 + 197)
    assert peak < 60 * n_grams, f"{peak / n_grams:.0f} bytes an n-gram"


def test_by_hand() -> None:
    # "b" is in one of two references, "a" in both and so weighs nothing. Of "a b" only 1- and
    # 2-grams exist: both are equal here, and 2 of 4 orders give 1.
    found = cider_d([["a", "b"], ["a"]], [["a", "b"], ["a", "c"]])
    assert found.tolist() == pytest.approx([5.0, 0.0], abs=1e-12)
    # One word of two, equally rare: cosine 1/sqrt(2) of one order, length off by one.
    found = cider_d([["b"], ["x"]], [["b", "c"], ["d"]])
    assert found[0] == pytest.approx(10 / 4 * math.sqrt(0.5) * math.exp(-1 / 72), abs=1e-12)


def test_repeating_a_word_is_no_way_to_score() -> None:
    references = [["b", "c"], ["d", "e"]]
    once = cider_d([["b", "c"], []], references)[0]
    often = cider_d([["b"] * 8, []], references)[0]
    assert often < once / 4


def test_one_text_says_nothing_about_rarity() -> None:
    """As in pycocoevalcap: every word is in all documents, so all weights are 0."""
    assert cider_d([["a", "b"]], [["a", "b"]]).tolist() == [0.0]


@pytest.mark.parametrize(("candidate", "reference"), [([], ["a"]), (["a"], []), ([], [])])
def test_empty_texts(candidate: list[str], reference: list[str]) -> None:
    found = cider_d([candidate, ["b"]], [reference, ["b"]])
    assert found[0] == 0.0
    assert found[1] > 0 and math.isfinite(found[1])


def test_words_unknown_to_the_references_weigh_most() -> None:
    references = [["a", "b"], ["c", "d"], ["e", "f"]]
    plain = cider_d([["a", "b"], [], []], references)[0]
    strange = cider_d([["a", "z"], [], []], references)[0]
    assert 0 < strange < plain
    assert cider_d([["y", "z"], [], []], references)[0] == 0.0


def test_lists_of_different_lengths_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        cider_d([["a"]], [["a"], ["b"]])
