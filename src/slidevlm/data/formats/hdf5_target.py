"""A case file that is laid out first and filled afterwards, so that a kill loses nothing done.

HDF5 cannot be trusted after a kill while it was being written. So all groups, reports and empty
datasets are written and the file is closed before the first feature; then any number of processes
write values to their places, past HDF5, and no structure changes any more.

Beside `hdf5_cases` describes, such a file has

    /case-index/checksums   [cases, 2] strings of 32: of the tiles, and of the texts

and the attributes `unit`, `encoder`, `tile_size`, `source` and `format` of each feature group.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from slidevlm.errors import DataError

_CHECKSUM = 32  # characters
_KEY_COLUMNS = 4  # of integer keys: (specimen, slide, section, tile)


class TargetError(DataError):
    """The file cannot be written; no specimen is to blame."""


@dataclass(frozen=True)
class PlannedCase:
    """What the layout must know of a specimen before its features are read."""

    patient: str
    specimen: str  # without the patient's name before it
    rows: int  # N
    width: int  # D
    unit: str | None  # of the positions; None where there are none
    keys: np.dtype[Any] | None  # type of the tile keys: strings, or whole numbers [N, 4]
    texts: Mapping[str, str]  # text attribute -> text
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def location(self) -> str:
        """Path of the group."""
        return f"/patients/{self.patient}/{self.specimen}"


@dataclass(frozen=True)
class Layout:
    """How all specimens are kept."""

    feature_attribute: str
    dtype: str  # float16, float32 or bfloat16 (as 2-byte unsigned integers)
    chunk_rows: int | None  # None: contiguous

    @property
    def stored(self) -> np.dtype[Any]:
        """Type of the features in the file."""
        return np.dtype({"bfloat16": "u2", "float16": "f2", "float32": "f4"}[self.dtype])

    def size(self, case: PlannedCase) -> int:
        """Bytes of the features of a specimen."""
        rows = case.rows
        if self.chunk_rows is not None and rows:
            chunk = min(self.chunk_rows, rows)
            rows = -(-rows // chunk) * chunk
        return rows * case.width * self.stored.itemsize


def texts_checksum(texts: Mapping[str, str]) -> str:
    """32 hexadecimal digits of a specimen's texts by name."""
    whole = hashlib.blake2b(repr(sorted(texts.items())).encode(), digest_size=_CHECKSUM // 2)
    return whole.hexdigest()


def tiles_checksum(
    features: str, positions: np.ndarray | None, unit: str | None, keys: np.ndarray | None
) -> str:
    """32 hexadecimal digits of what a specimen has beside the report.

    `features`: their `Digest`; `positions` [N, 2] float32, `keys` [N] bytes or [N, 4]
    whole numbers.
    """
    whole = hashlib.blake2b(features.encode(), digest_size=_CHECKSUM // 2)
    for name, values in (("positions", positions), ("keys", keys)):
        if values is not None and values.size:
            whole.update(f"{name}{values.shape}{values.dtype.str}".encode())
            whole.update(np.ascontiguousarray(values).view(np.uint8).data)
    whole.update(str(unit).encode())
    return whole.hexdigest()


def lay_out(
    path: Path, cases: Sequence[PlannedCase], layout: Layout, attributes: Mapping[str, str]
) -> None:
    """Write the file with everything but features, positions, keys and their checksums.

    `attributes` are those of the root. DataError where it cannot be written.
    """
    try:
        with h5py.File(path, "w", libver=("v110", "latest")) as file:
            file.attrs.update(attributes)
            for case in cases:
                _lay_out_case(file, case, layout)
            strings = h5py.string_dtype()
            index = file.create_group("case-index")
            for name, values in (
                ("case_ids", [case.specimen for case in cases]),
                ("case_paths", [case.location for case in cases]),
            ):
                index.create_dataset(name, data=np.array(values, object), dtype=strings)
            sums = np.zeros((len(cases), 2), f"S{_CHECKSUM}")
            sums[:, 1] = [texts_checksum(case.texts).encode() for case in cases]
            index.create_dataset("checksums", data=sums)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error}; choose a folder that exists, is writable and has room"
        ) from error


