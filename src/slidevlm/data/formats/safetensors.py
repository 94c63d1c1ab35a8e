"""`.safetensors` files: features and perhaps coordinates as named tensors.

Features are the tensor of a name in `FEATURE_NAMES`, else the only tensor that is not
coordinates; coordinates are the tensor of a name in `POSITION_NAMES`, in level-0 pixels. The
file's metadata may name `encoder` and `unit`. The header is read here (eight bytes of length,
JSON, then the tensors end to end, as huggingface.co/docs/safetensors says), because rows are
then read one by one, and no library is needed.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.data.formats.rows import (
    OpenFile,
    PlainRows,
    as_positions,
    damage,
    flat_shape,
    for_each_row,
    read_plain,
)
from slidevlm.data.formats.slides import (
    FORMATS,
    OpenBags,
    Slide,
    SlideFormat,
    Source,
    find_arrays,
)
from slidevlm.errors import DataError

_HEADER_LIMIT = 100_000_000  # bytes, as in the format's own library
_DTYPES = {
    "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip
_FLOATS = ("F16", "BF16", "F32", "F64")


def _length(source: Source) -> int | None:
    """Length of the header, or None where this can be none."""
    if len(source.head) < 9 or source.head[8:9] != b"{":
        return None
    (length,) = struct.unpack("<Q", source.head[:8])
    return length if length <= _HEADER_LIMIT else None


def _open(source: Source) -> OpenBags:
    path = source.path

    def open_bag(name: str) -> Slide:
        with damage(path, "the header"):
            header, begin = _header(path, _length(source) or 0)
            metadata = header.pop("__metadata__", {})
            places = {key: _place(key, entry, begin, path) for key, entry in header.items()}
            _check_places(places, path.stat().st_size, begin, path)
            features, coordinates = find_arrays(list(places), path)
            return _slide(path, features, coordinates, places, metadata)

    return OpenBags([source.name], open_bag, lambda: None)


def _header(path: Path, length: int) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        file.seek(8)
        text = file.read(length)
    if len(text) != length:
        raise ValueError("the header is cut short")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise TypeError("the header is no object")
    return header, 8 + length


class _Place:
    """Where a tensor lies in the file."""

    def __init__(self, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> None:
        self.dtype, self.shape, self.begin, self.end = dtype, shape, begin, end


def _place(name: str, entry: Any, begin: int, path: Path) -> _Place:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if dtype not in _DTYPES:
        raise DataError(f"{path}: tensor {name!r} has type {dtype!r}; only numbers are read")
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError(f"shape or place of tensor {name!r}")
    if math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize != last - first:
        raise ValueError(f"tensor {name!r} of shape {shape} does not fit its {last - first} bytes")
    return _Place(dtype, shape, begin + first, begin + last)


def _check_places(places: dict[str, _Place], size: int, begin: int, path: Path) -> None:
    """The format wants tensors end to end, from the header to the end of the file."""
    at = begin
    for place in sorted(places.values(), key=lambda p: (p.begin, p.end)):
        if place.begin != at:
            raise ValueError("tensors do not lie end to end")
        at = place.end
    if at != size:
        raise ValueError(f"tensors end at byte {at}, the file at {size}")


def _slide(
    path: Path,
    features: str,
    coordinates: str | None,
    places: dict[str, _Place],
    metadata: Any,
) -> Slide:
    place = places[features]
    if place.dtype not in _FLOATS:
        raise DataError(f"{path}: tensor {features!r} has type {place.dtype}; write floats")
    shape = flat_shape(place.shape, path, features)
    rows = PlainRows(path, place.begin, shape, np.dtype(_DTYPES[place.dtype]), features)
    known = metadata if isinstance(metadata, dict) else {}
    unit = known.get("unit")
    if unit not in (None, "um", "px"):
        raise DataError(f"{path}: unit {unit!r} of its metadata; write 'um' or 'px'")

    def positions() -> np.ndarray | None:
        if coordinates is None:
            return None
        where = places[coordinates]
        count = math.prod(where.shape)
        file = OpenFile(path)
        try:
            kind = np.dtype(_DTYPES[where.dtype])
            values = read_plain(file.descriptor, where.begin, (count, 1), kind, None)
        finally:
            file.close()
        found = as_positions(values.reshape(where.shape), path, coordinates)
        return for_each_row(found, place.shape, path, coordinates)

    if coordinates is None:
        warnings: tuple[str, ...] = ("no coordinates; positions are missing",)
    elif unit is None:
        warnings = ("coordinates name no unit; level-0 pixels are assumed",)
    else:
        warnings = ()
    encoder = known.get("encoder")
    return Slide(
        "safetensors",
        path,
        rows,
        unit=None if coordinates is None else unit or "px",
        encoder=None if encoder is None else str(encoder),
        warnings=warnings,
        positions=positions,
    )


FORMATS.register("safetensors")(
    SlideFormat(
        80,
        "a .safetensors file: eight bytes of length, then JSON",
        (".safetensors",),
        lambda source: _length(source) is not None,
        _open,
    )
)
