"""Paths in HDF5 files: links are looked at one by one, and what was known is used again."""

from __future__ import annotations

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest

from slidevlm.data.formats.hdf5 import Hdf5File
from slidevlm.errors import DataError


@pytest.fixture
def file(tmp_path) -> Hdf5File:
    """Groups, links of every kind, texts."""
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = 1
    with h5py.File(tmp_path / "a.h5", "w") as new:
        new["a/b/x"] = np.arange(3)
        new["a/c/x"] = np.arange(4)
        new["a/soft"] = h5py.SoftLink("b/x")  # from its own group
        new["absolute"] = h5py.SoftLink("/a/./c")
        new["a/chain"] = h5py.SoftLink("/absolute/x")
        new["a/nowhere"] = h5py.SoftLink("/a/d/x")
        new["a/loop"] = h5py.SoftLink("/a/loop")
        new["a/out"] = h5py.ExternalLink("other.h5", "/x")
        new["Gr\u00fc\u00dfe/x"] = np.arange(5)
    return Hdf5File(tmp_path / "a.h5")


REAL = {
    "/a/b/x": 3,
    "/a/c/x": 4,
    "//a/./b//x": 3,
    "a/soft": 3,
    "/absolute/x": 4,
    "/a/chain": 4,
    "/Gr\u00fc\u00dfe/x": 5,
    "/a/nowhere": None,
    "/a/b": "group",
    "/": "group",
    "/a/b/x/y": None,
    "/b/x": None,
    "/a/x": None,
}


def test_paths_in_any_order(file):
    """What was followed before changes nothing: every pair of paths, one after the other."""
    for path in itertools.chain.from_iterable(itertools.permutations(REAL, 2)):
        found = file.object(path)
        kind = "group" if isinstance(found, h5py.Group) else found if found is None else len(found)
        assert kind == REAL[path], path
        assert file.exists(path) == (found is not None)
    assert file.object("/a/chain").name == "/a/c/x"


@pytest.mark.parametrize("path", ["/a/loop", "/a/loop/x", "/a/out", "/a/out/y"])
def test_links_that_leave_the_file_or_never_end(file, path):
    for ask in (file.exists, file.object, file.dataset, file.string, file.names):
        with pytest.raises(DataError, match=r"a\.h5: /a/(loop|out) is a link that leaves the file"):
            ask(path)


def test_a_link_is_followed_again_when_the_file_is_another(file, tmp_path):
    assert len(file.object("/a/b/x")) == 3
    file.close()
    with h5py.File(tmp_path / "a.h5", "a") as new:
        del new["a"]
        new["a"] = h5py.ExternalLink("other.h5", "/")
    with pytest.raises(DataError, match=r"/a is a link that leaves"):
        file.object("/a/b/x")


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("Gr\u00fc\u00dfe", {"dtype": h5py.string_dtype()}),
        ("plain", {"dtype": h5py.string_dtype("ascii")}),
        ("Gr\u00fc\u00dfe".encode(), {"dtype": h5py.string_dtype("utf-8", 20)}),
        (["one"], {"dtype": h5py.string_dtype()}),
        ([["one"]], {"dtype": h5py.string_dtype(), "chunks": (1, 1), "compression": 4}),
        ("", {"dtype": h5py.string_dtype()}),
    ],
)
def test_strings(tmp_path, value, options):
    with h5py.File(tmp_path / "a.h5", "w") as new:
        new.create_dataset("text", data=value, **options)
    found = Hdf5File(tmp_path / "a.h5").string("/text")
    assert found == (value.decode() if isinstance(value, bytes) else np.ravel(value)[0])


def test_what_is_no_string(tmp_path):
    path: Path = tmp_path / "a.h5"
    with h5py.File(path, "w") as new:
        new["number"] = 1.5
        new["two"] = ["a", "b"]
        new["nothing"] = h5py.Empty(h5py.string_dtype())
        new["reference"] = new.ref
        new["bytes"] = b"\xff"
        new.create_group("group")
    file = Hdf5File(path)
    for name in ("number", "two", "nothing", "reference", "bytes", "group"):
        with pytest.raises(DataError, match=rf"a\.h5: /{name} "):
            file.string(f"/{name}")
    assert file.string("/missing") is None


def test_datasets_that_are_neither_number_nor_text(tmp_path):
    """Lists lie in heaps that nobody has walked, references lead anywhere in the file."""
    with h5py.File(tmp_path / "a.h5", "w") as new:
        new["list"] = np.array([np.arange(3), np.arange(2)], h5py.vlen_dtype("i4"))
        new.create_dataset("one list", (1,), h5py.vlen_dtype("i4"))
        new.create_dataset("place", (1,), h5py.ref_dtype)
    file = Hdf5File(tmp_path / "a.h5")
    for name in ("list", "place"):
        with pytest.raises(DataError, match=rf"a\.h5: /{name} holds objects .* only numbers and"):
            file.values(file.dataset(f"/{name}"))
    for name in ("one list", "place"):
        with pytest.raises(DataError, match=rf"a\.h5: /{name} holds object, not a string"):
            file.string(f"/{name}")
