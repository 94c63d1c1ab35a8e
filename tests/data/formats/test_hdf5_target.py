"""Every format as its tool writes it, converted: the same tiles, positions and slides."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from slidevlm.data.convert import convert
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.formats.hdf5_target import Layout, PlannedCase, lay_out
from slidevlm.data.formats.slide_folder import SlideFolder
from slidevlm.data.slide_table import SlideRow
from slidevlm.errors import DataError

LAYOUT = Layout("tiles", "float16", None)
WITH_POSITIONS = {"stamp": "um", "trident": "px", "clam": "px", "gzipped": "px", "plain": "px"}


def bags(count: int, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """[count, width] float32 that float16 holds exactly, and [count, 2] int64."""
    numbers = np.random.default_rng(count).integers(-999, 999, (count, width))
    places = np.stack([np.arange(count) * 224, np.arange(count) % 7 * 224], axis=1)
    return (numbers / 64).astype(np.float32), places


def test_round_trip_of_every_format(makers, tmp_path: Path) -> None:
    converted = []
    for name, make in makers.items():
        folder = tmp_path / name
        folder.mkdir()
        truth = {slide: bags(count) for slide, count in (("a", 40), ("b", 300))}
        try:
            for slide, (features, places) in truth.items():
                make(folder / slide, features, places)
        except ModuleNotFoundError:
            continue  # of an extra that is not installed
        source = SlideFolder(folder)
        target = tmp_path / f"{name}.h5"
        convert(source, target, LAYOUT, lambda case: {}, workers=0)
        store = Hdf5Cases(target, "tiles")
        assert [case.specimen for case in store.cases] == ["a", "b"], name
        for before, after in zip(source.cases, store.cases, strict=True):
            features, places = truth[after.specimen]
            old, new = source.read(before, None), store.read(after, None)
            assert np.array_equal(new.features.float().numpy(), features), name
            assert new.features.dtype == torch.float16
            assert (new.unit, store.facts(after).tile_size) == (
                old.unit, source.facts(before).tile_size,
            )  # fmt: skip
            if name in WITH_POSITIONS:
                assert new.unit == WITH_POSITIONS[name]
                assert np.array_equal(new.positions.numpy(), places), name
            assert (old.positions is None) == (new.positions is None)
        if (encoder := source.facts(source.cases[0]).encoder) is not None:
            assert store.facts(store.cases[0]).encoder == encoder
        converted.append(name)
    assert len(converted) >= 13, converted


def test_slides_of_a_specimen_stay_apart(makers, tmp_path: Path) -> None:
    folder = tmp_path / "clam"
    folder.mkdir()
    for slide, count in (("a", 40), ("b", 300), ("c", 7)):
        makers["clam"](folder / slide, *bags(count))
    table = [
        SlideRow(slide=slide, specimen=specimen, patient=patient)
        for slide, specimen, patient in (("b", "s", "p"), ("a", "s", "p"), ("c", "t", "q"))
    ]
    source = SlideFolder(folder, table)
    convert(source, tmp_path / "out.h5", LAYOUT, lambda case: {"report": "x"}, workers=0)
    store = Hdf5Cases(tmp_path / "out.h5", "tiles", "report")
    first, second = store.cases
    bag = store.read(first, None)
    assert bag.slides.tolist() == [0] * 300 + [1] * 40
    expected = np.concatenate([bags(300)[0], bags(40)[0]])
    assert np.array_equal(bag.features.float().numpy(), expected)
    assert torch.equal(bag.centres, source.read(source.cases[0], None).centres)
    assert store.facts(first).source == "b.h5, a.h5"
    with h5py.File(store.path) as file:
        assert "tile_keys" not in file["patients/q/t/tiles"]  # a single slide needs none
    assert store.read(second, None).slides.tolist() == [0] * 7


@pytest.mark.parametrize("name", ["", "a/b", ".", ".."])
def test_names_that_hdf5_cannot_have(tmp_path: Path, name: str) -> None:
    case = PlannedCase("p", name, 1, 1, None, None, {})
    with pytest.raises(DataError, match="cannot name an HDF5 group"):
        lay_out(tmp_path / "a.h5", [case], LAYOUT, {})


def test_going_on_in_the_folder_itself(makers, tmp_path: Path, monkeypatch) -> None:
    """The files made meanwhile change the folder, but not what is converted from it."""
    for slide, count in (("a", 4), ("b", 5)):
        makers["npy"](tmp_path / slide, *bags(count))
    monkeypatch.chdir(tmp_path)
    source, target = SlideFolder(Path(".")), Path("out.h5")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("slidevlm.data.convert._cast", _interrupt)
        convert(source, target, LAYOUT, lambda case: {}, workers=0)
    (tmp_path / "note.txt").write_text("another file")
    again = SlideFolder(Path("."))
    assert convert(again, target, LAYOUT, lambda case: {}, workers=0).specimens == 2


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt
