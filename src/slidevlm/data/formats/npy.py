"""NumPy files: `.npy` with one matrix, `.npz` with features and perhaps coordinates.

In a `.npz`, features are the array of a name in `FEATURE_NAMES`, else the only array that is not
coordinates; coordinates are the array of a name in `POSITION_NAMES`, in level-0 pixels. Nothing
is unpickled: arrays of objects are refused. Rows are read one by one where the array lies
plainly in the file (every `.npy` in C order, every `.npz` of `numpy.savez`).
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy

from slidevlm.data.formats.rows import (
    MemoryRows,
    PlainRows,
    Rows,
    as_positions,
    as_tensor,
    damage,
    dtype_name,
    flat_shape,
    for_each_row,
    new_rows,
)
from slidevlm.data.formats.slides import (
    FEATURE_NAMES,
    FORMATS,
    POSITION_NAMES,
    OpenBags,
    Slide,
    SlideFormat,
    Source,
    find_arrays,
)
from slidevlm.errors import DataError

_HEADER_LIMIT = 10_000  # bytes; what numpy itself takes
_PIECE_BYTES = 2**22
_LOCAL_HEADER = struct.Struct("<4s22xHH")


Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether in Fortran order, type


def _header(file: IO[bytes]) -> Header:
    """Shape, whether in Fortran order, and type; the file is then at the data."""
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file, max_header_size=_HEADER_LIMIT)
    if version == (2, 0):
        return npy.read_array_header_2_0(file, max_header_size=_HEADER_LIMIT)
    raise ValueError(f"version {version} of the format")


def _checked(shape: tuple[int, ...], dtype: np.dtype[Any], path: Path, what: str) -> str:
    if dtype.hasobject:
        raise DataError(
            f"{path}: {what} holds Python objects, which are never unpickled; save numbers"
        )
    if any(n < 0 for n in shape):
        raise DataError(f"{path}: {what} has shape {shape}; the file is damaged: write it again")
    return dtype_name(dtype, path, what)


def _plain_rows(path: Path, offset: int, stored: int, header: Header) -> Rows:
    """Rows of an array whose data, `stored` bytes, begin at `offset`."""
    shape, fortran, dtype = header
    name = _checked(shape, dtype, path, "the array")
    flat = flat_shape(shape, path, "the array")
    if math.prod(shape) * dtype.itemsize != stored:
        raise DataError(
            f"{path}: the array of shape {shape} and type {dtype} needs "
            f"{math.prod(shape) * dtype.itemsize} bytes, but {stored} are there; the file is cut "
            "short or damaged: copy or write it again"
        )
    if not fortran or 1 in shape[:1] or not math.prod(shape):
        return PlainRows(path, offset, flat, dtype, "the array")
    with open(path, "rb") as file:
        file.seek(offset)
        values = np.frombuffer(file.read(stored), dtype).reshape(shape, order="F")
    tensor = as_tensor(np.ascontiguousarray(values).reshape(flat), name)
    return MemoryRows((tensor,), flat, name)


def _open_npy(source: Source) -> OpenBags:
    path = source.path

    def open_bag(name: str) -> Slide:
        with damage(path, "the array"), open(path, "rb") as file:
            header = _header(file)
            offset = file.tell()
            rows = _plain_rows(path, offset, path.stat().st_size - offset, header)
        return Slide(
            "NumPy .npy",
            path,
            rows,
            warnings=("no coordinates; positions are missing",),
        )

    return OpenBags([source.name], open_bag, lambda: None)


def _recognises_npz(source: Source) -> bool:
    names = source.zip_names
    return names is not None and bool(names) and all(name.endswith(".npy") for name in names)


def _open_npz(source: Source) -> OpenBags:
    path = source.path

    def open_bag(name: str) -> Slide:
        with damage(path, "the archive"), zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            shapes = {}
            for key, info in members.items():
                with archive.open(info) as file:
                    shapes[key] = _header(file)
            features, coordinates = find_arrays(list(shapes), path)
            rows = _member_rows(archive, members[features], shapes[features], path)

        def positions() -> np.ndarray | None:
            if coordinates is None:
                return None
            with zipfile.ZipFile(path) as archive:
                values = _whole(archive, members[coordinates], path)
            found = as_positions(values, path, coordinates)
            return for_each_row(found, shapes[features][0], path, coordinates)

        return Slide(
            "NumPy .npz",
            path,
            rows,
            unit=None if coordinates is None else "px",
            warnings=("no coordinates; positions are missing",)
            if coordinates is None
            else ("coordinates name no unit; level-0 pixels are assumed",),
            positions=positions,
        )

    return OpenBags([source.name], open_bag, lambda: None)


def _member_rows(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    header: Header,
    path: Path,
) -> Rows:
    if info.compress_type == zipfile.ZIP_STORED:
        # Two lengths in the local header say where the member's bytes begin.
        with open(path, "rb") as file:
            file.seek(info.header_offset)
            magic, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            begin = info.header_offset + _LOCAL_HEADER.size + name + extra
            if magic != b"PK\x03\x04":
                raise ValueError("no member where the archive says")
            file.seek(begin)
            if _header(file) != header:
                raise ValueError("two different headers of one member")
            offset = file.tell()
        return _plain_rows(path, offset, info.file_size - (offset - begin), header)
    return _Compressed(path, info, header)


class _Compressed:
    """`Rows` of a compressed member, decompressed anew for each reading, a piece at a time."""

    def __init__(self, path: Path, info: zipfile.ZipInfo, header: Header) -> None:
        shape, _, stored = header
        self.dtype = _checked(shape, stored, path, info.filename)
        self.shape = flat_shape(shape, path, info.filename)
        self._path = path
        self._info = info
        self._header = header

    def read(self, rows: np.ndarray | None) -> torch.Tensor:
        """See `Rows.read`. Holds the rows asked for and a piece of the others."""
        with damage(self._path, self._info.filename), zipfile.ZipFile(self._path) as archive:
            with archive.open(self._info) as file:
                if _header(file) != self._header:
                    raise ValueError("it is another array than when it was opened")
                _, fortran, stored = self._header
                if not fortran:
                    return as_tensor(_stream(file, self.shape, stored, rows), self.dtype)
            # Columns lie one after the other, so that every row is spread over the whole.
            values = _whole(archive, self._info, self._path).reshape(self.shape)
        return as_tensor(values if rows is None else values[rows], self.dtype)


def _stream(
    file: IO[bytes], shape: tuple[int, int], dtype: np.dtype[Any], rows: np.ndarray | None
) -> np.ndarray:
    """Rows [K, D] of a matrix whose bytes come in their order; read to the end for the checksum."""
    total, width = shape
    chosen = np.arange(total) if rows is None else rows
    values = new_rows((len(chosen), width), dtype)
    row_bytes = width * dtype.itemsize
    step = max(1, _PIECE_BYTES // max(1, row_bytes))
    for start in range(0, total if row_bytes else 0, step):
        count = min(step, total - start)
        data = file.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise ValueError(f"it ends within row {start + len(data) // row_bytes} of {total}")
        first, last = np.searchsorted(chosen, (start, start + count))
        piece = np.frombuffer(data, dtype).reshape(count, width)
        values[first:last] = piece[chosen[first:last] - start]
    if file.read(1):
        raise ValueError(f"it has more than its {total} rows")
    return values


def read_npz(path: Path, name: str) -> np.ndarray:
    """One array of a `.npz` file; DataError where it is not there or damaged."""
    with damage(path, name), zipfile.ZipFile(path) as archive:
        return _whole(archive, archive.getinfo(f"{name}.npy"), path)


def _whole(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    """An array of an archive; its checksum is verified by reading it to its end."""
    with archive.open(info) as file:
        shape, fortran, dtype = _header(file)
        if dtype.hasobject:
            _checked(shape, dtype, path, info.filename)
        expected = math.prod(shape) * dtype.itemsize
        data = file.read(expected + 1)
    if len(data) != expected:
        raise ValueError(f"{info.filename} of shape {shape} does not fit its {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


FORMATS.register("NumPy .npy")(
    SlideFormat(
        70,
        "a file of numpy.save",
        (".npy",),
        lambda source: source.head.startswith(b"\x93NUMPY"),
        _open_npy,
    )
)
FORMATS.register("NumPy .npz")(
    SlideFormat(
        71,
        f"a file of numpy.savez: features ({', '.join(FEATURE_NAMES)}) and perhaps coordinates "
        f"({', '.join(POSITION_NAMES)})",
        (".npz",),
        _recognises_npz,
        _open_npz,
    )
)
