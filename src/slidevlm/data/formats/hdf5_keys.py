"""HDF5 files whose root holds nothing but matrices: each [N, D] is the bag of its key."""

from __future__ import annotations

import h5py

from slidevlm.data.formats.hdf5 import Hdf5File, Hdf5Rows
from slidevlm.data.formats.rows import damage, dtype_name
from slidevlm.data.formats.slides import (
    FORMATS,
    HDF5_EXTENSIONS,
    OpenBags,
    Slide,
    SlideFormat,
    Source,
)


def _recognises(source: Source) -> bool:
    file = source.hdf5
    names = [] if file is None else file.names()
    return file is not None and bool(names) and all(_is_matrix(file, name) for name in names)


def _is_matrix(file: Hdf5File, name: str) -> bool:
    found = file.object(f"/{name}")
    with damage(file.path, name):
        if not isinstance(found, h5py.Dataset) or found.ndim != 2:
            return False
        dtype_name(found.dtype, file.path, found.name)
        return True


def _open(source: Source) -> OpenBags:
    file = source.hdf5
    assert file is not None

    def open_bag(name: str) -> Slide:
        return Slide(
            "HDF5, a bag a key",
            file.path,
            Hdf5Rows(file, f"/{name}"),
            warnings=("no coordinates; positions are missing",),
        )

    return OpenBags(file.names(), open_bag, file.close)


FORMATS.register("HDF5, a bag a key")(
    SlideFormat(
        50, "HDF5 whose root holds matrices [N, D] only", HDF5_EXTENSIONS, _recognises, _open
    )
)
