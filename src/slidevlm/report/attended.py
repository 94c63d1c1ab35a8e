"""Weights of tiles as the page carries them: a raster a slide, a byte a cell and set of weights.

A cell is as wide as the distance between neighbouring tiles, or a whole multiple where a slide
would have more cells than a page should carry; weights of tiles in one cell are averaged.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CELLS = 20_000  # of a slide that have tiles, at most
SIDE = 400  # cells along a side, at most
_LOOKED_AT = 256  # tiles whose nearest neighbours tell the distance
_LEVELS = 255


@dataclass(frozen=True, eq=False)
class Raster:
    """The cells of one slide that have tiles.

    Args:
        size: side of a cell, in the unit of the positions.
        factor: the same in distances between neighbouring tiles.
        columns: of the whole raster, with its empty cells.
        rows: likewise.
        cells: [C] row * columns + column, ascending.
        of_tile: [T] the place of each tile's cell in `cells`.
    """

    size: float
    factor: int
    columns: int
    rows: int
    cells: np.ndarray
    of_tile: np.ndarray

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """[T] of tiles -> [C] means of cells."""
        counts = np.bincount(self.of_tile, minlength=len(self.cells))
        found: np.ndarray = np.bincount(self.of_tile, weights, len(self.cells)) / counts
        return found


def raster(positions: np.ndarray, cells: int = CELLS, side: int = SIDE) -> Raster:
    """Where [T, 2] tiles lie, in at most so many cells, and so many along a side."""
    places = positions.astype(np.float64)
    places = places - places.min(0)
    distance, factor = neighbour_distance(places), 1
    factor = max(1, int(np.ceil((places.max() / distance + 1) / (side + 1))))
    while True:
        # A little more, as positions of float32 lie a little before their place too.
        at = np.floor(places / (factor * distance) + 1e-3).astype(np.int64)
        columns, rows = (int(n) + 1 for n in at.max(0))
        found, of_tile = np.unique(at[:, 1] * columns + at[:, 0], return_inverse=True)
        if len(found) <= cells and max(columns, rows) <= side:
            return Raster(factor * distance, factor, columns, rows, found, of_tile)
        factor += 1


def neighbour_distance(positions: np.ndarray) -> float:
    """The median distance, along an axis, of a tile of [T, 2] to its nearest one; 1 of one tile."""
    places = np.unique(positions.astype(np.float64).round(2), axis=0)
    if len(places) == 1:
        return 1.0
    some = np.random.default_rng(0).permutation(len(places))[:_LOOKED_AT]
    nearest = []
    for i in some:
        apart = np.abs(places - places[i]).max(1)
        apart[i] = np.inf
        nearest.append(apart.min())
    return float(np.median(nearest))


def beneath(size: float, positions: np.ndarray, width: float, height: float) -> dict[str, float]:
    """Where a slide of this width and height lies under the cells of its raster, in cells.

    Args:
        size: side of a cell, in the unit of the positions.
        positions: [T, 2] of the slide's tiles, upper left corners, from the slide's corner.
        width: of the slide, in the same unit.
        height: likewise.
    """
    # Cell 0 has its middle at 0, so the corner of the raster lies at -0.5.
    x, y = (-positions.astype(np.float64).min(0) / size - 0.5).tolist()
    found = {"x": x, "y": y, "width": width / size, "height": height / size}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def attended(
    specimen: str,
    positions: np.ndarray | None,
    slides: np.ndarray,
    tiles: np.ndarray,
    sentences: Sequence[str],
    by_sentence: np.ndarray,
) -> dict[str, Any]:
    """One specimen of the attention tab; weights are in even shares: 1 is 1 / T.

    Args:
        specimen: its name.
        positions: [T, 2]; None: it cannot be drawn.
        slides: [T] number of each tile's slide.
        tiles: [T] weights of the slide embedding, whose sum is 1.
        sentences: P of the generated report.
        by_sentence: [P, T].
    """
    found: dict[str, Any] = {
        "id": specimen,
        "tiles": len(tiles),
        "sentences": list(sentences),
        "slides": [],
        "scales": [],
    }
    if positions is None:
        return found
    sets = np.concatenate([tiles[None], by_sentence]).astype(np.float64)
    numbers = np.unique(slides)
    parts = [raster(positions[slides == number]) for number in numbers]
    means = [
        np.stack([part.mean(row[slides == number]) for row in sets]) * len(tiles)
        for part, number in zip(parts, numbers, strict=True)
    ]
    together = np.concatenate(means, 1)  # [P + 1, all cells]: one scale for all slides
    most = np.maximum(together.max(1), 1e-12)
    top = np.quantile(together, 0.99, axis=1)
    found["scales"] = [
        {"most": float(f"{m:.4g}"), "top": float(f"{t or m:.4g}")}
        for m, t in zip(most.tolist(), top.tolist(), strict=True)
    ]
    for number, part, mean in zip(numbers, parts, means, strict=True):
        # By the root, so that small weights are told apart too.
        levels = np.rint(_LEVELS * np.sqrt(mean / most[:, None])).astype(np.uint8)
        shares = sets[:, slides == number].sum(1)
        found["slides"].append(
            {
                "size": float(f"{part.size:.6g}"),
                "factor": part.factor,
                "columns": part.columns,
                "rows": part.rows,
                "steps": np.diff(part.cells, prepend=0).tolist(),
                "levels": [base64.b64encode(row.tobytes()).decode() for row in levels],
                "share": [round(float(s), 4) for s in shares],
            }
        )
    return found
