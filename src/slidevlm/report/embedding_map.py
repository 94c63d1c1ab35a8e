"""Embeddings in two dimensions, and who is near whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_ROWS = 1024  # of the similarities held at a time


def pca(vectors: np.ndarray) -> dict[str, Any]:
    """[N, E] -> the first two principal components, with the share of the variance they explain.

    Rows that are not finite have no place. The sign of a component is such that its largest loading
    is positive, so equal data give an equal picture.
    """
    finite = np.isfinite(vectors).all(axis=1)
    x = vectors[finite].astype(np.float64)
    places = np.full((len(vectors), 2), np.nan)
    share = [0.0, 0.0]
    if len(x) > 1:
        centred = x - x.mean(axis=0)
        _, scale, axes = np.linalg.svd(centred, full_matrices=False)
        axes = (
            axes[:2] * np.sign(axes[:2][range(len(axes[:2])), np.abs(axes[:2]).argmax(1)])[:, None]
        )
        places[finite, : len(axes)] = centred @ axes.T
        places[finite, len(axes) :] = 0.0
        total = float((scale**2).sum())
        share = [float(s**2) / total if total else 0.0 for s in (*scale[:2], 0.0, 0.0)][:2]
    elif len(x):
        places[finite] = 0.0
    return {"name": "PCA", "share": [round(s, 4) for s in share], **_xy(places)}


def umap(vectors: np.ndarray) -> dict[str, Any] | None:
    """[N, E] -> UMAP of cosine distances, seeded; None where umap-learn is not installed."""
    try:
        from umap import UMAP
    except ImportError:
        return None
    finite = np.isfinite(vectors).all(axis=1)
    places = np.full((len(vectors), 2), np.nan)
    found = UMAP(n_components=2, metric="cosine", random_state=0, n_jobs=1)
    places[finite] = found.fit_transform(vectors[finite])
    return {"name": "UMAP", **_xy(places)}


def _xy(places: np.ndarray) -> dict[str, list[float | None]]:
    return {
        axis: [float(f"{v:.4g}") if np.isfinite(v) else None for v in column]
        for axis, column in zip("xy", places.T.tolist(), strict=True)
    }


def nearest(
    queries: np.ndarray, keys: np.ndarray, names: Sequence[int], k: int, *, skip_self: bool
) -> list[list[list[float]]]:
    """Of each of [N, E] queries, the k keys [N, E] of highest cosine: pairs of name and cosine.

    Args:
        names: [N] what the keys are called.
        skip_self: a query does not find the key of its own number.
    """
    n = len(queries)
    k = min(k, n - skip_self)
    found: list[list[list[float]]] = []
    columns = np.nan_to_num(keys.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).T
    for start in range(0, n, _ROWS):
        part = np.nan_to_num(queries[start : start + _ROWS].astype(np.float64))
        scores = part @ columns
        if skip_self:
            scores[range(len(part)), range(start, start + len(part))] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found += [
            [[names[j], round(float(row[j]), 4)] for j in places]
            for row, places in zip(scores, order.tolist(), strict=True)
        ]
    return found
