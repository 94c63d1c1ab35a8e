"""What a new model starts from, against plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from slidevlm.data.cases import open_store
from slidevlm.data.statistics import tile_moments, token_table
from slidevlm.data.tokenizer import Tokenizer

REPORTS = [
    "Adenocarcinoma of the colon. Margins free.",
    "Colon: adenocarcinoma, margins free.",
    "Clear cell renal cell carcinoma of the kidney.",
    "Kidney, renal cell carcinoma, clear cell.",
    "Glioblastoma of the brain.",
    "Brain: glioblastoma.",
] * 3


def test_tile_moments_are_those_of_all_tiles(write: Callable[..., Path]) -> None:
    store = open_store(
        hdf5_filename=str(write([5, 9, 700])),
        hdf5_feature_attribute="uni",
        hdf5_text_attribute="report",
        root_dir=None,
    )
    mean, deviation = tile_moments(store, store.cases[:2], seed=0)
    every = torch.cat([store.read(c, None).features.double() for c in store.cases[:2]]).numpy()
    np.testing.assert_allclose(mean, every.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deviation, every.std(0), rtol=1e-4)
    again = tile_moments(store, store.cases, seed=0)
    assert torch.equal(again[0], tile_moments(store, store.cases, seed=0)[0])
    assert not torch.equal(again[0], tile_moments(store, store.cases, seed=1)[0])


def test_a_constant_channel_has_deviation_one(write: Callable[..., Path]) -> None:
    store = open_store(
        hdf5_filename=str(write([5])),
        hdf5_feature_attribute="uni",
        hdf5_text_attribute="report",
        root_dir=None,
    )
    assert tile_moments(store, store.cases, seed=0)[1][1] == 1.0  # names the specimen


def test_token_table_is_latent_semantic_analysis() -> None:
    """Against the same written with dense matrices and a full decomposition."""
    tokenizer = Tokenizer.train(REPORTS, 400)
    table = token_table(tokenizer, REPORTS, rank=3, seed=0).double().numpy()
    words = [tokenizer.piece(i).strip().casefold() or f"#{i}" for i in range(tokenizer.vocab_size)]
    names = sorted(set(words))
    counts = np.zeros((len(REPORTS), len(names)))
    for row, report in zip(counts, REPORTS, strict=True):
        for token in tokenizer.tokens(report):
            row[names.index(words[token])] += 1
    frequency = (counts > 0).sum(0)
    idf = np.where(frequency > 0, np.log((1 + len(REPORTS)) / (1 + frequency)) + 1, 0)
    weighted = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    right = np.linalg.svd(weighted, full_matrices=False)[2][:3]
    expected = (right * idf).T[[names.index(w) for w in words]]
    # Singular vectors are unique up to a rotation within equal singular values: compare products.
    np.testing.assert_allclose(table @ table.T, expected @ expected.T, atol=1e-5)


def test_token_table_brings_alike_reports_together() -> None:
    tokenizer = Tokenizer.train(REPORTS, 400)
    table = token_table(tokenizer, REPORTS, rank=4, seed=0)
    rows = torch.stack([table[tokenizer.tokens(r)].sum(0) for r in REPORTS[:6]])
    rows = torch.nn.functional.normalize(rows, dim=1)
    cosine = rows @ rows.T
    assert min(cosine[0, 1], cosine[2, 3], cosine[4, 5]) > 0.6
    assert cosine[0, 4] < 0.5


def test_a_rank_above_the_number_of_reports_is_filled_with_zeros() -> None:
    tokenizer = Tokenizer.train(REPORTS, 300)
    table = token_table(tokenizer, REPORTS[:2], rank=64, seed=0)
    assert table.shape == (tokenizer.vocab_size, 64)
    assert table.isfinite().all()
    assert (table[:, 2:].abs() < 1e-5).all()
