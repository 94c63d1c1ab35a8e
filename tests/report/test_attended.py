"""Weights of tiles as the page carries them, read back."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from slidevlm.report.attended import attended, beneath, neighbour_distance, raster


def grid(columns: int, rows: int, step: float) -> np.ndarray:
    return np.array([(x, y) for y in range(rows) for x in range(columns)]) * step


def decoded(one: dict, slide: int, number: int) -> np.ndarray:
    """[rows, columns] in even shares, NaN where no tile is: as page.js reads it."""
    part, scale = one["slides"][slide], one["scales"][number]
    levels = np.frombuffer(base64.b64decode(part["levels"][number]), np.uint8)
    found = np.full(part["rows"] * part["columns"], np.nan)
    found[np.cumsum(part["steps"])] = (levels / 255) ** 2 * scale["most"]
    return found.reshape(part["rows"], part["columns"])


def test_each_tile_is_found_at_its_place() -> None:
    random = np.random.default_rng(0)
    places = grid(9, 7, 224.0)[random.permutation(63)[:40]] + 1000
    weights = random.dirichlet(np.ones(40), 3)
    slides = np.zeros(40, np.int64)
    one = attended("S", places, slides, weights[0], ["a.", "b."], weights[1:])
    assert one["tiles"] == 40 and one["sentences"] == ["a.", "b."]
    at = ((places - places.min(0)) / 224).round().astype(int)
    for number, row in enumerate(weights):
        shown = decoded(one, 0, number)
        assert np.isfinite(shown).sum() == 40
        even = 40 * row
        assert shown[at[:, 1], at[:, 0]] == pytest.approx(even, abs=0.009 * even.max())
        assert one["scales"][number]["top"] == pytest.approx(np.quantile(even, 0.99), rel=1e-3)
    assert one["slides"][0]["size"] == 224 and one["slides"][0]["factor"] == 1


def test_slides_have_a_picture_each_and_one_scale() -> None:
    places = np.concatenate([grid(3, 2, 1.0), grid(2, 2, 2.0)])
    slides, weights = np.repeat([0, 1], [6, 4]), np.arange(1.0, 11) / 55
    one = attended("S", places, slides, weights, [], np.zeros((0, 10)))
    assert [s["share"][0] for s in one["slides"]] == pytest.approx([21 / 55, 34 / 55], abs=1e-4)
    assert np.nanmax(decoded(one, 1, 0)) == pytest.approx(100 / 55, rel=1e-3)
    assert np.nanmax(decoded(one, 0, 0)) == pytest.approx(60 / 55, rel=0.01)


def test_too_many_tiles_are_averaged() -> None:
    found = raster(grid(30, 20, 5.0), cells=200)
    assert (found.factor, found.columns, found.rows) == (2, 15, 10) and found.size == 10
    weights = np.arange(600.0)
    wide = weights.reshape(20, 30)
    expected = wide.reshape(10, 2, 15, 2).mean((1, 3))
    assert found.mean(weights).reshape(10, 15) == pytest.approx(expected)
    assert max(raster(grid(1000, 1, 1.0), side=100).columns for _ in "a") <= 100


def test_tiles_off_any_grid_keep_their_distance() -> None:
    random = np.random.default_rng(1)
    places = grid(20, 20, 100.0) + random.uniform(-3, 3, (400, 2))
    assert 85 < neighbour_distance(places) < 105
    assert max(raster(places).columns, raster(places).rows) < 26
    assert neighbour_distance(places[:1]) == 1 and len(raster(places[:1]).cells) == 1


def test_without_positions_nothing_is_drawn() -> None:
    one = attended("S", None, np.zeros(3, np.int64), np.ones(3) / 3, [], np.zeros((0, 3)))
    assert one["slides"] == [] and one["scales"] == []


def test_a_slide_lies_under_its_tiles() -> None:
    """A tile's corner, in cells, is where its place in the slide is."""
    places = grid(9, 7, 224.0) + np.array([1000, 448])
    one = attended("S", places, np.zeros(63, np.int64), np.ones(63) / 63, [], np.zeros((0, 63)))
    size = one["slides"][0]["size"]
    found = beneath(size, places, 5000.0, 3000.0)
    column, row = 4, 2  # its cell reaches from 3.5 to 4.5
    x = (column - 0.5 - found["x"]) / found["width"] * 5000
    y = (row - 0.5 - found["y"]) / found["height"] * 3000
    assert (x, y) == pytest.approx((1000 + 4 * 224, 448 + 2 * 224), rel=1e-4)
