"""CLAM and GigaPath: one HDF5 file a slide with `features` [N, D] and `coords` [N, 2].

`coords` are level-0 pixels of the tiles' upper left corners. The geometry is in the file of
coordinates that CLAM wrote before, `patches/<slide>.h5` beside the folder of the features or the
folder above; its attributes `patch_size` and `patch_level` are told where it is there.
"""

from __future__ import annotations

from pathlib import Path

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


def _recognises(source: Source) -> bool:
    return source.hdf5 is not None and "features" in source.hdf5.names()


def _open(source: Source) -> OpenBags:
    file = source.hdf5
    assert file is not None

    def open_bag(name: str) -> Slide:
        rows = Hdf5Rows(file, "/features")
        there = file.dataset("/coords") is not None
        encoder = file.attribute("/features", "encoder") or file.attribute("/", "encoder")
        tile_size, unread = _tile_size(file, name)
        return Slide(
            "CLAM/GigaPath",
            file.path,
            rows,
            unit="px" if there else None,
            encoder=None if encoder is None else str(encoder),
            tile_size=tile_size,
            warnings=(*unread, *(() if there else ("no coords; positions are missing",))),
            positions=lambda: rows.positions("/coords"),
        )

    return OpenBags([source.name], open_bag, file.close)


def _tile_size(file: Hdf5File, name: str) -> tuple[str | None, tuple[str, ...]]:
    """Size of a tile from this file or the file of coordinates beside it, and what to tell."""
    if (found := _geometry(file)) is not None:
        return found, ()
    folder = file.path.absolute().parent
    for above in (folder.parent, folder.parent.parent):
        beside = above / "patches" / f"{name}.h5"
        if beside.is_file():
            return _geometry_of(beside)
    return None, ()


def _geometry_of(path: Path) -> tuple[str | None, tuple[str, ...]]:
    """The same of a file of coordinates; the features beside a damaged one are still sound."""
    file = Hdf5File(path)
    try:
        return _geometry(file), ()
    except DataError:
        return None, ("the file in patches/ cannot be read; the tile size is not known",)
    finally:
        file.close()


def _geometry(file: Hdf5File) -> str | None:
    size = file.attribute("/coords", "patch_size")
    level = file.attribute("/coords", "patch_level")
    return size_text(size, "px" if level is None else f"px at level {level}")


FORMATS.register("CLAM/GigaPath")(
    SlideFormat(30, "HDF5 with a dataset features", HDF5_EXTENSIONS, _recognises, _open)
)
