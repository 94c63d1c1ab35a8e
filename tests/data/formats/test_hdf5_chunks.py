"""Chunked data is what HDF5 itself reads, in every layout; only touched chunks are decoded."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from slidevlm.data.formats import hdf5_chunks
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.formats.hdf5_chunks import is_chunked_matrix, native_float
from slidevlm.errors import DataError

FILTERS = {
    "stored": {},
    "gzip": {"compression": 4},
    "shuffle": {"shuffle": True},
    "gzip and shuffle": {"compression": 4, "shuffle": True},
    "lzf": {"compression": "lzf"},
    "checksum": {"compression": 4, "fletcher32": True},
}
CHUNKS = ((1, 6), (7, 6), (7, 4), (40, 1), (11, 5), (40, 6))
PATTERNS = (
    None,
    np.arange(40),
    np.array([39]),
    np.array([0, 1, 2, 9, 21, 22, 39]),
    np.arange(3, 40, 2),
    np.arange(8, 13),
)


def stored(path: Path, values: np.ndarray, **options: object) -> h5py.Dataset:
    """A dataset `x` in a file that was closed and opened again."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, **options)
    return h5py.File(path, "r")["x"]


def plain(dataset: h5py.Dataset, rows: np.ndarray | None) -> np.ndarray:
    """Read all, convert, choose rows."""
    values = dataset[()].reshape(-1, dataset.shape[-1])
    if values.dtype.kind == "f":
        values = values.astype(f"=f{min(values.dtype.itemsize, 4)}")
    return values if rows is None else values[rows]


def read_chunked(
    dataset: h5py.Dataset, rows: np.ndarray | None, directly: bool = True
) -> np.ndarray:
    """As it is called for features; with or without the file's own bytes."""
    dtype = native_float(dataset.dtype)
    with open(dataset.file.filename, "rb") as raw:
        return hdf5_chunks.read_chunked(dataset, rows, dtype, raw.fileno() if directly else None)


@pytest.fixture(params=["chunk by chunk", "slabs of small chunks"])
def way(request, monkeypatch) -> str:
    """Either way of reading, which the size of the chunks would choose."""
    monkeypatch.setattr(hdf5_chunks, "_SMALL_BYTES", 0 if "by" in request.param else 2**16)
    monkeypatch.setattr(hdf5_chunks, "_SLAB_BYTES", 300)  # so that there are several
    return str(request.param)


@pytest.mark.parametrize("shape", [(40, 6), (1, 40, 6)])
@pytest.mark.parametrize("name", FILTERS)
def test_equal_to_the_plain_way(tmp_path, way, name, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype("f4")
    for chunks in CHUNKS:
        dataset = stored(
            tmp_path / "a.h5",
            values,
            chunks=(*shape[:-2], *chunks),
            maxshape=(*shape[:-2], None, 6),
            **FILTERS[name],
        )
        assert is_chunked_matrix(dataset)
        for rows in PATTERNS:
            for directly in (True, False):
                found = read_chunked(dataset, rows, directly)
                assert found.dtype == np.float32 and np.array_equal(found, plain(dataset, rows))
        dataset.file.close()


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "<u2", ">u2", "V2"])
def test_types(tmp_path, way, dtype):
    values = np.random.default_rng(0).standard_normal((40, 6))
    values = values.astype("f2").view(dtype) if dtype in ("V2", "<u2") else values.astype(dtype)
    for options in FILTERS.values():
        dataset = stored(tmp_path / "a.h5", values, chunks=(7, 4), **options)
        for rows in PATTERNS:
            found, expected = read_chunked(dataset, rows), plain(dataset, rows)
            assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
        dataset.file.close()


@pytest.mark.parametrize("name", ["gzip", "gzip and shuffle"])
def test_without_the_faster_inflate(tmp_path, monkeypatch, name):
    monkeypatch.setattr(hdf5_chunks, "_inflater", zlib)
    monkeypatch.setattr(hdf5_chunks, "_INFLATE_ERRORS", (zlib.error,))
    values = np.random.default_rng(0).standard_normal((40, 6)).astype("f4")
    dataset = stored(tmp_path / "a.h5", values, chunks=(7, 4), **FILTERS[name])
    assert np.array_equal(read_chunked(dataset, PATTERNS[3]), values[PATTERNS[3]])


