"""CIDEr and CIDEr-D (Vedantam et al., 2015), one reference a report.

`cider` is what pycocoevalcap's `Cider` computes: the D form, with counts clipped to the reference's
and a Gaussian penalty on the difference of lengths. `cider_plain` is the cosine alone, times 10.
"""

from __future__ import annotations

import math
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
    theirs = [[ngrams(r, n) for n in range(1, _ORDER + 1)] for r in references]
    frequency: Counter[tuple[str, ...]] = Counter(g for r in theirs for n in r for g in n)
    log_n = math.log(len(references)) if references else 0.0
    values = []
    for candidate, reference, counts in zip(generated, references, theirs, strict=True):
        penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * _SIGMA**2))
        total = plain = 0.0
        for n in range(_ORDER):
            ours = _weigh(ngrams(candidate, n + 1), frequency, log_n)
            other = _weigh(counts[n], frequency, log_n)
            dot = sum(min(w, other[g]) * other[g] for g, w in ours.items() if g in other)
            norms = _norm(ours) * _norm(other)
            total += dot / norms * penalty if norms else dot * penalty
            product = sum(w * other[g] for g, w in ours.items() if g in other)
            plain += product / norms if norms else product
        values.append((10 * total / _ORDER, 10 * plain / _ORDER))
    return np.array(values, dtype=np.float64).reshape(-1, 2)


def _weigh(
    counts: Counter[tuple[str, ...]], frequency: Counter[tuple[str, ...]], log_n: float
) -> dict[tuple[str, ...], float]:
    return {g: c * (log_n - math.log(max(1.0, frequency[g]))) for g, c in counts.items()}


def _norm(weights: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(w * w for w in weights.values()))
