"""Reading chosen rows of a matrix that lies plainly in a file, and turning them into tensors."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slidevlm.errors import DataError, SlideVLMError

# A gap between two wanted rows smaller than this is read along: the disk reads whole pages.
_PAGE_BYTES = 4096
_RUN_BYTES = 2**22
_SHARED_BYTES = 2**20  # below, a copy costs less than a shared piece of memory of its own
HAS_PREAD = hasattr(os, "preadv")
FLOATS = {2: "float16", 4: "float32", 8: "float64"}  # bytes -> name


class Rows(Protocol):
    """A matrix of features on disk: N rows of D numbers."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""
        ...

    @property
    def dtype(self) -> str:
        """Type on disk: "float16", "bfloat16", "float32" or "float64"."""
        ...

    def read(self, rows: np.ndarray | None) -> Tensor:
        """[K, D] of the rows asked for ([K] int64, strictly increasing), or of all."""
        ...


@contextmanager
def damage(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes a library raise into a DataError that names the file."""
    try:
        yield
    except SlideVLMError:
        raise
    # zipfile, zlib, json, tokenize, zarr and HDF5 each have errors of their own.
    except Exception as error:
        raise DataError(
            f"{path}: {what} cannot be read ({type(error).__name__}: {error}); the file is "
            "damaged, cut short or not readable: copy or write it again"
        ) from error


class _Sharing(threading.local):
    on = False


_sharing = _Sharing()


@contextmanager
def shared_rows(*, enabled: bool) -> Iterator[None]:
    """Within, features read by this thread lie in memory that another process can map.

    A loader's worker sends them on as they are; otherwise the whole bag, 400 MB perhaps, is
    copied into such memory on its way out.
    """
    before, _sharing.on = _sharing.on, enabled
    try:
        yield
    finally:
        _sharing.on = before


def new_rows(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Room for features, not filled; shared where `shared_rows` says so."""
    size = int(np.prod(shape)) * dtype.itemsize
    if not _sharing.on or size < _SHARED_BYTES:
        return np.empty(shape, dtype)
    return new_shared(size).numpy().view(dtype).reshape(shape)


def new_shared(size: int) -> Tensor:
    """[size] bytes that another process can map, not filled."""
    # As torch's own collation does; share_memory_() would copy.
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _wrap(values: np.ndarray) -> Tensor:
    """The tensor on the memory of an array; the one of `new_rows` stays shared."""
    owner: Any = values
    while isinstance(owner, np.ndarray):
        owner = owner.base
    wrapped = torch.from_numpy(values)
    if not isinstance(owner, Tensor) or owner.data_ptr() != wrapped.data_ptr():
        return wrapped
    return owner[: values.nbytes].view(wrapped.dtype).reshape(values.shape)


def dtype_name(dtype: np.dtype[Any], path: Path, what: str) -> str:
    """Name of a type of features; 2-byte integers and opaque values are bfloat16 bits.

    DataError for any other type: features are never integers, text or objects.
    """
    if dtype.kind == "f" and dtype.itemsize in FLOATS:
        return FLOATS[dtype.itemsize]
    if (dtype.kind, dtype.itemsize) in (("u", 2), ("V", 2)) and dtype.names is None:
        return "bfloat16"
    raise DataError(
        f"{path}: {what} has type {dtype}; write float16, float32, float64, or bfloat16 bits as "
        "uint16"
    )


def as_tensor(values: np.ndarray, dtype: str) -> Tensor:
    """Features as a tensor of the machine's byte order; float64 becomes float32."""
    if dtype == "bfloat16":
        native = values.view(np.uint16) if values.dtype.kind == "V" else values
        native = np.require(native, np.uint16, ["C", "W"])
        return _wrap(native.view(np.int16)).view(torch.bfloat16)
    kind = {"float16": np.float16, "float32": np.float32, "float64": np.float32}[dtype]
    return _wrap(np.require(values, kind, ["C", "W"]))


def flat_shape(shape: tuple[int, ...], path: Path, what: str) -> tuple[int, int]:
    """[N, D], [1, N, D] or [N, S, D] -> (rows, D). (0,) is an empty slide of unknown width.

    DataError for any other form; one vector is a slide embedding, not a bag.
    """
    if shape == (0,):
        return 0, 0
    if len(shape) == 1:
        raise DataError(
            f"{path}: {what} is one vector of {shape[0]} numbers, a slide embedding; give the "
            "features of the tiles, [N, D]"
        )
    if len(shape) not in (2, 3):
        raise DataError(f"{path}: {what} has shape {shape}; write [N, D], [1, N, D] or [N, S, D]")
    count = int(np.prod(shape[:-1], dtype=object))
    if count and not shape[-1]:
        raise DataError(f"{path}: {what} has shape {shape}: {count} tiles without features")
    return count, int(shape[-1])


def for_each_row(values: np.ndarray, shape: tuple[int, ...], path: Path, what: str) -> np.ndarray:
    """Values for each row of features of `shape`: repeated where they are for each tile of S rows.

    DataError when their number fits neither the rows nor the tiles.
    """
    total = int(np.prod(shape[:-1])) if len(shape) > 1 else 0
    if len(values) == total:
        return values
    if len(shape) == 3 and len(values) == shape[0]:
        return np.repeat(values, shape[1], axis=0)
    raise DataError(
        f"{path}: {what} has {len(values)} rows, the features {total} (shape {shape}); they must "
        "agree: write both again"
    )


def as_positions(values: np.ndarray, path: Path, what: str) -> np.ndarray:
    """x and y of [N, 2 or more] or [1, N, 2 or more] numbers: [N, 2] float64, all finite."""
    if values.size == 0:
        return np.zeros((0, 2))
    if values.ndim not in (2, 3) or values.shape[-1] < 2 or values.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: {what} has shape {values.shape} and type {values.dtype}; write [N, 2] "
            "numbers, x and y"
        )
    positions = values.reshape(-1, values.shape[-1])[:, :2].astype(np.float64)
    if not np.isfinite(positions).all():
        bad = int((~np.isfinite(positions)).any(axis=1).sum())
        raise DataError(
            f"{path}: {bad} of {len(positions)} rows of {what} are not finite; write them again"
        )
    return positions


