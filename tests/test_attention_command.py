"""`slidevlm attention`: table, pictures, annotations; over a slide's thumbnail."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import slidevlm.testing
from slidevlm import page_commands
from slidevlm.app.attending import faithfulness
from slidevlm.app.bags import opened, sample_of
from slidevlm.cli import main
from slidevlm.report.tile_maps import colours, least_distance, picture, png, scaled

SIDE = 256.0


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """12 tiles on a grid, in CLAM's layout."""
    grid = np.array([(x, y) for y in range(3) for x in range(4)]) * int(SIDE) + 512
    path = tmp_path / "slide_1.h5"
    with h5py.File(path, "w") as file:
        file["features"] = slidevlm.testing.bag(12)
        file["coords"] = grid
    return path


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> slidevlm.SlideModel:
    found = slidevlm.testing.model(unit="px")
    monkeypatch.setattr(page_commands, "load", lambda *_, **__: found)
    return found


def test_files_of_a_slide(features: Path, tmp_path: Path, model, capsys) -> None:
    out = tmp_path / "seen"
    words = ["attention", "run", str(features), "--output", str(out), "--sentence-wise", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(Path(file).is_file() for file in told["files"])
    with (out / "slide_1.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = model.attention(str(features), sentences=True)
    weights = [float(row["attention"]) for row in rows]
    assert weights == pytest.approx(found.tiles.tolist(), rel=1e-4)
    assert sum(weights) == pytest.approx(1, abs=1e-4)
    assert [(float(r["x"]), float(r["y"])) for r in rows[:5]] == [
        (512, 512), (768, 512), (1024, 512), (1280, 512), (512, 768)
    ]  # fmt: skip
    about = json.loads((out / "slide_1.json").read_text())
    assert about["sentences"] == list(found.sentences)
    assert len(about["sentences"]) == len([n for n in rows[0] if n.startswith("sentence_")])
    assert "not why it decides" in about["what"]

    tiles = json.loads((out / "slide_1.geojson").read_text())
    assert tiles["type"] == "FeatureCollection" and len(tiles["features"]) == 12
    fifth = tiles["features"][4]
    ring = fifth["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1] == [512, 768] and ring[2] == [512 + SIDE, 768 + SIDE]
    assert fifth["properties"]["objectType"] == "tile"
    assert fifth["properties"]["measurements"]["attention"] == pytest.approx(weights[4], rel=1e-4)

    image = np.asarray(Image.open(out / "slide_1_attention.png"))
    assert image.shape == (768, 1024, 3)
    expected = colours(scaled(found.tiles))
    for i in range(12):
        assert image[128 + 256 * (i // 4), 128 + 256 * (i % 4)].tolist() == expected[i].tolist()


def test_over_the_thumbnail(features: Path, tmp_path: Path, capsys) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("openslide")
    slide = np.full((2048, 2048, 3), 200, np.uint8)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        options = {"tile": (256, 256), "photometric": "rgb", "compression": None}
        file.write(slide, **options)
        file.write(slide[::2, ::2], subfiletype=1, **options)
    out = tmp_path / "seen"
    words = ["attention", "run", str(features), "--output", str(out)]
    assert main([*words, "--slide-file", str(tmp_path / "slide.tif")]) == 0
    assert "most attended" in capsys.readouterr().out
    image = np.asarray(Image.open(out / "slide_1_attention.png")).astype(int)
    assert image.shape == (1024, 1024, 3)
    inside = np.zeros((1024, 1024), bool)
    inside[256:640, 256:768] = True  # tiles lie from 512 to 1536 by 1280, at half the size
    assert (image[~inside] == 200).all() and (image[inside] != 200).any(1).all()
    (tmp_path / "no.tif").write_bytes(b"no slide")
    assert main([*words, "--slide-file", str(tmp_path / "no.tif")]) == 2
    assert "cannot be read by OpenSlide" in capsys.readouterr().err


def test_dropping_what_is_attended(model, features: Path) -> None:
    store, case, place = opened(str(features))
    sample = sample_of(model.trained, store, case, place, 100)
    weights = np.arange(12.0)
    found = faithfulness(model.trained, model.precision, sample, weights, range(3))
    whole = model.embed(str(features))
    bag = sample.bag
    for one in found:
        dropped = round(12 * one.share)
        left = slidevlm.Tiles(bag.features[: 12 - dropped], bag.positions[: 12 - dropped], bag.unit)
        # `Tiles` are centred anew; the tiny model's embedding may hardly notice.
        assert one.most_attended == pytest.approx(float(model.embed(left) @ whole), abs=2e-2)
        assert one.random_least <= one.random_mean <= one.random_most
    assert [round(12 * one.share) for one in found] == [1, 1, 3, 6, 9]


def test_one_of_several_specimens(tmp_path: Path, capsys) -> None:
    settings = slidevlm.testing.settings(tmp_path)
    words = ["attention", "run", str(settings["hdf5_filename"])]
    assert main(words) == 2
    assert "choose one with --specimen" in capsys.readouterr().err
    assert main([*words, "--specimen", "nobody"]) == 2
    assert "no specimen 'nobody'" in capsys.readouterr().err
    assert main(["attention"]) == 2


def test_pictures() -> None:
    assert least_distance(np.array([[0, 0], [224, 0], [448, 0], [0, 672]])) == 224
    assert least_distance(np.array([[5, 5]])) == 1
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    path = __import__("io").BytesIO(png(pixels))
    assert (np.asarray(Image.open(path)) == pixels).all()
    drawn = picture(np.array([[0.0, 0], [1, 0]]), 1.0, np.array([0.0, 1.0]))
    assert drawn.shape == (512, 1024, 3)
    assert (drawn[:, 0] < drawn[:, -1]).all(), "more is lighter"