def test_narrow_blocks_of_a_bag_too_large_to_put_aside(tmp_path, monkeypatch):
    values = np.random.default_rng(0).standard_normal((40, 7)).astype("f4")
    dataset = stored(tmp_path / "a.h5", values, chunks=(9, 2), compression=4)
    for size in (0, 2**25):
        monkeypatch.setattr(hdf5_chunks, "_ASIDE_BYTES", size)
        monkeypatch.setattr(hdf5_chunks, "_CACHED_BYTES", 60)  # two rows at a time
        for rows in PATTERNS:
            assert np.array_equal(read_chunked(dataset, rows), plain(dataset, rows))


def test_few_of_many_single_rows_do_not_search_the_index_for_each(tmp_path, monkeypatch):
    values = np.random.default_rng(0).standard_normal((400, 3)).astype("f4")
    dataset = stored(tmp_path / "a.h5", values, chunks=(1, 3))
    monkeypatch.setattr(hdf5_chunks, "_decoder", None)  # HDF5 walks through all chunks for one
    rows = np.array([3, 5, 399])
    assert np.array_equal(read_chunked(dataset, rows), values[rows])


def test_other_forms_are_left_to_hdf5(tmp_path):
    for values, options in (
        (np.ones((4, 3)), {}),
        (np.ones((4, 2, 3)), {"chunks": (2, 2, 3)}),
        (np.ones(4), {"chunks": (2,)}),
    ):
        dataset = stored(tmp_path / "a.h5", values, **options)
        assert not is_chunked_matrix(dataset)
        dataset.file.close()


@pytest.mark.parametrize("dtype", ["<i8", "<i4", "<f8", ">f8"])
def test_rows_written_one_by_one_as_some_tools_do(tmp_path, dtype):
    """Features and coordinates grow in turns, so that neither lies in one piece."""
    truth = np.random.default_rng(0).integers(0, 2**31 - 1, (50, 2)).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        coords = file.create_dataset("x", (0, 2), dtype, maxshape=(None, 2), chunks=(1, 2))
        other = file.create_dataset("y", (0, 3), "f4", maxshape=(None, 3), chunks=(1, 3))
        for start in range(0, 50, 7):
            for dataset in (coords, other):
                dataset.resize(min(50, start + 7), axis=0)
            coords[start:] = truth[start : start + 7]
            other[start:] = start
    with h5py.File(tmp_path / "a.h5", "r") as file, open(tmp_path / "a.h5", "rb") as raw:
        for rows in (None, np.arange(1, 50, 2)):
            found = hdf5_chunks.read_chunked(file["x"], rows, truth.dtype, raw.fileno())
            assert found.dtype == truth.dtype
            assert np.array_equal(found, truth if rows is None else truth[rows])


def test_a_file_with_a_user_block(tmp_path):
    values = np.random.default_rng(0).standard_normal((20, 3)).astype("f4")
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file.create_dataset("patients/p/s/uni/features", data=values, chunks=(1, 3))
        places = file.create_dataset("patients/p/s/uni/positions", data=values, chunks=(1, 3))
        places.attrs["unit"] = "um"
    store = Hdf5Cases(tmp_path / "a.h5", "uni")
    bag = store.read(store.cases[0], None)
    assert np.array_equal(bag.features, values) and np.array_equal(bag.positions, values[:, :2])


def test_a_missing_chunk_is_an_error(tmp_path):
    with h5py.File(tmp_path / "b.h5", "w") as file:
        hole = file.create_dataset("x", (4, 2), "f4", chunks=(1, 2))
        hole[0] = hole[3] = 1
    with (
        h5py.File(tmp_path / "b.h5", "r") as file,
        pytest.raises(OSError, match="2 of 4 chunks are not stored"),
    ):
        read_chunked(file["x"], None)


