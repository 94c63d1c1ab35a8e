"""TRIDENT's slide features: one HDF5 file a specimen with `features` [E] and attributes.

TRIDENT's own files also repeat the coordinates of the slide's tiles, which an embedding of a
specimen of several slides does not have; readers of slide features use `features` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from slidevlm.files import replacing

_LONGEST = 200  # bytes of a name; a file may have 255, and `replacing` adds to it


def write_slide_vectors(
    folder: Path, names: Sequence[str], vectors: np.ndarray, attributes: Mapping[str, str]
) -> None:
    """Write `<name>.h5` for each of N names, each whole or not at all.

    Args:
        folder: made where it lacks.
        names: N; what no file may be called becomes "_", and of equal names all but the first
            get a number.
        vectors: [N, E] float32.
        attributes: of `features`, beside its `name` and `savetodir`.
    """
    for name, plain, vector in zip(names, _file_names(names), vectors, strict=True):
        with replacing(folder / f"{plain}.h5") as new, h5py.File(new, "w") as file:
            data = file.create_dataset("features", data=vector)
            data.attrs["name"] = name
            data.attrs["savetodir"] = folder.name
            for key, value in attributes.items():
                data.attrs[key] = value


def _file_names(names: Sequence[str]) -> list[str]:
    """What the files are called: within the folder, and each another."""
    taken: set[str] = set()
    found = []
    for name in names:
        plain = re.sub(r"[/\\\x00-\x1f]", "_", name)
        while len(plain.encode()) > _LONGEST:
            plain = plain[:-1]
        chosen, number = plain, 2
        while chosen.lower() in taken:  # some disks do not tell a from A
            chosen, number = f"{plain}_{number}", number + 1
        taken.add(chosen.lower())
        found.append(chosen)
    return found
