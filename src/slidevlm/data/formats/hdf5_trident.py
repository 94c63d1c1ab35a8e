"""TRIDENT: one HDF5 file a slide with `features` [N, D] and `coords` [N, 2] in level-0 pixels.

Recognised by the attribute `patch_size_level0` of `coords`. `features` names its encoder in the
attribute `encoder`, where None is written as "None". The size of a pixel is not told. One vector
in `features` is TRIDENT's slide embedding; (0,) is a slide without tissue.
"""

from __future__ import annotations

from slidevlm.data.formats.hdf5 import Hdf5Rows
from slidevlm.data.formats.slides import (
    FORMATS,
    HDF5_EXTENSIONS,
    OpenBags,
    Slide,
    SlideFormat,
    Source,
    size_text,
)


def _recognises(source: Source) -> bool:
    file = source.hdf5
    return (
        file is not None
        and "features" in file.names()
        and file.has_attribute("/coords", "patch_size_level0")
    )


def _open(source: Source) -> OpenBags:
    file = source.hdf5
    assert file is not None

    def open_bag(name: str) -> Slide:
        rows = Hdf5Rows(file, "/features")
        encoder = file.attribute("/features", "encoder")
        size = file.attribute("/coords", "patch_size_level0")
        return Slide(
            "TRIDENT",
            file.path,
            rows,
            unit="px",
            encoder=None if encoder is None else str(encoder),
            tile_size=size_text(size, "px at level 0"),
            positions=lambda: rows.positions("/coords"),
        )

    return OpenBags([source.name], open_bag, file.close)


FORMATS.register("TRIDENT")(
    SlideFormat(
        20,
        "HDF5 with features and the attribute patch_size_level0 of coords",
        HDF5_EXTENSIONS,
        _recognises,
        _open,
    )
)
