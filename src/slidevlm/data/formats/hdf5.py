"""Safe access to HDF5 files: nothing outside the file is opened, no code runs, rows are cheap.

External links, external storage and virtual datasets are refused, because a file must not make
the program read another one; values that are neither numbers nor text are refused as well.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from slidevlm.data.formats.hdf5_chunks import is_chunked_matrix, native_float, read_chunked
from slidevlm.data.formats.hdf5_heaps import check_attribute, check_dataset, check_group
from slidevlm.data.formats.rows import (
    HAS_PREAD,
    as_positions,
    as_tensor,
    damage,
    dtype_name,
    flat_shape,
    for_each_row,
    gather,
    read_plain,
)
from slidevlm.errors import DataError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LINKS_FOLLOWED = 16
_PLAIN_TYPES = (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM)
_METADATA_BYTES = (2**18, 2**19, 2**20)  # smallest, first and largest size of HDF5's cache


def is_hdf5(path: Path, head: bytes) -> bool:
    """Whether a file is HDF5 by its signature, at its beginning or after a user block."""
    if head.startswith(_SIGNATURE):
        return True
    if not path.is_file():
        return False
    size, at = path.stat().st_size, 512
    with open(path, "rb") as file:
        while at < min(size, 2**20):
            file.seek(at)
            if file.read(8) == _SIGNATURE:
                return True
            at *= 2
    return False


@dataclass(frozen=True)
class _Handle:
    """The open file of one process."""

    pid: int
    file: h5py.File
    raw: FileIO
    user_block: int  # bytes before HDF5's own
    # Names that led to the last object from the root, all of hard links.
    trail: list[str] = field(default_factory=list)


class Hdf5File:
    """One HDF5 file, opened when it is used, in the process that uses it. Picklable.

    `advice` is added to the message when the file is not there.
    """

    def __init__(self, path: Path, advice: str = "check the path") -> None:
        self.path = path
        self.advice = advice
        self._handle: _Handle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def open(self) -> h5py.File:
        """The file, opened by this process: a handle inherited by a fork is not shared."""
        if self._handle is not None and self._handle.pid == os.getpid():
            return self._handle.file
        if self._handle is not None:
            # Closes this process's copy. Left open, HDF5 would hand it out again.
            self.close()
        if not self.path.is_file():
            raise DataError(f"no HDF5 file {self.path}; {self.advice} (looked in {Path.cwd()})")
        try:
            file = h5py.File(self.path, "r")
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.path} cannot be opened as HDF5 ({error}); it is damaged, cut short or no "
                "HDF5 file: copy or write it again, and check it with `h5ls`"
            ) from error
        # Tens of thousands of groups are looked at once each; 32 MB of their headers help nobody.
        cache = file.id.get_mdc_config()
        cache.min_size, cache.initial_size, cache.max_size = _METADATA_BYTES
        file.id.set_mdc_config(cache)
        raw = open(self.path, "rb", buffering=0)  # noqa: SIM115
        self._handle = _Handle(os.getpid(), file, raw, file.userblock_size)
        try:
            self._check_names(file, "/")
        except DataError:
            self.close()
            raise
        return file

    def _check_names(self, group: h5py.Group, path: str) -> None:
        """DataError where HDF5 could follow the group's damaged list of names for ever."""
        assert self._handle is not None
        with damage(self.path, f"the names in {path}"):
            check_group(self._handle.raw.fileno(), self._handle.user_block, _header(group))

    def close(self) -> None:
        """Close the file of this process; the next use opens it again."""
        if self._handle is not None:
            self._handle.file.close()
            self._handle.raw.close()
            self._handle = None

    # -- objects ---------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Whether something is at an absolute path. DataError where a link leaves the file."""
        return self._real(path) is not None

    def object(self, path: str) -> h5py.Group | h5py.Dataset | None:
        """The object at an absolute path, or None. DataError where a link leaves the file."""
        found = self._id(path)
        if isinstance(found, h5py.h5g.GroupID):
            return h5py.Group(found)
        return h5py.Dataset(found) if isinstance(found, h5py.h5d.DatasetID) else found

    def dataset(self, path: str) -> h5py.Dataset | None:
        """The dataset at an absolute path, or None where nothing is."""
        found = self._dataset_id(path)
        return None if found is None else h5py.Dataset(found)

    def string(self, path: str) -> str | None:
        """The text of a dataset of one string; None where there is no such dataset."""
        found = self._dataset_id(path)
        if found is None:
            return None
        with damage(self.path, path):
            shape, dtype = found.shape, found.dtype
            if math.prod(shape or ()) != 1 or shape is None:
                raise DataError(
                    f"{self.path}: {path} has shape {shape}; a text attribute is one string"
                )
            if dtype.kind == "O" and h5py.check_string_dtype(dtype) is None:
                raise DataError(f"{self.path}: {path} holds {dtype}, not a string")
            if dtype.kind == "O":
                assert self._handle is not None
                check_dataset(self._handle.raw.fileno(), self._handle.user_block, found)
            value = np.empty(shape, dtype)
            found.read(h5py.h5s.ALL, h5py.h5s.ALL, value)
            return text(value.reshape(-1)[0], self.path, path)

    def _dataset_id(self, path: str) -> h5py.h5d.DatasetID | None:
        found = self._id(path)
        if found is None:
            return None
        if not isinstance(found, h5py.h5d.DatasetID):
            raise DataError(f"{self.path}: {path} is a group where a dataset is expected")
        with damage(self.path, path):
            if found.get_offset() is not None:  # cheap to ask, and only data of the file have one
                return found
            plist = found.get_create_plist()
            if plist.get_external_count() or plist.get_layout() == h5py.h5d.VIRTUAL:
                raise DataError(
                    f"{self.path}: {path} keeps its data in another file; only data of the file "
                    "itself is read: write it again without external or virtual storage"
                )
        return found

    def _id(self, path: str) -> h5py.h5g.GroupID | h5py.h5d.DatasetID | None:
        """The open object at an absolute path, or None."""
        real = self._real(path)
        if real is None:
            return None
        with damage(self.path, path):
            return h5py.h5o.open(self.open().id, _encoded(real))

    def _real(self, path: str) -> str | None:
        """The absolute path by hard links alone, or None where it leads nowhere.

        Each link is looked at before it is followed: DataError where one leaves the file or never
        ends.
        """
        links = self.open().id.links
        assert self._handle is not None
        left = deque(name for name in path.split("/") if name not in ("", "."))
        # Specimens are asked for one after the other; most of the way is that of the last one.
        done: list[str] = []
        for name in self._handle.trail:
            if len(left) < 2 or left[0] != name:
                break
            done.append(left.popleft())
        followed = 0
        while left:
            name = left.popleft()
            here = "/".join(["", *done, name])
            try:
                kind = links.get_info(_encoded(here)).type
            except (KeyError, RuntimeError):
                return None
            if kind == h5py.h5l.TYPE_SOFT and followed < _LINKS_FOLLOWED:
                with damage(self.path, f"link {here}"):
                    target = links.get_val(_encoded(here)).decode("utf-8", "surrogateescape")
                if target.startswith("/"):
                    done.clear()
                left.extendleft(n for n in reversed(target.split("/")) if n not in ("", "."))
                followed += 1
            elif kind == h5py.h5l.TYPE_HARD:
                done.append(name)
            else:
                raise DataError(
                    f"{self.path}: {here} is a link that leaves the file or never ends; only "
                    "data of the file itself is read: copy the linked data into it"
                )
        self._handle.trail[:] = done
        return "/" + "/".join(done)

    def names(self, path: str = "/") -> list[str]:
        """Names in a group; empty where there is no such group."""
        group = self.object(path)
        if not isinstance(group, h5py.Group):
            return []
        self._check_names(group, path)
        with damage(self.path, path):
            return list(group)

    def has_attribute(self, path: str, name: str) -> bool:
        """Whether the object at `path` is there and has the attribute."""
        holder = self.object(path)
        with damage(self.path, path):
            return holder is not None and name in holder.attrs

    def attribute(self, path: str, name: str) -> Any:
        """An attribute as text, number, list or dictionary; None where there is none.

        TRIDENT writes None as "None" and dictionaries as JSON.
        """
        holder = self.object(path)
        if holder is None:
            return None
        with damage(self.path, f"attribute {name} of {path}"):
            if name not in holder.attrs:
                return None
            assert self._handle is not None
            kept = h5py.h5a.open(holder.id, name.encode())
            if kept.get_type().get_class() not in _PLAIN_TYPES:
                raise DataError(
                    f"{self.path}: attribute {name} of {path} is neither number nor text"
                )
            descriptor, base = self._handle.raw.fileno(), self._handle.user_block
            check_attribute(descriptor, base, _header(holder), kept, name)
            value = holder.attrs[name]
            if isinstance(value, np.ndarray) and value.size == 1:
                value = value.reshape(-1)[0]
            return _plain(value, self.path, f"attribute {name} of {path}")

    # -- features --------------------------------------------------------------------------

    def rows(self, dataset: h5py.Dataset, rows: np.ndarray | None) -> Tensor:
        """Rows [K, D] of features [N, D], [1, N, D] or [N, S, D]; only those are read."""
        assert rows is None or (np.all(np.diff(rows) > 0) and len(rows)), "rows strictly increase"
        name = dtype_name(dataset.dtype, self.path, dataset.name)
        total, width = flat_shape(dataset.shape, self.path, dataset.name)
        if total == 0:
            values = np.empty((0, width), dataset.dtype)
        else:
            _check_storage(dataset, self.path)
            if (offset := _plain_offset(dataset)) is not None:
                assert self._handle is not None
                descriptor = self._handle.raw.fileno()
                values = read_plain(descriptor, offset, (total, width), dataset.dtype, rows)
            elif is_chunked_matrix(dataset):
                values = self._chunked(dataset, rows, native_float(dataset.dtype))
            else:
                values = self._slices(dataset, total, rows)
        return as_tensor(values, name)

    def _slices(self, dataset: h5py.Dataset, total: int, rows: np.ndarray | None) -> np.ndarray:
        """What HDF5 must convert or put together: one slice for each chunk that is touched."""
        width = dataset.shape[-1]
        if dataset.ndim == 2:
            axis, per_step = 0, 1
        elif dataset.shape[0] == 1:
            axis, per_step = 1, 1
        else:
            axis, per_step = 0, dataset.shape[1]

        def read(start: int, stop: int) -> np.ndarray:
            first, last = start // per_step, -(-stop // per_step)
            block = self._read_slice(dataset, axis, first, last).reshape(-1, width)
            return block[start - first * per_step : stop - first * per_step]

        if rows is None:
            return read(0, total)
        if dataset.chunks is not None:
            run = dataset.chunks[axis] * per_step
            cuts = np.flatnonzero(np.diff(rows // run)) + 1
        else:
            cuts = np.flatnonzero(np.diff(rows // per_step) > 1) + 1
        return gather(rows, cuts, read, width, dataset.dtype)

    def _read_slice(self, dataset: h5py.Dataset, axis: int, start: int, stop: int) -> np.ndarray:
        values: np.ndarray = dataset[start:stop] if axis == 0 else dataset[:, start:stop]
        return values

    def values(self, dataset: h5py.Dataset) -> np.ndarray:
        """A small dataset as a whole: numbers and text, nothing else."""
        if dataset.dtype.kind == "O" and h5py.check_string_dtype(dataset.dtype) is None:
            raise DataError(
                f"{self.path}: {dataset.name} holds objects ({dataset.dtype}); only numbers and "
                "text are read"
            )
        if dataset.size and dataset.dtype.kind == "O":
            assert self._handle is not None
            check_dataset(self._handle.raw.fileno(), self._handle.user_block, dataset.id)
        elif dataset.size:
            _check_storage(dataset, self.path)
        if dataset.dtype.kind in "fiu" and dataset.size and is_chunked_matrix(dataset):
            # Tools that write tile by tile make a chunk of each coordinate.
            return self._chunked(dataset, None, dataset.dtype).reshape(dataset.shape)
        values: np.ndarray = dataset[()]
        return values

    def _chunked(
        self, dataset: h5py.Dataset, rows: np.ndarray | None, dtype: np.dtype[Any]
    ) -> np.ndarray:
        assert self._handle is not None
        plain = HAS_PREAD and not self._handle.user_block
        return read_chunked(dataset, rows, dtype, self._handle.raw.fileno() if plain else None)


def storage_text(dataset: h5py.Dataset) -> str:
    """Such as "contiguous" or "chunks of 256 rows, gzip 4"."""
    if dataset.chunks is None:
        return "contiguous"
    axis = 1 if dataset.ndim == 3 and dataset.shape[0] == 1 else 0
    parts = [f"chunks of {dataset.chunks[axis]} rows"]
    if dataset.chunks[-1] < dataset.shape[-1]:
        parts[0] += f" and {dataset.chunks[-1]} columns"
    plist = dataset.id.get_create_plist()
    if dataset.compression is not None:
        level = "" if dataset.compression_opts is None else f" {dataset.compression_opts}"
        parts.append(f"{dataset.compression}{level}")
    elif filters := plist.get_nfilters():
        parts += [plist.get_filter(i)[3].decode("utf-8", "replace") for i in range(filters)]
    return ", ".join(parts)


class Hdf5Rows:
    """`Rows` of one dataset of features."""

    def __init__(self, file: Hdf5File, path: str) -> None:
        self._file = file
        self._path = path
        with damage(file.path, path):
            dataset = file.dataset(path)
            if dataset is None:
                raise DataError(f"{file.path}: {path} does not exist")
            self.full_shape: tuple[int, ...] = dataset.shape or (1,)
            self.shape = flat_shape(self.full_shape, file.path, path)
            self.dtype = dtype_name(dataset.dtype, file.path, path)
            self.storage = storage_text(dataset)
            if self.shape[0]:
                _check_storage(dataset, file.path)

    def read(self, rows: np.ndarray | None) -> Tensor:
        """See `Rows.read`."""
        dataset = self._file.dataset(self._path)
        if dataset is None or dataset.shape != self.full_shape:
            raise DataError(f"{self._file.path}: {self._path} changed while it was in use")
        return self._file.rows(dataset, rows)

    def positions(self, path: str) -> np.ndarray | None:
        """[N, 2] float64 for these rows, from a dataset of x and y; None where there is none."""
        return positions_of_rows(self._file, path, self.full_shape)


def positions_of_rows(file: Hdf5File, path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """x and y [N, 2] float64 for the rows of features of `shape`; None where there are none."""
    with damage(file.path, path):
        dataset = file.dataset(path)
        if dataset is None:
            return None
        if dataset.dtype.kind not in "fiu":
            raise DataError(
                f"{file.path}: {path} has type {dataset.dtype}; write [N, 2] numbers, x and y"
            )
        values = as_positions(file.values(dataset), file.path, path)
        return for_each_row(values, shape, file.path, path)


def _header(holder: h5py.Group | h5py.Dataset) -> int:
    """Address of an object's header; unlike `h5o.get_info`, this follows no heap."""
    low, high = h5py.h5g.get_objinfo(holder.id).objno
    return int(low) | int(high) << 32


def _check_storage(dataset: h5py.Dataset, path: Path) -> None:
    """DataError where less is stored than the shape says: HDF5 would fill in zeros silently."""
    chunks = dataset.chunks
    if chunks is None:
        # Shape and size are two places of an unprotected header; a flipped bit sets them apart.
        expected = dataset.size * dataset.id.get_type().get_size()
        stored, unit = dataset.id.get_storage_size(), "bytes"
    else:
        limits = zip(chunks, dataset.maxshape, strict=True)
        if any(limit is not None and chunk > limit for chunk, limit in limits) or (
            dataset.maxshape[-1] not in (None, dataset.shape[-1])  # no width is meant to grow
        ):
            raise DataError(
                f"{path}: {dataset.name} has the shape {dataset.shape}, chunks {chunks} and at "
                f"most {dataset.maxshape}, which do not go together; the file is damaged: copy or "
                "write it again"
            )
        expected = math.prod(-(-n // c) for n, c in zip(dataset.shape, chunks, strict=True))
        stored, unit = dataset.id.get_num_chunks(), "chunks"
    if stored != expected:
        raise DataError(
            f"{path}: {dataset.name} of shape {dataset.shape} has {stored} of {expected} {unit} "
            "stored; it was not written to its end, or is damaged: write it again"
        )


def _plain_offset(dataset: h5py.Dataset) -> int | None:
    """Byte offset of contiguous, unconverted data in the file; None where HDF5 must read it."""
    offset: int | None = dataset.id.get_offset()
    if not HAS_PREAD or offset is None or dataset.file.userblock_size:
        return None
    same_type = dataset.id.get_type() == h5py.h5t.py_create(dataset.dtype)
    return offset if same_type else None


def _encoded(name: str) -> bytes:
    """A name as HDF5 holds it; h5py gives what is not UTF-8 as surrogates."""
    return name.encode("utf-8", "surrogateescape")


def text(value: Any, path: Path, where: str) -> str:
    """A string of the file as str; HDF5 strings are UTF-8 or ASCII bytes."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise DataError(f"{path}: {where} holds {type(value).__name__}, not a string")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: {where} is not UTF-8 ({error.reason} at byte {error.start}); write the "
            "text as UTF-8"
        ) from error


def _plain(value: Any, path: Path, where: str) -> Any:
    """A Python value of an attribute: "None" is None, JSON is what it says."""
    if isinstance(value, bytes | str):
        written = text(bytes(value) if isinstance(value, bytes) else str(value), path, where)
        if written.strip() in ("", "None", "null"):
            return None
        try:
            return json.loads(written) if written.lstrip()[:1] in '{["' else written
        except ValueError:
            return written
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "fiubSU":
        return value.tolist()
    raise DataError(f"{path}: {where} is of type {type(value).__name__}; only numbers and text")
