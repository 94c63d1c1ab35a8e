"""Rows of chunked HDF5 data: only the chunks that hold them, and one chunk in memory at a time.

Libraries like to cut [N, 1024] into chunks of a few columns (h5py's own choice for 100,000 rows
is 1,563 x 16). HDF5 then copies 64 bytes at a time, to places that lie 4 KB apart, for all rows of
the bag. Here a chunk is decoded by itself, and of it only the rows asked for are copied. What is
stored as it is, or by deflate with or without shuffle, is decoded here; all else, and whatever
does not decode, by HDF5.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np

from slidevlm.data.formats.rows import new_rows, read_scattered

_inflater: Any = zlib
_INFLATE_ERRORS: Any = (zlib.error,)
try:  # the same bytes in half the time
    from isal import isal_zlib
except ImportError:  # no build for this platform, or run from the source without installing
    pass
else:
    _inflater = isal_zlib
    _INFLATE_ERRORS = (zlib.error, isal_zlib.error)

# Of smaller chunks, HDF5 reads many in one call for less than the calls would cost.
_SMALL_BYTES = 2**16
_SLAB_BYTES = 2**22
_ASIDE_BYTES = 2**25
_CACHED_BYTES = 2**18

Decode = Callable[[int, int], np.ndarray]  # first row and column of a chunk -> its values
Steps = list[tuple[int, Callable[[bytes, int], bytes]]]


def is_chunked_matrix(dataset: h5py.Dataset) -> bool:
    """Whether `read_chunked` takes it: chunks of [N, D] or [1, N, D]."""
    return dataset.chunks is not None and (
        dataset.ndim == 2 or (dataset.ndim == 3 and dataset.shape[0] == 1)
    )


def native_float(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Floats in the machine's byte order, float64 as float32; other types as they are."""
    return np.dtype(f"=f{min(dtype.itemsize, 4)}") if dtype.kind == "f" else dtype


