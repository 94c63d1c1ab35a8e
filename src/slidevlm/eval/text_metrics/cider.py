"""CIDEr and CIDEr-D (Vedantam et al., 2015), one reference a report.

`cider` is what pycocoevalcap's `Cider` computes: the D form, with counts clipped to the reference's
and a Gaussian penalty on the difference of lengths. `cider_plain` is the cosine alone, times 10.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from slidevlm.eval.text_metrics.ngrams import ngrams

_ORDER, _SIGMA = 4, 6.0


def statistics(
    generated: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """[N, 2] CIDEr-D and CIDEr of each report, whose means are those of the corpus.

    Document frequencies are those of all references given.
    """
    frequency = _document_frequencies(references)
    log_n = math.log(len(references)) if references else 0.0
    values = []
    for candidate, reference in zip(generated, references, strict=True):
        penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * _SIGMA**2))
        total = plain = 0.0
        for n in range(_ORDER):
            ours = _weigh(ngrams(candidate, n + 1), frequency, log_n)
            other = _weigh(ngrams(reference, n + 1), frequency, log_n)
            dot = sum(min(w, other[g]) * other[g] for g, w in ours.items() if g in other)
            norms = _norm(ours) * _norm(other)
            total += dot / norms * penalty if norms else dot * penalty
            product = sum(w * other[g] for g, w in ours.items() if g in other)
            plain += product / norms if norms else product
        values.append((10 * total / _ORDER, 10 * plain / _ORDER))
    return np.array(values, dtype=np.float64).reshape(-1, 2)


def _document_frequencies(references: Sequence[Sequence[str]]) -> dict[tuple[str, ...], int]:
    """In how many texts each n-gram is, of those that are in two or more.

    An n-gram of one text has the weight of one that is in none, and most are of one. Kept as
    tuples, those of 50,000 reports of 250 words would take nine gigabytes; a hash has 8 bytes.
    """
    hashes = array("q")
    for grams in map(_distinct, references):
        hashes.extend(map(hash, grams))
    ordered = np.sort(np.frombuffer(hashes, np.int64)) if hashes else np.zeros(0, np.int64)
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    # Two n-grams of one hash are both counted, which only costs their room.
    frequency: Counter[tuple[str, ...]] = Counter()
    for grams in map(_distinct, references):
        frequency.update(gram for gram in grams if hash(gram) in twice)
    return frequency


def _distinct(tokens: Sequence[str]) -> set[tuple[str, ...]]:
    return {gram for n in range(1, _ORDER + 1) for gram in ngrams(tokens, n)}


def _weigh(
    counts: Counter[tuple[str, ...]], frequency: dict[tuple[str, ...], int], log_n: float
) -> dict[tuple[str, ...], float]:
    return {g: c * (log_n - math.log(frequency.get(g, 1))) for g, c in counts.items()}


def _norm(weights: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(w * w for w in weights.values()))
