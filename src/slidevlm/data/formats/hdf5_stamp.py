"""STAMP: one HDF5 file a slide with `feats` [N, D] and `coords` [N, 2].

Attributes of the file: `unit` ("um"), `tile_size_um` (older: `tile_size`), `tile_size_px`,
`extractor` (or `encoder`), `feat_type` ("tile"; "slide" and "patient" are embeddings). Files of
STAMP before 2.0 have no `unit`: where their tiles are 224 apart, 224 stands for 256 micrometres.
"""

from __future__ import annotations

import math

import numpy as np

from slidevlm.data.formats.hdf5 import Hdf5File, Hdf5Rows
from slidevlm.data.formats.slides import (
    FORMATS,
    HDF5_EXTENSIONS,
    OpenBags,
    Slide,
    SlideFormat,
    Source,
    size_text,
)
from slidevlm.errors import DataError

_OLD_TILE, _OLD_MICROMETRES = 224, 256
_UNITS = {"um": "um", "µm": "um", "μm": "um", "px": "px"}


def _recognises(source: Source) -> bool:
    return source.hdf5 is not None and "feats" in source.hdf5.names()


def _open(source: Source) -> OpenBags:
    file = source.hdf5
    assert file is not None

    def open_bag(name: str) -> Slide:
        kind = file.attribute("/", "feat_type")
        if kind not in (None, "tile"):
            raise DataError(
                f"{file.path} has feat_type {kind!r}: it holds a slide embedding, not a bag of "
                "tiles; give STAMP's tile features"
            )
        rows = Hdf5Rows(file, "/feats")
        unit, scale, warnings = _unit(file)
        size, pixels = file.attribute("/", "tile_size_um"), file.attribute("/", "tile_size_px")
        if size is None and unit == "um":
            size = file.attribute("/", "tile_size")

        def positions() -> np.ndarray | None:
            found = None if unit is None else rows.positions("/coords")
            return None if found is None else found * scale

        return Slide(
            "STAMP",
            file.path,
            rows,
            unit=unit,
            encoder=_text(file, "extractor") or _text(file, "encoder"),
            tile_size=size_text(size, "um") or size_text(pixels, "px"),
            warnings=warnings,
            positions=positions,
        )

    return OpenBags([source.name], open_bag, file.close)


def _text(file: Hdf5File, name: str) -> str | None:
    value = file.attribute("/", name)
    return None if value is None else str(value)


def _unit(file: Hdf5File) -> tuple[str | None, float, tuple[str, ...]]:
    """Unit of the positions to be given, their factor, and what to tell."""
    if file.dataset("/coords") is None:
        return None, 1.0, ("no coords; positions are missing",)
    written = file.attribute("/", "unit")
    if written is not None:
        if not isinstance(written, str) or written not in _UNITS:
            raise DataError(
                f"{file.path}: attribute unit is {written!r}; STAMP writes 'um' (micrometres), "
                "and 'px' (level-0 pixels) is read as well"
            )
        return _UNITS[written], 1.0, ()
    size = file.attribute("/", "tile_size")
    known = isinstance(size, int | float) and math.isfinite(size)
    if round(size if known else _stride(file)) == _OLD_TILE:
        return "um", _OLD_MICROMETRES / _OLD_TILE, ("file of STAMP 1: 224 stands for 256 um",)
    return None, 1.0, ("coords name no unit (attribute 'unit'); positions are left out",)


def _stride(file: Hdf5File) -> float:
    """Smallest distance between two columns or rows of tiles; 0 for fewer than two."""
    dataset = file.dataset("/coords")
    if dataset is None or dataset.ndim != 2 or dataset.dtype.kind not in "fiu":
        return 0.0
    values = file.values(dataset)
    gaps = [np.diff(np.unique(values[:, axis])) for axis in range(values.shape[1])]
    gaps = [gap[gap > 0] for gap in gaps if len(gap)]
    smallest = min((float(gap.min()) for gap in gaps if len(gap)), default=0.0)
    return smallest if np.isfinite(smallest) else 0.0


FORMATS.register("STAMP")(
    SlideFormat(10, "HDF5 with a dataset feats", HDF5_EXTENSIONS, _recognises, _open)
)
