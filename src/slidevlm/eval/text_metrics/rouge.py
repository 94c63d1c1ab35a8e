"""ROUGE-L (Lin, 2004) with beta 1.2, as pycocoevalcap has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BETA = 1.2


def statistics(
    generated: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """[N] ROUGE-L of each report; the corpus score is their mean."""
    return np.array(
        [_one(c, r) for c, r in zip(generated, references, strict=True)], dtype=np.float64
    )


def _one(candidate: Sequence[str], reference: Sequence[str]) -> float:
    common = longest_common_subsequence(candidate, reference)
    if common == 0:
        return 0.0
    precision, recall = common / len(candidate), common / len(reference)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length; a row of the usual table at a time, as bits of one integer (Hyyro, 2004)."""
    where: dict[str, int] = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matched = row & where.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()