def read_plain(
    descriptor: int,
    offset: int,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    rows: np.ndarray | None,
) -> np.ndarray:
    """Rows [K, D] of a matrix that begins at byte `offset`; runs of rows are read at once.

    OSError where the file ends too early.
    """
    total, width = shape
    values = new_rows((total if rows is None else len(rows), width), dtype)
    row_bytes = width * dtype.itemsize
    if not values.size:
        return values
    # V2 has no buffer format, bytes have.
    out = values.reshape(-1).view(np.uint8).data  # its slices cost a third of an array's
    if rows is None:
        read_bytes(descriptor, out, offset)
        return values
    cuts = np.flatnonzero(np.diff(rows) > max(1, _PAGE_BYTES // row_bytes)) + 1
    # Most rows of a bag make one run, with gaps; a piece of it at a time is in memory twice.
    pieces = np.arange(0, len(rows), max(1, _RUN_BYTES // row_bytes))
    edges = np.unique(np.concatenate([pieces, cuts, [len(rows)]]))
    starts, stops = rows[edges[:-1]], rows[edges[1:] - 1] + 1
    gapless = (stops - starts == np.diff(edges)).tolist()
    places = (offset + starts * row_bytes).tolist()
    targets = (edges * row_bytes).tolist()
    for run, whole in enumerate(gapless):
        target = out[targets[run] : targets[run + 1]]
        if whole:
            read_bytes(descriptor, target, places[run])
        else:
            block = np.empty((int(stops[run] - starts[run]), row_bytes), np.uint8)
            read_bytes(descriptor, block.reshape(-1).data, places[run])
            chosen = block[rows[edges[run] : edges[run + 1]] - starts[run]]
            target[:] = chosen.reshape(-1).data
    return values


def read_scattered(descriptor: int, addresses: np.ndarray, values: np.ndarray) -> None:
    """Fill `values` [K, D] with rows that begin at bytes `addresses` [K] int64 of the file.

    Rows that follow each other in the file are read at once. OSError where it ends too early.
    """
    if not values.size:
        return
    row_bytes = values.shape[1] * values.itemsize
    out = values.reshape(-1).view(np.uint8).data
    cuts = np.flatnonzero(np.diff(addresses) != row_bytes) + 1
    edges = np.concatenate([[0], cuts, [len(addresses)]])
    starts = addresses[edges[:-1]].tolist()
    for (first, last), start in zip(
        itertools.pairwise((edges * row_bytes).tolist()), starts, strict=True
    ):
        read_bytes(descriptor, out[first:last], start)


def read_bytes(descriptor: int, target: memoryview, offset: int) -> None:
    """Fill `target` from the file at `offset`; one read may return less than asked."""
    size = len(target)
    done = _read_at(descriptor, target, offset)
    while done < size:
        count = _read_at(descriptor, target[done:], offset + done)
        if count == 0:
            raise OSError(f"file ends at byte {offset + done}")
        done += count


if HAS_PREAD:

    def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
        return os.preadv(descriptor, (target,), offset)

else:

    def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
        os.lseek(descriptor, offset, os.SEEK_SET)
        piece = os.read(descriptor, len(target))
        target[: len(piece)] = piece
        return len(piece)


def gather(
    rows: np.ndarray,
    cuts: np.ndarray,
    read: Callable[[int, int], np.ndarray],
    width: int,
    dtype: np.dtype[Any],
) -> np.ndarray:
    """Rows [K, width] by one `read(start, stop)` for each run of rows between `cuts`."""
    values = new_rows((len(rows), width), dtype)
    edges = [0, *cuts.tolist(), len(rows)]
    for first, last in itertools.pairwise(edges):
        start, stop = int(rows[first]), int(rows[last - 1]) + 1
        block = read(start, stop)
        values[first:last] = (
            block if len(block) == last - first else block[rows[first:last] - start]
        )
    return values


class PlainRows:
    """`Rows` of a matrix that lies plainly in a file from byte `offset` on."""

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], what: str
    ) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype_name(dtype, path, what)
        self._offset = offset
        self._stored = dtype
        self._file: OpenFile | None = None
        size = path.stat().st_size
        if offset + shape[0] * shape[1] * dtype.itemsize > size:
            raise DataError(
                f"{path}: {what} of shape {shape} and type {self.dtype} does not fit into the "
                f"file's {size} bytes; it is cut short or damaged: copy or write it again"
            )

    def read(self, rows: np.ndarray | None) -> Tensor:
        """See `Rows.read`."""
        if self._file is None:
            self._file = OpenFile(self.path)
        return as_tensor(
            read_plain(self._file.descriptor, self._offset, self.shape, self._stored, rows),
            self.dtype,
        )


class OpenFile:
    """A file descriptor that closes itself."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def close(self) -> None:
        """Close it, once."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class MemoryRows:
    """`Rows` of parts that are in memory or mapped: P tensors of [n, D] end to end."""

    parts: tuple[Tensor, ...]
    shape: tuple[int, int]
    dtype: str

    def read(self, rows: np.ndarray | None) -> Tensor:
        """See `Rows.read`."""
        found = _of_parts(self.parts, self.shape[1], rows)
        return found.float() if found.dtype == torch.float64 else found


def _of_parts(parts: tuple[Tensor, ...], width: int, rows: np.ndarray | None) -> Tensor:
    if not parts:
        return torch.empty(0, width)
    if rows is None:
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)
    if len(parts) == 1:
        return parts[0][torch.from_numpy(rows)]
    ends = np.cumsum([len(part) for part in parts])
    owner = np.searchsorted(ends, rows, side="right")
    within = torch.from_numpy(rows - np.concatenate([[0], ends])[owner])
    chosen, starts = np.unique(owner, return_index=True)
    pieces = torch.tensor_split(within, torch.from_numpy(starts[1:]))
    return torch.cat([parts[p][piece] for p, piece in zip(chosen, pieces, strict=True)])