def _lay_out_case(file: h5py.File, case: PlannedCase, layout: Layout) -> None:
    for name in (case.patient, case.specimen, layout.feature_attribute, *case.texts):
        _check_name(name, case)
    if layout.feature_attribute in case.texts:
        raise DataError(
            f"{case.location}: {layout.feature_attribute!r} names both its features and a text; "
            "give another --feature-attribute, or another --text-attribute"
        )
    if case.location in file:
        raise DataError(f"{case.location} is there twice; specimens must be unique")
    group = file.create_group(f"{case.location}/{layout.feature_attribute}")
    group.attrs.update(case.attributes)
    chunks = None
    if layout.chunk_rows is not None and case.rows and case.width:
        chunks = (min(layout.chunk_rows, case.rows), case.width)
    _reserve(group, "features", (case.rows, case.width), layout.stored, chunks)
    if case.unit is not None:
        _reserve(group, "positions", (case.rows, 2), np.dtype("f4"))
        group["positions"].attrs["unit"] = case.unit
    if case.keys is not None:
        shape = (case.rows,) if case.keys.kind == "S" else (case.rows, _KEY_COLUMNS)
        _reserve(group, "tile_keys", shape, case.keys)
    for name, text in case.texts.items():
        file[case.location].create_dataset(name, data=text, dtype=h5py.string_dtype())


def _check_name(name: str, case: PlannedCase) -> None:
    if not name or "/" in name or name in (".", "..") or "\0" in name:
        raise DataError(
            f"specimen {case.specimen!r} of patient {case.patient!r}: {name!r} cannot name an HDF5 "
            "group; rename it in the source"
        )


def _reserve(
    group: h5py.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...] | None = None,
) -> None:
    """A dataset that has its place in the file but no values."""
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if chunks is not None:
        how.set_chunk(chunks)
    kind = h5py.h5t.py_create(dtype, logical=True)
    h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple(shape), how)


@dataclass(frozen=True)
class _Open:
    """The file of one process: HDF5 tells the places, the other writes."""

    pid: int
    file: h5py.File
    raw: FileIO


class CaseTarget:
    """A laid-out file that is being filled; picklable, opened in the process that uses it."""

    def __init__(self, path: Path, feature_attribute: str) -> None:
        self.path = path
        self.feature_attribute = feature_attribute
        self._handle: _Open | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _open(self) -> _Open:
        if self._handle is None or self._handle.pid != os.getpid():
            # Without HDF5's lock: only values change, at places that no one else writes to.
            file = h5py.File(self.path, "r", locking=False)
            self._handle = _Open(os.getpid(), file, open(self.path, "r+b", buffering=0))  # noqa: SIM115
        return self._handle

    def close(self) -> None:
        """Close the files of this process."""
        if self._handle is not None:
            self._handle.file.close()
            self._handle.raw.close()
            self._handle = None

    def sync(self) -> None:
        """Wait until everything written, by any process, is on the disk."""
        try:
            os.fsync(self._open().raw.fileno())
        except OSError as error:
            raise self._full(error) from error

    def write(self, location: str, name: str, first: int, values: np.ndarray) -> None:
        """Rows from `first` on of a dataset of the specimen at `location`, in the file's type."""
        dataset = self._open().file[f"{location}/{self.feature_attribute}/{name}"]
        assert dataset.dtype == values.dtype and dataset.shape[1:] == values.shape[1:], (
            dataset.dtype, values.dtype, dataset.shape, values.shape,
        )  # fmt: skip
        assert first + len(values) <= len(dataset), (first, len(values), len(dataset))
        for start, offset, rows in _places(dataset, first, len(values)):
            self._put(offset, values[start - first : start - first + rows])

    def write_checksum(self, number: int, checksum: str) -> None:
        """The checksum of the tiles of the specimen of that number in the index."""
        dataset = self._open().file["case-index/checksums"]
        place = dataset.id.get_offset() + number * 2 * _CHECKSUM
        self._put(place, np.frombuffer(checksum.encode(), np.uint8))

    def _put(self, offset: int, values: np.ndarray) -> None:
        raw = self._open().raw
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        try:
            raw.seek(offset)
            while len(data):
                data = data[raw.write(data) or 0 :]
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> TargetError:
        return TargetError(
            f"{self.path} cannot be written: {error.strerror}; make room or mend the disk, then "
            "the same command goes on"
        )


def _places(dataset: h5py.Dataset, first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(row, byte offset in the file, rows) of the pieces that rows `first`... consist of."""
    row_bytes = int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize
    if not row_bytes or not count:
        return
    if dataset.chunks is None:
        yield first, dataset.id.get_offset() + first * row_bytes, count
        return
    row, rows = first, dataset.chunks[0]
    while row < first + count:
        start = row // rows * rows
        chunk = dataset.id.get_chunk_info_by_coord((start, *(0 for _ in dataset.shape[1:])))
        stop = min(start + rows, first + count)
        yield row, chunk.byte_offset + (row - start) * row_bytes, stop - row
        row = stop
