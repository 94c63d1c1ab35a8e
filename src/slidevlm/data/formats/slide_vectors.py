"""TRIDENT's slide features: one HDF5 file a specimen with `features` [E] and attributes.

TRIDENT's own files also repeat the coordinates of the slide's tiles, which an embedding of a
specimen of several slides does not have; readers of slide features use `features` alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np


def write_slide_vectors(
    folder: Path, names: Sequence[str], vectors: np.ndarray, attributes: Mapping[str, str]
) -> None:
    """Write `<name>.h5` for each of N names, each whole or not at all.

    Args:
        folder: made where it lacks.
        names: N; a "/" in one becomes "_".
        vectors: [N, E] float32.
        attributes: of `features`, beside its `name` and `savetodir`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, vector in zip(names, vectors, strict=True):
        path = folder / f"{name.replace('/', '_')}.h5"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with h5py.File(temporary, "w") as file:
                data = file.create_dataset("features", data=vector)
                data.attrs["name"] = name
                data.attrs["savetodir"] = folder.name
                for key, value in attributes.items():
                    data.attrs[key] = value
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
