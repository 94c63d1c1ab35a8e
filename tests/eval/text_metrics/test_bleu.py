"""BLEU against pycocoevalcap's recorded scores, a count by hand, and a slow corpus BLEU."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slidevlm.eval.text_metrics import bleu

PERFECT = {f"bleu_{n}": pytest.approx(1.0, abs=1e-9) for n in (1, 2, 3, 4)}


def score(generated: list[list[str]], references: list[list[str]]) -> dict[str, float]:
    return totals(bleu.statistics(generated, references))


def totals(rows: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in bleu.finish(rows.sum(0)).items()}


def slow_bleu(generated: list[list[str]], references: list[list[str]]) -> list[float]:
    """Papineni et al., section 2: clipped counts over the corpus, geometric mean, brevity."""
    scores, product = [], 1.0
    candidate_length = sum(len(c) for c in generated)
    reference_length = sum(len(r) for r in references)
    brevity = 1.0
    if candidate_length < reference_length:
        if candidate_length == 0:
            return [0.0] * 4
        brevity = math.exp(1 - reference_length / candidate_length)
    for n in (1, 2, 3, 4):
        clipped = total = 0
        for candidate, reference in zip(generated, references, strict=True):
            ours = [candidate[i : i + n] for i in range(len(candidate) - n + 1)]
            theirs = [reference[i : i + n] for i in range(len(reference) - n + 1)]
            total += len(ours)
            for gram in ours:
                if gram in theirs:
                    theirs.remove(gram)  # so that each counts as often as the reference has it
                    clipped += 1
        product *= clipped / total if total else 0.0
        scores.append(brevity * product ** (1 / n))
    return scores


def test_recorded_scores_of_pycocoevalcap(recorded) -> None:
    expected = (0.7146580401, 0.6806727566, 0.6505447670, 0.6276039825)
    found = score(*recorded)
    assert list(found) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]
    assert list(found.values()) == pytest.approx(expected, abs=1e-9, rel=0)


def test_slow_reference(texts) -> None:
    expected = slow_bleu(*texts)
    found = list(score(*texts).values())
    for ours, theirs in zip(found, expected, strict=True):
        if theirs > 0:
            assert ours == pytest.approx(theirs, abs=1e-6)
        else:  # without a match at some order the small terms of pycocoevalcap are left
            assert ours < 0.01
    assert expected[0] > 0 or len(texts[0]) == 1


def test_by_hand() -> None:
    """The example of the paper: `the` counts twice, as often as the reference has it."""
    reference = ["the", "cat", "is", "on", "the", "mat"]
    assert score([["the"] * 7], [reference])["bleu_1"] == pytest.approx(2 / 7, abs=1e-9)
    found = score([["the", "cat", "sat", "on", "the", "mat"]], [reference])
    assert found["bleu_1"] == pytest.approx(5 / 6, abs=1e-9)
    assert found["bleu_2"] == pytest.approx(math.sqrt(5 / 6 * 3 / 5), abs=1e-9)
    assert found["bleu_3"] == pytest.approx((5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3), abs=1e-9)


def test_short_texts_pay_and_long_ones_do_not() -> None:
    reference = ["a", "b", "c", "d", "e", "f"]
    short = score([reference[:4]], [reference])
    assert list(short.values()) == pytest.approx([math.exp(1 - 6 / 4)] * 4, abs=1e-8)
    long = score([[*reference, "x", "y"]], [reference])
    assert long["bleu_1"] == pytest.approx(6 / 8, abs=1e-9)


def test_it_is_of_the_corpus_not_a_mean_of_texts() -> None:
    generated = [["a", "b", "c", "d"], ["x"]]
    references = [["a", "b", "c", "d"], ["y"]]
    assert score(generated, references)["bleu_1"] == pytest.approx(4 / 5, abs=1e-9)


def test_statistics_are_what_the_score_needs_and_add_up(texts) -> None:
    rows = bleu.statistics(*texts)
    assert rows.shape == (len(texts[0]), 10)
    for row, candidate, reference in zip(rows, *texts, strict=True):
        assert row[4:8].tolist() == [max(0, len(candidate) - n) for n in range(4)]
        assert row[8:].tolist() == [len(candidate), len(reference)]
        assert (row[:4] <= row[4:8]).all()
    some = [0, 0, len(rows) - 1]  # a bootstrap's choice
    chosen = [[part[i] for i in some] for part in texts]
    assert totals(rows[some]) == score(*chosen)


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [([], ["a", "b"]), (["a", "b"], []), ([], []), (["a"], ["b"])],
)
def test_nothing_in_common(candidate: list[str], reference: list[str]) -> None:
    found = score([candidate], [reference])
    assert all(0 <= value < 1e-3 and math.isfinite(value) for value in found.values())


def test_the_same_text() -> None:
    assert score([["a", "b", "c", "d"]] * 2, [["a", "b", "c", "d"]] * 2) == PERFECT
    assert score([["a"]], [["a"]])["bleu_1"] == pytest.approx(1.0, abs=1e-8)


def test_lists_of_different_lengths_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        bleu.statistics([["a"]], [["a"], ["b"]])
