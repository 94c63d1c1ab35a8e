"""Zarr folders: LazySlide (SpatialData), TIAToolbox, and a single array. Needs the extra `zarr`.

| content | format |
|---|---|
| `tables/<encoder>_tiles/X` [N, D], perhaps with `obsm/spatial` | LazySlide; one bag a table |
| `features` [N, D] and `coordinates` [N, 4] | TIAToolbox |
| the folder itself is an array [N, D] | zarr array |

The metadata are read here first: an array whose chunks would be unpickled, or that holds anything
but numbers, is refused before zarr sees it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from slidevlm.data.formats.rows import (
    as_positions,
    as_tensor,
    damage,
    dtype_name,
    flat_shape,
    for_each_row,
)
from slidevlm.data.formats.slides import (
    FORMATS,
    OpenBags,
    Slide,
    SlideFormat,
    Source,
    find_arrays,
)
from slidevlm.errors import ConfigError, DataError

_MARKS = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
# Codecs that turn bytes into numbers and nothing else; "pickle" and its like run code.
_CODECS = {
    "blosc", "zstd", "zlib", "gzip", "lz4", "bz2", "lzma", "lzf", "shuffle", "delta", "crc32",
    "crc32c", "adler32", "fletcher32", "bytes", "transpose", "sharding_indexed",
}  # fmt: skip
_TILES = "_tiles"


def _recognises(source: Source) -> bool:
    return source.path.is_dir() and any((source.path / mark).is_file() for mark in _MARKS)


def _json(path: Path) -> dict[str, Any]:
    with damage(path, "the metadata"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("no object")
        return found


class _Array:
    """An array of numbers, by its own metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        new, old = folder / "zarr.json", folder / ".zarray"
        if new.is_file():
            self._read(_json(new), new, version=3)
        else:
            self._read(_json(old), old, version=2)

    def _read(self, metadata: dict[str, Any], path: Path, version: int) -> None:
        with damage(path, "the metadata"):
            self.shape = tuple(int(n) for n in metadata["shape"])
            if version == 3:
                codecs = metadata["codecs"]
                chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"]
                self.dtype = np.dtype(metadata["data_type"])
            else:
                codecs = [*(metadata.get("filters") or []), metadata.get("compressor")]
                chunks = metadata["chunks"]
                self.dtype = np.dtype(metadata["dtype"])
            names = _codec_names([codec for codec in codecs if codec is not None])
            self.chunks = tuple(int(n) for n in chunks)
            if self.dtype.kind not in "fiu" or not names <= _CODECS:
                raise DataError(
                    f"{path} is of type {self.dtype} with the codecs {', '.join(sorted(names))}; "
                    "only numbers and plain codecs are read, as others could run code"
                )
            if len(self.chunks) != len(self.shape) or min((*self.chunks, 1)) < 1:
                raise ValueError(f"chunks {self.chunks} of shape {self.shape}")
            if min((*self.shape, 0)) < 0 or math.prod(self.chunks) * self.dtype.itemsize > 2**31:
                raise ValueError(f"shape {self.shape} in chunks of {self.chunks}")

    def check_complete(self) -> None:
        """DataError where chunks are missing: zarr would fill in zeros silently."""
        expected = math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))
        found = sum(
            1
            for file in self.folder.rglob("*")
            if file.is_file() and not file.name.startswith((".", "zarr.json"))
        )
        if found < expected:
            raise DataError(
                f"{self.folder} has {found} of {expected} chunks; it was not written to its end, "
                "or is damaged: write it again"
            )

    def read(self, rows: np.ndarray | None) -> np.ndarray:
        """Rows of a matrix, or all of any array; only chunks that are touched are read."""
        array = _zarr().open_array(str(self.folder), mode="r")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError("two different descriptions of one array")
        values: np.ndarray = np.asarray(
            array[...] if rows is None else array.get_orthogonal_selection((rows, slice(None)))
        )
        return values


