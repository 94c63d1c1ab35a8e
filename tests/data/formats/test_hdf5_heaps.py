"""Damage that HDF5 itself would follow for ever."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest

from slidevlm.data.formats.hdf5 import Hdf5File
from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.data.formats.rows import damage
from slidevlm.errors import DataError

pytestmark = pytest.mark.timeout(60)  # HDF5 would not come back


@pytest.fixture(params=["earliest", "latest"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(path: Path, version: str, user_block: int = 0) -> bytearray:
    """A file with text in an attribute of a dataset, of the root, and in a dataset."""
    with h5py.File(path, "w", libver=version, userblock_size=user_block) as file:
        file["features"] = np.ones((2, 3), "f4")
        file["features"].attrs["encoder"] = "uni"
        file.attrs["unit"] = "um"
        names = np.array(["one", "two", "three"], object)
        file.create_dataset("names", data=names, dtype=h5py.string_dtype())
    return bytearray(path.read_bytes())


@pytest.mark.parametrize("user_block", [0, 1024])
def test_sound_files_pass(tmp_path, version, user_block):
    written(tmp_path / "a.h5", version, user_block)
    file = Hdf5File(tmp_path / "a.h5")
    assert sorted(file.names()) == ["features", "names"]
    assert file.attribute("/features", "encoder") == "uni"
    assert file.attribute("/", "unit") == "um"
    assert file.values(file.dataset("/names")).tolist() == [b"one", b"two", b"three"]
    file.close()


@pytest.mark.parametrize("where", ["attribute", "root", "dataset"])
def test_free_space_of_no_size(tmp_path, version, where):
    content = written(tmp_path / "a.h5", version)
    begin = content.index(b"GCOL")
    at, texts = begin + 16, []
    while (index := struct.unpack_from("<H", content, at)[0]) != 0:
        (size,) = struct.unpack_from("<Q", content, at + 8)
        texts.append(index)
        at += 16 + (size + 7) // 8 * 8
    assert len(texts) == 5
    struct.pack_into("<Q", content, at + 8, 0)
    (tmp_path / "a.h5").write_bytes(content)
    file = Hdf5File(tmp_path / "a.h5")
    with pytest.raises(DataError, match=r"a\.h5: .*free space of the heap"):
        if where == "dataset":
            with damage(file.path, "/names"):
                file.values(file.dataset("/names"))
        else:
            file.attribute("/" if where == "root" else "/features",
                           "unit" if where == "root" else "encoder")  # fmt: skip
    file.close()


@pytest.mark.parametrize("way", ["open", "read", "facts", "texts"])
def test_a_cohort_whose_heaps_have_free_space_of_no_size(tmp_path, way):
    """The units of positions and the reports lie in heaps that the index does not tell of."""
    path = tmp_path / "a.h5"
    with CaseWriter(path, "uni", attributes={"unit": "um"}) as writer:
        for i in range(8):  # each collection of 4 KB has reports and units
            writer.add("p", f"s{i}", np.zeros((2, 3), "f2"), "word " * 300, np.zeros((2, 2)))
    content = bytearray(path.read_bytes())
    starts = [i for i in range(len(content)) if content.startswith(b"GCOL", i)]
    assert len(starts) > 2
    begin = starts[0 if way == "open" else 1]  # the first has the root's unit
    at = begin + 16
    while struct.unpack_from("<H", content, at)[0] != 0:
        at += 16 + (struct.unpack_from("<Q", content, at + 8)[0] + 7) // 8 * 8
    struct.pack_into("<Q", content, at + 8, 0)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.h5: .*free space of the heap"):
        store = Hdf5Cases(path, "uni", "report")
        assert way != "open"
        for case in store.cases:
            {"read": lambda c: store.read(c, None), "facts": store.facts, "texts": store.texts}[
                way
            ](case)


def test_free_space_of_names_that_follows_itself(tmp_path):
    content = written(tmp_path / "a.h5", "earliest")
    begin = content.index(b"HEAP")
    free, data = struct.unpack_from("<QQ", content, begin + 16)
    struct.pack_into("<Q", content, data + free, free)
    (tmp_path / "a.h5").write_bytes(content)
    file = Hdf5File(tmp_path / "a.h5")
    with pytest.raises(DataError, match=r"a\.h5: the names in / .*free space of the heap of names"):
        file.names()
    with pytest.raises(DataError):
        file.dataset("/features")


def test_attributes_that_are_neither_number_nor_text(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["list"] = np.array([np.arange(3), np.arange(2)], h5py.vlen_dtype("i4"))
        file.attrs["place"] = file.ref
        file.attrs["yes"] = True
        file.attrs["both"] = [1.5, 2.5]
    file = Hdf5File(tmp_path / "a.h5")
    assert file.attribute("/", "yes") is True and file.attribute("/", "both") == [1.5, 2.5]
    for name in ("list", "place"):
        with pytest.raises(DataError, match=rf"a\.h5: attribute {name} of / is neither number"):
            file.attribute("/", name)
