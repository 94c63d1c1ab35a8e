"""BLEU (Papineni et al., 2002) over a corpus, one reference a report, as pycocoevalcap has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slidevlm.eval.text_metrics.ngrams import ngrams

_ORDER = 4
# pycocoevalcap's: they keep logarithms finite and decide nothing else.
_TINY, _SMALL = 1e-15, 1e-9


def statistics(
    generated: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """[N, 10]: matches and totals of 1- to 4-grams, generated length, reference length."""
    rows = []
    for candidate, reference in zip(generated, references, strict=True):
        matches, totals = [], []
        for n in range(1, _ORDER + 1):
            ours, theirs = ngrams(candidate, n), ngrams(reference, n)
            matches.append(sum(min(count, theirs[g]) for g, count in ours.items()))
            totals.append(max(0, len(candidate) - n + 1))
        rows.append([*matches, *totals, len(candidate), len(reference)])
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * _ORDER + 2)


def finish(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Sums [..., 10] of the statistics of corpora -> their `bleu_1` .. `bleu_4`, each [...]."""
    matches, totals = sums[..., :_ORDER], sums[..., _ORDER : 2 * _ORDER]
    precision = (matches + _TINY) / (totals + _SMALL)
    geometric = np.exp(np.cumsum(np.log(precision), axis=-1) / np.arange(1, _ORDER + 1))
    ratio = (sums[..., -2] + _TINY) / (sums[..., -1] + _SMALL)
    brevity = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    return {f"bleu_{n + 1}": geometric[..., n] * brevity for n in range(_ORDER)}