def test_a_chunk_of_another_size_is_an_error(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", (4, 2), "f4", chunks=(1, 2))
        for row, content in enumerate([b"8 bytes."] * 2 + [b"four"] + [b"8 bytes."]):
            dataset.id.write_direct_chunk((row, 0), content)
    with (
        h5py.File(tmp_path / "a.h5", "r") as file,
        pytest.raises(OSError, match="a chunk of 8 bytes has 4 stored"),
    ):
        read_chunked(file["x"], None)


def test_chunks_at_the_same_place_are_an_error(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.arange(8, dtype="f4").reshape(4, 2), chunks=(1, 2))
        first, second = (file["x"].id.get_chunk_info(i).byte_offset for i in (0, 1))
    content = path.read_bytes()
    pointer = second.to_bytes(8, "little")
    assert content.count(pointer) == 1, "the index names each chunk once"
    path.write_bytes(content.replace(pointer, first.to_bytes(8, "little")))
    with h5py.File(path, "r") as file, pytest.raises(OSError, match="two chunks lie at the same"):
        read_chunked(file["x"], None)


def test_chunks_whose_filter_was_left_out(tmp_path):
    values = np.random.default_rng(0).standard_normal((10, 4)).astype("f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset(
            "x", (10, 4), "f4", chunks=(5, 4), shuffle=True, compression=4
        )
        shuffled = values[:5].view(np.uint8).reshape(-1, 4).T.tobytes()
        dataset.id.write_direct_chunk((0, 0), shuffled, filter_mask=0b10)  # no deflate
        dataset.id.write_direct_chunk((5, 0), zlib.compress(values[5:].tobytes()), filter_mask=1)
    with h5py.File(tmp_path / "a.h5", "r") as file:
        assert np.array_equal(file["x"][()], values), "HDF5 understands the same"
        assert np.array_equal(read_chunked(file["x"], np.array([1, 4, 5, 9])), values[[1, 4, 5, 9]])


def test_only_the_chunks_with_chosen_rows_are_decoded(tmp_path, monkeypatch):
    decoded: list[tuple[int, int]] = []

    def spy(original: Callable[..., hdf5_chunks.Decode]) -> Callable[..., hdf5_chunks.Decode]:
        def prepared(*arguments: object) -> hdf5_chunks.Decode:
            decode = original(*arguments)

            def noted(top: int, left: int) -> np.ndarray:
                decoded.append((top, left))
                return decode(top, left)

            return noted

        return prepared

    for name in ("_decoder", "_by_hdf5"):
        monkeypatch.setattr(hdf5_chunks, name, spy(getattr(hdf5_chunks, name)))
    for compression in (None, "lzf", "gzip"):
        options = {"compression": compression, "chunks": (10, 3)}
        dataset = stored(tmp_path / "a.h5", np.ones((1000, 4), "f2"), **options)
        decoded.clear()
        read_chunked(dataset, np.array([3, 5, 505, 999]))
        assert decoded == [(0, 0), (0, 3), (500, 0), (500, 3), (990, 0), (990, 3)]
        dataset.file.close()


@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
def test_memory_is_the_chosen_rows_and_a_chunk(tmp_path, compression):
    values = np.random.default_rng(0).standard_normal((4000, 256)).astype("f4")  # 4 MB
    # Chunks of all rows: a slab of them would be the whole bag.
    dataset = stored(tmp_path / "a.h5", values, chunks=(4000, 8), compression=compression)
    rows = np.arange(0, 4000, 100)
    read_chunked(dataset, rows)  # what is made once is not counted
    tracemalloc.start()
    try:
        found = read_chunked(dataset, rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    chunk = 4000 * 8 * 4
    assert np.array_equal(found, values[rows])
    assert peak < found.nbytes + 4 * chunk < values.nbytes / 7


@pytest.mark.parametrize("damage", ["flipped", "short", "too little", "too much"])
def test_damaged_chunks_name_file_and_specimen(tmp_path, damage):
    values = np.random.default_rng(0).standard_normal((10, 4)).astype("f4")
    good = zlib.compress(values.tobytes())
    bad = {
        "flipped": good[:60] + bytes([good[60] ^ 255]) + good[61:],
        "short": good[:-20],
        "too little": zlib.compress(values[:9].tobytes()),
        "too much": zlib.compress(bytes(2**22)),
    }[damage]
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "patients/p/s/uni/features", (10, 4), "f4", chunks=(10, 4), compression=4
        )
        dataset.id.write_direct_chunk((0, 0), bad)
    store = Hdf5Cases(path, "uni")
    with pytest.raises(DataError, match=r"a\.h5.*specimen 's'"):
        store.read(store.cases[0], np.array([3]))
