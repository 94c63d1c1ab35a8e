"""Weights of tiles as files: a picture, and annotations that QuPath reads."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np

_SIDE = 1024  # of a picture, at most
# From none to much; dark blue over violet to yellow, which stays ordered in grey and to the
# colour-blind.
_COLOURS = np.array(
    [[20, 16, 60], [84, 31, 120], [156, 46, 127], [222, 73, 104], [251, 135, 97], [252, 253, 191]],
    np.float64,
)
_BETWEEN = 0.55  # opacity over a thumbnail


def least_distance(positions: np.ndarray) -> float:
    """The side of a tile on a grid: the least distance along an axis between [T, 2] positions."""
    gaps = [np.diff(np.unique(axis.round(2))) for axis in positions.T]
    found = [float(gap[gap > 1e-3].min()) for gap in gaps if (gap > 1e-3).any()]
    return min(found) if found else 1.0


def scaled(weights: np.ndarray) -> np.ndarray:
    """[T] weights -> [T] of 0 to 1: 1 is the 99th percentile and everything above it."""
    top = float(np.quantile(weights, 0.99))
    low = float(weights.min())
    if top <= low:
        return np.ones_like(weights, dtype=np.float64) * 0.5
    return np.clip((weights - low) / (top - low), 0, 1)


def colours(values: np.ndarray) -> np.ndarray:
    """[T] of 0 to 1 -> [T, 3] uint8."""
    place = values * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(_COLOURS) - 2)
    part = (place - low)[:, None]
    mixed = _COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part
    return mixed.round().astype(np.uint8)


def picture(
    positions: np.ndarray,
    size: float,
    weights: np.ndarray,
    background: np.ndarray | None = None,
    pixels: float = 1.0,
) -> np.ndarray:
    """Tiles drawn at their places: [h, w, 3] uint8.

    Args:
        positions: [T, 2] upper left corners; with a background, from the slide's corner.
        size: side of a tile, in the unit of the positions.
        weights: [T].
        background: [h, w, 3] uint8, the slide's thumbnail.
        pixels: of the background, a unit of the positions.
    """
    corner = np.zeros(2)
    if background is None:
        corner = positions.min(0)
        extent = positions.max(0) + size - corner
        pixels = _SIDE / float(extent.max())
        width, height = np.maximum(1, np.ceil(extent * pixels)).astype(int)
        canvas = np.full((height, width, 3), 255, np.uint8)
    else:
        canvas = background.copy()
    opacity = 1.0 if background is None else _BETWEEN
    starts = np.floor((positions - corner) * pixels).astype(int)
    ends = np.maximum(starts + 1, np.ceil((positions - corner + size) * pixels).astype(int))
    starts = np.maximum(starts, 0)
    for (x, y), (right, below), colour in zip(starts, ends, colours(scaled(weights)), strict=True):
        part = canvas[y:below, x:right]
        part[:] = (opacity * colour + (1 - opacity) * part).round().astype(np.uint8)
    return canvas


def png(pixels: np.ndarray) -> bytes:
    """[h, w, 3] uint8 -> a PNG file."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def geojson(positions: np.ndarray, size: float, measures: dict[str, np.ndarray]) -> str:
    """Tiles as QuPath imports them: polygons in level-0 pixels, with measurements.

    Args:
        positions: [T, 2] upper left corners in level-0 pixels.
        size: side of a tile, likewise.
        measures: name -> [T]; the first one colours the tiles.
    """
    first = next(iter(measures.values()))
    features: list[dict[str, Any]] = []
    for i, ((x, y), colour) in enumerate(
        zip(positions.tolist(), colours(scaled(first)).tolist(), strict=True)
    ):
        corners = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[round(a, 2), round(b, 2)] for a, b in corners]],
                },
                "properties": {
                    "objectType": "tile",
                    "color": colour,
                    "measurements": {name: float(f"{v[i]:.6g}") for name, v in measures.items()},
                },
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features})
