"""HDF5 files that hold coordinates of tiles only, as CLAM and TRIDENT write before features."""

from __future__ import annotations

from slidevlm.data.formats.slides import FORMATS, HDF5_EXTENSIONS, OpenBags, SlideFormat, Source
from slidevlm.errors import DataError


def _recognises(source: Source) -> bool:
    return source.hdf5 is not None and "coords" in source.hdf5.names()


def _refuse(source: Source) -> OpenBags:
    raise DataError(
        f"{source.path} holds coordinates of tiles (coords) and no features; give the file or "
        "folder that the encoder wrote afterwards"
    )


FORMATS.register("coordinates only")(
    SlideFormat(
        40, "HDF5 with coords and no features: refused", HDF5_EXTENSIONS, _recognises, _refuse
    )
)