def _codec_names(codecs: list[Any]) -> set[str]:
    """Names of all codecs, also of those inside of shards."""
    names = set()
    for codec in codecs:
        names.add(str(codec["name"] if "name" in codec else codec["id"]).removeprefix("numcodecs."))
        inner = codec.get("configuration") or {}
        for key in ("codecs", "index_codecs"):
            names |= _codec_names(inner.get(key) or [])
    return names


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ConfigError(
            "zarr folders need the extra zarr: pip install 'slidevlm[zarr]'"
        ) from error
    return zarr


class _ZarrRows:
    """`Rows` of one array."""

    def __init__(self, array: _Array) -> None:
        self._array = array
        self.shape = flat_shape(array.shape, array.folder, "the array")
        self.dtype = dtype_name(array.dtype, array.folder, "the array")
        array.check_complete()

    def read(self, rows: np.ndarray | None) -> Tensor:
        """See `Rows.read`."""
        if rows is None or len(self._array.shape) != 2:
            values = self._array.read(None).reshape(self.shape)
            return as_tensor(values if rows is None else values[rows], self.dtype)
        return as_tensor(self._array.read(rows), self.dtype)


def _arrays(folder: Path) -> list[str]:
    """Names of the arrays directly in a group."""
    return sorted(
        child.name
        for child in folder.iterdir()
        if (child / ".zarray").is_file()
        or ((child / "zarr.json").is_file() and _json(child / "zarr.json").get("shape") is not None)
    )


def _tables(root: Path) -> dict[str, Path]:
    """SpatialData's tables with features of tiles: name -> folder."""
    tables = root / "tables"
    found = sorted(tables.iterdir()) if tables.is_dir() else []
    return {table.name: table for table in found if table.is_dir() and "X" in _arrays(table)}


def _open(source: Source) -> OpenBags:
    root = source.path
    with damage(root, "the folder"):
        tables = _tables(root)
        if not tables:
            return OpenBags([source.name], lambda _: _plain(root), lambda: None)
    if len(tables) == 1:
        ((table, folder),) = tables.items()
        return OpenBags([source.name], lambda _: _table(root, table, folder), lambda: None)
    return OpenBags(list(tables), lambda name: _table(root, name, tables[name]), lambda: None)


def _table(root: Path, name: str, folder: Path) -> Slide:
    _zarr()
    features = _Array(folder / "X")
    rows = _ZarrRows(features)
    with damage(folder, "the coordinates"):
        spatial = folder / "obsm" / "spatial"
        coordinates = _Array(spatial) if spatial.is_dir() else None
    return Slide(
        "LazySlide",
        root,
        rows,
        unit=None if coordinates is None else "px",
        encoder=name.removesuffix(_TILES),
        warnings=("its table has no obsm/spatial; positions are missing",)
        if coordinates is None
        else (),
        positions=lambda: _positions(coordinates, features.shape),
    )


def _plain(root: Path) -> Slide:
    _zarr()
    with damage(root, "the folder"):
        if (root / ".zarray").is_file() or "shape" in _json_of(root):
            rows = _ZarrRows(_Array(root))
            missing = ("no coordinates; positions are missing",)
            return Slide("zarr array", root, rows, warnings=missing)
        features, position = find_arrays(_arrays(root), root)
        array = _Array(root / features)
        coordinates = None if position is None else _Array(root / position)
    tia = position == "coordinates" and coordinates is not None and coordinates.shape[-1:] == (4,)
    return Slide(
        "TIAToolbox" if tia else "zarr group",
        root,
        _ZarrRows(array),
        unit=None if coordinates is None else "px",
        warnings=("no coordinates; positions are missing",)
        if coordinates is None
        else ("coordinates are pixels of the resolution at which features were extracted",)
        if tia
        else ("coordinates name no unit; level-0 pixels are assumed",),
        positions=lambda: _positions(coordinates, array.shape),
    )


def _json_of(folder: Path) -> dict[str, Any]:
    path = folder / "zarr.json"
    return _json(path) if path.is_file() else {}


def _positions(array: _Array | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if array is None:
        return None
    values = as_positions(array.read(None), array.folder, "the array")
    return for_each_row(values, shape, array.folder, "the array")


FORMATS.register("zarr")(
    SlideFormat(
        90,
        "a zarr folder: tables/*/X (LazySlide), features with coordinates (TIAToolbox), or one "
        "array [N, D]",
        (".zarr",),
        _recognises,
        _open,
    )
)
