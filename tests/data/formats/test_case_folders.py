from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from slidevlm.data.cases import open_store
from slidevlm.data.formats.case_folders import CaseFolders
from slidevlm.errors import DataError


def put(folder: Path, patient: str, specimen: str, file: str, content: object, **how: bool) -> None:
    (folder / "extracted_features").mkdir(parents=True, exist_ok=True)
    info = {"specimen_index": 1, "patient": patient, "specimen": specimen, "size": 1.5}
    with open(folder / "feature_information.txt", "a") as index:
        index.write(f"[\"a b.ndpi\"]\n{json.dumps(info)}\n'{file}'\n")
    if content is not None:
        torch.save(content, folder / "extracted_features" / file, **how)


def tiles(count: int, sub_tiles: int, width: int = 4) -> dict:
    generator = torch.Generator().manual_seed(count)
    return {
        0: {
            (7, i % 2, 0, i): {
                "feature": torch.randn(sub_tiles, width, generator=generator),
                "position": torch.tensor([10.0 * i, 1.0, 0.0]),
            }
            for i in range(count)
        },
        1: {},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path / "cohort/data_0", "p1", "s 1", "1.pth", tiles(5, 3))
    put(tmp_path / "cohort/data_0", "p1", "s2", "2.pth", tiles(1, 1))
    old = {"_use_new_zipfile_serialization": False}
    put(tmp_path / "cohort_remainder/data_9", "p2", "s3", "3.pth", tiles(4, 1), **old)
    return tmp_path / "cohort"


def test_reading(root):
    store = open_store(
        hdf5_filename=None, hdf5_feature_attribute=None, hdf5_text_attribute=None, root_dir=root
    )
    assert [(c.patient, c.specimen) for c in store.cases] == [
        ("p1", "s 1"), ("p1", "s2"), ("p2", "s3"),
    ]  # fmt: skip
    assert [store.length(c) for c in store.cases] == [15, 1, 4]
    assert store.text(store.cases[0]) is None
    truth = torch.cat([tile["feature"] for tile in tiles(5, 3)[0].values()])
    whole = store.read(store.cases[0], None)
    assert torch.equal(whole.features, truth) and whole.unit == "px"
    assert whole.positions[:, 0].tolist() == np.repeat([0, 10, 20, 30, 40], 3).tolist()
    assert whole.slides.tolist() == np.repeat([0, 1, 0, 1, 0], 3).tolist()
    rows = np.array([0, 2, 3, 13, 14])
    part = store.read(store.cases[0], rows)
    for field in ("features", "positions", "slides", "centres"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[rows])
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.read(again.cases[0], rows).features, truth[rows])


def test_relative_root(root, monkeypatch):
    monkeypatch.chdir(root)
    assert len(CaseFolders(Path(".")).cases) == 3


def test_errors(root, tmp_path):
    def store_of(name: str, content: object) -> CaseFolders:
        put(tmp_path / name / "data_0", "p", "s", "f.pth", content)
        return CaseFolders(tmp_path / name)

    store = store_of("gone", None)
    assert not store.has_features(store.cases[0])
    with pytest.raises(DataError, match=r"no feature file .*f\.pth of specimen 's'"):
        store.read(store.cases[0], None)
    for name, content, message in (
        ("component", {1: {}}, r"no component 0 .*it holds \['1'\]"),
        ("form", {0: {(1, 2): 3}}, r"tile \(1, 2\): not of the form"),
        ("code", {0: Path("x")}, "must hold plain tensors"),
        ("width", {0: {(0, 0, 0, i): {"feature": torch.ones(i)} for i in (1, 2)}}, "widths"),
    ):
        store = store_of(name, content)
        with pytest.raises(DataError, match=message):
            store.read(store.cases[0], None)
    (tmp_path / "gone/data_0/extracted_features/f.pth").write_bytes(b"junk")
    gone = CaseFolders(tmp_path / "gone")
    with pytest.raises(DataError, match=r"f\.pth of specimen 's' cannot be read"):
        gone.length(gone.cases[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]\n{}\n", "has 2 lines, not three a specimen"),
        ("[]\nnot json\n'a.pth'\n", "line 2: 'not json' is not a JSON object"),
        ("[]\n{}\n'a.pth'\n", "with 'patient' and 'specimen'"),
        ('[]\n{"patient": 1, "specimen": 2}\n\'../a.pth\'\n', "line 3: .* is not the name"),
        ("", "holds no specimens"),
    ],
)
def test_bad_index(tmp_path, text, message):
    (tmp_path / "data_0").mkdir()
    (tmp_path / "data_0/feature_information.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        CaseFolders(tmp_path)


def test_a_specimen_listed_twice(root):
    put(root / "data_1", "p1", "s2", "2.pth", tiles(1, 1))
    with pytest.raises(DataError, match="'s2' of patient 'p1' is listed twice"):
        CaseFolders(root)


def test_unknown_folders(tmp_path):
    nothing = {"hdf5_filename": None, "hdf5_feature_attribute": None, "hdf5_text_attribute": None}
    with pytest.raises(DataError, match="none of the known forms.*case_folders: data_"):
        open_store(**nothing, root_dir=tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_store(**nothing, root_dir=tmp_path / "no")
