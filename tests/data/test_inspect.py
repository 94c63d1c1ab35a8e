"""What a file or folder is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from slidevlm.data import inspect as inspecting
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.formats.slide_folder import SlideFolder
from slidevlm.data.inspect import inspect_file, inspect_store
from slidevlm.errors import DataError
from slidevlm.report.inspection import terminal


def trident(path: Path, rows: int, encoder: str = "conch_v15", width: int = 8) -> Path:
    """As TRIDENT writes a slide: chunks of one row, float32."""
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=np.ones((rows, width), "f4"), chunks=(1, width))
        file.create_dataset("coords", data=np.ones((rows, 2), "i8"))
        file["features"].attrs["encoder"] = encoder
        file["coords"].attrs["patch_size_level0"] = 512
    return path


def test_a_slide_file(tmp_path):
    found = inspect_file(trident(tmp_path / "a.h5", 7))
    assert (found.kind, found.formats, found.bags) == ("file", {"TRIDENT": 1}, 1)
    (row,) = found.rows
    assert (row.name, row.length, row.width) == ("a", 7, 8)
    facts = row.facts
    assert (facts.dtype, facts.unit, facts.encoder) == ("float32", "px", "conch_v15")
    assert facts.tile_size == "512 px at level 0" and facts.storage == "chunks of 1 rows"
    assert found.hints == [
        "float32 takes twice the space and time of float16, which `slidevlm data convert` writes"
    ]


@pytest.mark.parametrize(
    ("options", "storage", "slow"),
    [
        ({}, "contiguous", False),
        ({"chunks": (16, 8)}, "chunks of 16 rows", False),
        ({"chunks": (256, 8)}, "chunks of 256 rows", True),
        ({"chunks": (16, 4)}, "chunks of 16 rows and 4 columns", False),
        ({"chunks": (16, 8), "compression": 4}, "chunks of 16 rows, gzip 4", True),
        ({"chunks": (16, 8), "compression": "lzf"}, "chunks of 16 rows, lzf", True),
        ({"chunks": (16, 8), "shuffle": True}, "chunks of 16 rows, shuffle", True),
    ],
)
def test_storage_and_the_hint_to_convert(tmp_path, options, storage, slow):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=np.ones((300, 8), "f2"), **options)
        file["coords"] = np.ones((300, 2))
    found = inspect_file(tmp_path / "a.h5")
    assert list(found.values("storage")) == [storage]
    assert any("slow to read" in hint and storage in hint for hint in found.hints) == slow


def test_the_case_layout(write):
    path = write([5, 30, 0])
    with h5py.File(path, "a") as file:
        file["patients/p0/s0/hipt/features"] = np.ones((2, 3), "f4")
    found = inspect_file(path)
    assert (found.specimens, found.patients, found.bags) == (3, 3, 4)
    assert found.attributes == {"features": ("hipt", "uni"), "texts": ("report",)}
    assert sorted(found.lengths) == [0, 2, 5, 30]
    assert found.warnings["no tile"] == ["p2/s2/uni"]
    # Two encoders side by side in one file are no mixture.
    assert not any("differ" in warning for warning in found.warnings)


def test_a_folder_with_mixtures_and_damage(tmp_path):
    trident(tmp_path / "a.h5", 7)
    trident(tmp_path / "b.h5", 9, "uni", 4)
    trident(tmp_path / "c.h5", 20)
    with open(tmp_path / "c.h5", "r+b") as file:
        file.truncate(900)
    found = inspect_store(SlideFolder(tmp_path), tmp_path)
    assert (found.kind, found.specimens, found.lengths) == ("folder", 3, [7, 9])
    warnings = list(found.warnings)
    assert "the bags differ in feature width: 8: 1; 4: 1" in warnings
    assert "the bags differ in tile encoder: conch_v15: 1; uni: 1" in warnings
    assert any("c.h5" in text and found.warnings[text] == ["c"] for text in warnings)
    text = terminal(found)
    assert "3 of 3 patients" in text and "conch_v15 (1), uni (1)" in text


def test_large_folders_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(inspecting, "LOOKED_AT", 3)
    for number in range(9):
        torch.save(torch.ones(number + 1, 4), tmp_path / f"{number}.pt")
    found = inspect_store(SlideFolder(tmp_path), tmp_path)
    assert found.bags == 9 and found.lengths == [1, 5, 9]
    assert "of 9 bags were looked at" in terminal(found)


def test_json(write):
    content = json.loads(json.dumps(inspect_file(write([5])).to_dict()))
    assert content["tiles"] == 5 and content["rows"][0]["facts"]["unit"] == "um"


def test_what_is_nothing_known(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.txt is of no known format"):
        inspect_file(tmp_path / "a.txt")


def test_real_data(shared):
    found = inspect_file(shared / "data/tcga/tcga.h5")
    assert (found.specimens, found.bags, sum(found.lengths)) == (846, 846, 38447)
    assert found.widths == {"192": 846} and found.values("dtype") == {"float16": 846}
    assert found.attributes == {"features": ("hipt_4096",), "texts": ("diagnosis", "report")}
    assert found.warnings == {} and found.hints == []
    store = Hdf5Cases(shared / "data/tcga/tcga.h5", "hipt_4096")
    assert found.lengths[::200] == [store.length(case) for case in store.cases[::200]]
