"""`slidevlm attention`: table, pictures, annotations; over a slide's thumbnail."""

from __future__ import annotations

import copy
import csv
import json
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import slidevlm.testing
from slidevlm import page_commands
from slidevlm.app.attending import attend, faithfulness
from slidevlm.app.bags import opened, sample_of
from slidevlm.app.export import write_folder
from slidevlm.app.thumbnails import files_of, jpeg, thumbnail
from slidevlm.batch import Bags
from slidevlm.cli import main
from slidevlm.errors import DataError
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
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> slidevlm.SlideModel:
    """The model that lies in the folder `run`, from where the command is started."""
    found = slidevlm.testing.model(unit="px")
    write_folder(found.trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return found


def test_files_of_a_slide(features: Path, tmp_path: Path, model, capsys) -> None:
    out = tmp_path / "seen"
    words = ["attention", "run", str(features), "--output", str(out), "--sentence-wise"]
    assert main(words) == 0
    assert "change of a sentence's mean log-probability a token, after dropping 50 %" in (
        capsys.readouterr().out
    )
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (seen,) = told["specimens"]
    assert seen["specimen"] == "slide_1" and told["model"] == model.hash
    assert {Path(file).name for file in seen["files"]} == {p.name for p in out.iterdir()}
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


READERS = ("openslide", "tiffslide")


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the two libraries, the other hidden."""
    pytest.importorskip("tifffile")
    pytest.importorskip(request.param)
    for other in set(READERS) - {request.param}:
        monkeypatch.setitem(sys.modules, other, None)
    return request.param


def test_over_the_thumbnail(features: Path, tmp_path: Path, capsys, reader: str) -> None:
    tifffile = pytest.importorskip("tifffile")
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
    told = capsys.readouterr().err.lower()
    assert "no.tif cannot be read as a slide" in told and f"{reader}: " in told


def test_without_a_library_both_extras_are_named(features, tmp_path, monkeypatch, capsys) -> None:
    for name in READERS:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["attention", "run", str(features), "--slide-file", str(features)]) == 2
    told = capsys.readouterr().err
    assert "slidevlm[slide]" in told and "slidevlm[tiffslide]" in told


def test_one_library_steps_in_for_the_other(tmp_path: Path, monkeypatch) -> None:
    class Broken:
        def __init__(self, path: str) -> None:
            raise ValueError("no format of mine")

    class Seen:
        dimensions, properties = (200, 100), {"tiffslide.mpp-x": "0.25"}

        def __init__(self, path: str) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...
        def get_thumbnail(self, size: tuple[int, int]) -> Image.Image:
            return Image.new("RGBA", (size[0], size[1] // 2), (1, 2, 3, 255))

    monkeypatch.setitem(sys.modules, "openslide", SimpleNamespace(OpenSlide=Broken))
    monkeypatch.setitem(sys.modules, "tiffslide", SimpleNamespace(TiffSlide=Seen))
    found = thumbnail(tmp_path / "a.tif", 50, "--slide-file")
    assert found.pixels.shape == (25, 50, 3) and found.pixels[0, 0].tolist() == [1, 2, 3]
    assert (found.scale, found.mpp, found.width, found.height) == (0.25, 0.25, 200, 100)


def test_a_thumbnail_is_as_small_as_it_must_be() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    large = jpeg(noise, 10**9)
    limit = len(large) // 2
    small = jpeg(noise, limit)
    assert small[:2] == b"\xff\xd8" and len(small) <= limit < len(large)
    assert Image.open(BytesIO(small)).size == (400, 300)


def test_slide_files_belong_to_the_specimens_of_their_names(tmp_path: Path) -> None:
    for name in ("a.svs", "b.tif", "c.svs", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    found = files_of([str(tmp_path)], ["a", "b", "z"], "--slide-files")
    assert found == {"a": tmp_path / "a.svs", "b": tmp_path / "b.tif"}
    assert files_of([str(tmp_path / "c.svs")], ["z"], "--slide-files") == {"z": tmp_path / "c.svs"}
    with pytest.raises(DataError, match="no specimen shown is called 'c'"):
        files_of([str(tmp_path / "c.svs")], ["a", "b"], "--slide-files")
    with pytest.raises(DataError, match="there is no file"):
        files_of([str(tmp_path / "d.svs")], ["a", "b"], "--slide-files")
    (tmp_path / "a.tif").write_bytes(b"")
    with pytest.raises(DataError, match="both of 'a'"):
        files_of([str(tmp_path)], ["a", "b"], "--slide-files")


def test_dropping_what_is_attended(model, features: Path) -> None:
    store, case, place = opened(str(features))
    sample = sample_of(model.trained, store, case, place, 100)
    seen = attend(model.trained, model.precision, sample, sentences=False)
    seen = replace(seen, tiles=np.arange(12.0))
    checked = faithfulness(model.trained, model.precision, sample, seen, range(3))
    found = checked.slide
    assert checked.sentences == []
    whole = model.embed(str(features))
    bag = sample.bag
    for one in found:
        dropped = round(12 * one.share)
        left = slidevlm.Tiles(bag.features[: 12 - dropped], bag.positions[: 12 - dropped], bag.unit)
        # `Tiles` are centred anew; the tiny model's embedding may hardly notice.
        assert one.most_attended == pytest.approx(float(model.embed(left) @ whole), abs=2e-2)
        assert one.random_least <= one.random_mean <= one.random_most
    assert [round(12 * one.share) for one in found] == [1, 1, 3, 6, 9]


def test_dropping_what_a_sentence_attends_to(model, features: Path) -> None:
    """Against one pass for each sentence and choice of tiles, in float64."""
    store, case, place = opened(str(features))
    sample = sample_of(model.trained, store, case, place, 100)
    seen = attend(model.trained, model.precision, sample, sentences=True)
    count = len(seen.sentences)
    assert count and seen.parts.shape == (count, len(seen.tokens) - 1)
    assert seen.parts.sum(1) == pytest.approx(np.ones(count))
    assert seen.tokens[0] == model.trained.tokenizer.bos_id
    random = np.random.default_rng(0)
    seen = replace(seen, by_sentence=random.dirichlet(np.ones(12), count))
    checked = faithfulness(model.trained, model.precision, sample, seen, range(3))
    slow = copy.deepcopy(model.trained.model).double()
    bag, ids = sample.bag, torch.tensor([seen.tokens])

    def mean(sentence: int, kept: np.ndarray) -> float:
        rows = torch.from_numpy(np.sort(kept))
        places = (bag.positions - bag.centres)[rows]
        left = Bags(
            bag.features[rows].double(), (len(rows),), places.double(), bag.slides[rows], "px"
        )
        with torch.no_grad():
            logits = slow(left, ids, torch.ones_like(ids, dtype=torch.bool)).logits[0]
        logs = logits.log_softmax(-1)
        found = [logs[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)]
        return float(np.average(found, weights=seen.parts[sentence]))

    for number, rows in enumerate(checked.sentences):
        order, whole = np.argsort(-seen.by_sentence[number]), mean(number, np.arange(12))
        for row in rows:
            dropped = round(12 * row.share)
            wanted = mean(number, order[dropped:]) - whole
            assert row.most_attended == pytest.approx(wanted, abs=1e-4)
            draws = [np.random.default_rng(seed).permutation(12)[dropped:] for seed in range(3)]
            others = [mean(number, draw) - whole for draw in draws]
            told = (row.random_mean, row.random_least, row.random_most)
            assert told == pytest.approx((np.mean(others), min(others), max(others)), abs=1e-4)


def test_goes_on_where_it_was(features: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder, out = tmp_path / "folder", tmp_path / "seen"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.h5").write_bytes(features.read_bytes())
    words = ["attention", "run", str(folder), "--output", str(out), "--sentence-wise"]
    calls: list[str] = []

    def counted(trained, precision, sample, **more):
        calls.append(sample.case.specimen)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attend(trained, precision, sample, **more)

    monkeypatch.setattr(page_commands, "attend", counted)
    assert main(words) == 130
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    assert "2 of 4 specimens are done already" in told.err
    assert calls == ["a", "b", "c", "c", "d"]
    found = json.loads(told.out)["specimens"]
    assert [one["specimen"] for one in found] == list("abcd")
    assert all(Path(file).is_file() for one in found for file in one["files"])
    first, last = ({k: v for k, v in found[i].items() if k not in ("specimen", "files")}
                   for i in (0, 3))  # fmt: skip
    assert first == last, "the same features, read back and made anew"
    assert first["sentence_faithfulness"] and len(first["faithfulness"]) == 5

    (out / "b_attention.png").unlink()
    assert main(words) == 0 and calls[5:] == ["b"], "a file was lost"
    assert main([*words, "--seed", "1"]) == 2
    assert "a.json was made with another seed; remove it" in capsys.readouterr().err
    (out / "a.json").write_text("{}")
    assert main(words) == 2
    assert "a.json is not of slidevlm attention" in capsys.readouterr().err


def test_a_trained_run_on_its_cohort(tmp_path: Path, capsys) -> None:
    settings = slidevlm.testing.settings(tmp_path)
    run = str(slidevlm.train(settings).folder)
    cohort, split = str(settings["hdf5_filename"]), str(settings["test_split"])
    ids = Path(split).read_text().split()
    words = ["attention", run, cohort, "--sentence-wise", "--image-features-cutoff", "30"]
    capsys.readouterr()
    out = tmp_path / "all"
    assert main([*words, "--split", split, "--output", str(out), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [seen["specimen"] for seen in told["specimens"]] == ids
    for name in ids:
        with (out / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 30
        for column in [c for c in rows[0] if c not in ("tile", "slide", "x", "y")]:
            assert sum(float(row[column]) for row in rows) == pytest.approx(1, abs=1e-3)
    first = (out / f"{ids[0]}.csv").read_text()
    assert first != (out / f"{ids[1]}.csv").read_text()

    alone = tmp_path / "alone"
    assert main([*words, "--specimen", ids[0], "--output", str(alone)]) == 0
    assert "least attended" in capsys.readouterr().out
    assert (alone / f"{ids[0]}.csv").read_text() == first, "the same alone and among others"
    assert {p.name.split(".")[0].split("_")[0] for p in alone.iterdir()} == {ids[0]}

    assert main([*words, "--specimen", "nobody"]) == 2
    assert "no specimen 'nobody' with features\n" in capsys.readouterr().err
    patient = ids[0].rpartition("-")[0]
    assert main([*words, "--specimen", patient]) == 2
    assert f"that is a patient, who has {ids[0]}" in capsys.readouterr().err
    assert main(["attention"]) == 2


def test_a_folder_with_a_bad_file(features: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "a b", "a_b"):
        (folder / f"{name}.h5").write_bytes(features.read_bytes())
    with h5py.File(folder / "z.h5", "w") as file:
        file["features"] = np.full_like(slidevlm.testing.bag(12), np.nan)
        file["coords"] = np.zeros((12, 2), int)
    words = ["attention", "run", str(folder), "--output", str(tmp_path / "seen")]
    assert main(words) == 2
    assert "z" in capsys.readouterr().err
    assert main([*words, "--skip-bad-specimens", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [seen["specimen"] for seen in told["specimens"]] == ["a b", "a", "a_b"]
    assert list(told["bad"]) == ["z"] and "NaN or infinite" in told["bad"]["z"]
    written = [file for seen in told["specimens"] for file in seen["files"]]
    assert len(set(written)) == len(written) == 12, "names do not collide"
    assert main([*words, "--skip-bad-specimens"]) == 0
    assert "mean of 3 specimens" in capsys.readouterr().out


def test_a_slide_file_is_of_one_specimen(tmp_path: Path, features: Path, capsys) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("openslide")
    slide = np.full((512, 512, 3), 200, np.uint8)
    tifffile.imwrite(tmp_path / "slide.tif", slide, tile=(256, 256), photometric="rgb")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.h5").write_bytes(features.read_bytes())
    words = ["attention", "run", str(folder), "--slide-file", str(tmp_path / "slide.tif")]
    assert main(words) == 2
    assert "choose it with --specimen" in capsys.readouterr().err


def test_pictures() -> None:
    assert least_distance(np.array([[0, 0], [224, 0], [448, 0], [0, 672]])) == 224
    assert least_distance(np.array([[5, 5]])) == 1
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    path = __import__("io").BytesIO(png(pixels))
    assert (np.asarray(Image.open(path)) == pixels).all()
    drawn = picture(np.array([[0.0, 0], [1, 0]]), 1.0, np.array([0.0, 1.0]))
    assert drawn.shape == (512, 1024, 3)
    assert (drawn[:, 0] < drawn[:, -1]).all(), "more is lighter"
