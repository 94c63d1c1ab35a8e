"""Texts that all caption scores are tried on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

Corpus = tuple[list[list[str]], list[list[str]]]


def corpus(seed: int, n: int = 30, words: int = 8, longest: int = 14) -> Corpus:
    """Generated and true texts over few words, so that n-grams repeat; some texts are empty."""
    random = np.random.default_rng(seed)

    def text() -> list[str]:
        return [f"w{i}" for i in random.integers(0, words, random.integers(0, longest))]

    generated, references = [], []
    for _ in range(n):
        reference = text()
        kept = [w for w in reference if random.random() < 0.8]
        generated.append(kept if random.random() < 0.7 else text())
        references.append(reference)
    return generated, references


@pytest.fixture(params=range(6))
def texts(request: pytest.FixtureRequest) -> Corpus:
    """Several random corpora, from one text to 40."""
    return corpus(request.param, n=(1, 2, 5, 40, 40, 40)[request.param])


@pytest.fixture(scope="session")
def recorded(shared: Path) -> Corpus:
    """The 1,002 pairs that pycocoevalcap has scored, tokens split at spaces."""
    with (shared / "oracles/captions/reg2025_pairs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1002
    return (
        [row["Generated Reports"].split() for row in rows],
        [row["Ground Truths"].split() for row in rows],
    )