def read_chunked(
    dataset: h5py.Dataset, rows: np.ndarray | None, dtype: np.dtype[Any], descriptor: int | None
) -> np.ndarray:
    """Rows ([K] int64, strictly increasing; None: all) of [N, D] or [1, N, D]: [K, D] of `dtype`.

    `descriptor` is of the same file, None where its bytes are not to be read directly. OSError:
    the data cannot be decoded.
    """
    total, width = dataset.shape[-2:]
    height, chunk_width = dataset.chunks[-2:]
    chosen = np.arange(total) if rows is None else rows
    values = new_rows((len(chosen), width), dtype)
    itemsize = dataset.dtype.itemsize
    steps = _steps(dataset)
    touched = len(np.unique(chosen // height)) * height
    if steps == [] and descriptor is not None and (places := _places(dataset)) is not None:
        addresses = places[chosen // height] + chosen % height * (width * itemsize)
        stored = values if dtype == dataset.dtype else np.empty(values.shape, dataset.dtype)
        read_scattered(descriptor, addresses, stored)
        if stored is not values:
            values[:] = stored
        return values
    if steps is None and rows is None and dtype == dataset.dtype and total:
        # Nothing to choose and nothing to decode here: HDF5 alone passes over the data once.
        kind = h5py.h5t.py_create(dtype)
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values.reshape(dataset.shape), kind)
        return values
    # HDF5 takes what deflate gives for a whole chunk even where it is not.
    if not steps and height * chunk_width * itemsize < _SMALL_BYTES and touched > total / 4:
        height *= max(1, _SLAB_BYTES // (height * width * itemsize))
        chunk_width = width
        decode = _by_hdf5(dataset, height, width)
    elif steps is None:
        decode = _by_hdf5(dataset, height, chunk_width)
    else:
        decode = _decoder(dataset, steps)
    _fill(values, chosen, height, chunk_width, decode)
    return values


def _places(dataset: h5py.Dataset) -> np.ndarray | None:
    """Byte of the file at which each chunk of whole rows begins, in their order: [chunks] int64.

    None where chunks are not of whole rows, or HDF5 is too old to tell. OSError where one is
    missing, has another size or lies where another does.
    """
    total, width = dataset.shape[-2:]
    height, chunk_width = dataset.chunks[-2:]
    whole_rows = chunk_width == width and (dataset.ndim == 2 or dataset.chunks[0] == 1)
    if not whole_rows or not hasattr(dataset.id, "chunk_iter"):
        return None
    size = height * width * dataset.dtype.itemsize
    places = np.full(-(-total // height), -1, np.int64)

    def note(chunk: Any) -> None:
        if chunk.size != size:
            raise OSError(f"a chunk of {size} bytes has {chunk.size} stored")
        places[chunk.chunk_offset[-2] // height] = chunk.byte_offset

    # One walk through the index of all chunks; asking for each takes five times as long.
    dataset.id.chunk_iter(note)
    if (places < 0).any():
        raise OSError(f"{int((places < 0).sum())} of {len(places)} chunks are not stored")
    if (np.diff(np.sort(places)) < size).any():
        raise OSError("two chunks lie at the same place")
    return places


def _fill(values: np.ndarray, rows: np.ndarray, height: int, width: int, decode: Decode) -> None:
    """Fill `values` [K, D] block by block; a block is `height` rows of `width` columns."""
    columns = values.shape[1]
    most = min(height, len(rows))
    # Narrow blocks are put aside one by one and copied in place together, a few rows at a time:
    # four times as fast as 64 bytes here and there, in other pages of memory for each row.
    beside = columns // width
    if beside == 1 or most * columns * values.itemsize > _ASIDE_BYTES:
        beside = 0
    room = np.empty(beside * most * width, values.dtype)
    for first, last, start in _row_blocks(rows, height):
        inside: np.ndarray | slice = rows[first:last] - start
        if last - first == rows[last - 1] + 1 - rows[first]:
            inside = slice(int(rows[first]) - start, int(rows[last - 1]) + 1 - start)
        count = last - first
        aside = room[: beside * count * width].reshape(beside, count, width)
        for number, left in enumerate(range(0, columns, width)):
            block = decode(start, left)
            target = aside[number] if number < beside else values[first:last, left : left + width]
            target[:] = block[inside, : columns - left]
            del block  # before the next one is made
        if beside:
            _put_side_by_side(values[first:last], aside)


def _put_side_by_side(values: np.ndarray, blocks: np.ndarray) -> None:
    """Copy C `blocks` [C, k, w] into the first C * w columns of `values` [k, D]."""
    beside, count, width = blocks.shape
    step = max(1, _CACHED_BYTES // values[:1].nbytes)
    for top in range(0, count, step):
        rows = values[top : top + step]
        apart = np.lib.stride_tricks.as_strided(
            rows,
            (len(rows), beside, width),
            (rows.strides[0], width * rows.itemsize, rows.itemsize),
        )
        apart[:] = blocks[:, top : top + step].transpose(1, 0, 2)


def _row_blocks(rows: np.ndarray, height: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, start): rows[first:last] lie in the block that begins at row `start`."""
    blocks = rows // height
    edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(rows)]
    starts = (blocks[edges[:-1]] * height).tolist()
    return zip(edges[:-1], edges[1:], starts, strict=True)


def _decoder(dataset: h5py.Dataset, steps: Steps) -> Decode:
    """One chunk at a time, read as it is stored and decoded by `steps`."""
    shape = dataset.chunks[-2:]
    size = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    lead = (0,) * (dataset.ndim - 2)
    stored_size = None if steps else _stored_sizes(dataset)

    def decode(top: int, left: int) -> np.ndarray:
        # HDF5 believes the index, and writes beyond the buffer that h5py gives it.
        if stored_size is not None and (stored := stored_size(top, left)) != size:
            raise OSError(f"a chunk of {size} bytes has {stored} stored")
        skipped, raw = dataset.id.read_direct_chunk((*lead, top, left))
        try:
            for number, step in steps:
                if not skipped >> number & 1:  # a filter that gained nothing was left out
                    raw = step(raw, size)
        except _INFLATE_ERRORS:
            # Stored in a way not known here, or damaged: HDF5 will tell.
            return _by_hdf5(dataset, *shape)(top, left)
        if len(raw) != size:
            raise OSError(f"a chunk of {size} bytes decodes to {len(raw)}")
        flat = np.frombuffer(raw, dataset.dtype)
        return flat[: shape[0] * shape[1]].reshape(shape)

    return decode


def _stored_sizes(dataset: h5py.Dataset) -> Callable[[int, int], int]:
    """Bytes stored of the chunk that begins at a row and a column; 0 where there is none."""
    if not hasattr(dataset.id, "chunk_iter"):
        lead = (0,) * (dataset.ndim - 2)
        return lambda top, left: dataset.id.get_chunk_info_by_coord((*lead, top, left)).size
    # HDF5 walks through its index for every chunk asked for; here it does so once.
    sizes: dict[tuple[int, int], int] = {}

    def note(chunk: Any) -> None:
        sizes[chunk.chunk_offset[-2], chunk.chunk_offset[-1]] = chunk.size

    dataset.id.chunk_iter(note)
    return lambda top, left: sizes.get((top, left), 0)


def _steps(dataset: h5py.Dataset) -> Steps | None:
    """(number of the filter, its undoing) in the order of decoding; None where HDF5 must do it."""
    if dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype):
        return None
    itemsize = dataset.dtype.itemsize
    plist = dataset.id.get_create_plist()
    steps: Steps = []
    for number in range(plist.get_nfilters()):
        code, _, options, _ = plist.get_filter(number)
        if code == h5py.h5z.FILTER_DEFLATE:
            steps.insert(0, (number, _inflate))
        elif code == h5py.h5z.FILTER_SHUFFLE and options == (itemsize,):
            steps.insert(0, (number, lambda raw, _: _unshuffle(raw, itemsize)))
        else:
            return None
    return steps


def _inflate(raw: bytes, size: int) -> bytes:
    """Undo deflate; its checksum is compared. At most size + 1 bytes, whatever the data claim."""
    stream = _inflater.decompressobj()
    data = stream.decompress(raw, size + 1)
    if not stream.eof and len(data) <= size:
        raise zlib.error("the stream is cut short")
    return data


def _unshuffle(raw: bytes, itemsize: int) -> bytes:
    """Undo HDF5's shuffle: first bytes of all numbers, then their second ones, and so on."""
    planes = np.frombuffer(raw, np.uint8)
    if len(planes) % itemsize:
        raise zlib.error("no whole number of values")
    return planes.reshape(itemsize, -1).T.tobytes()


def _by_hdf5(dataset: h5py.Dataset, height: int, width: int) -> Decode:
    """Blocks of [height, width], fewer at the edges, read by HDF5. Each overwrites the last."""
    total, columns = dataset.shape[-2:]
    buffer = np.empty(min(height, total) * min(width, columns), dataset.dtype)
    lead = (0,) * (dataset.ndim - 2)
    ones = (1,) * len(lead)
    space = dataset.id.get_space()
    kind = h5py.h5t.py_create(dataset.dtype)

    def read(top: int, left: int) -> np.ndarray:
        shape = min(height, total - top), min(width, columns - left)
        block = buffer[: shape[0] * shape[1]].reshape(shape)
        space.select_hyperslab((*lead, top, left), (*ones, *shape))
        dataset.id.read(h5py.h5s.create_simple(shape), space, block, kind)
        return block

    return read
