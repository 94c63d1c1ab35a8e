"""Embeddings of a cohort in one file: HDF5, NPZ or Parquet, told by its ending.

All three hold the same: `specimen_ids`, `patient_ids`, `tiles`, `image_embedding`, and as JSON
`about`, what they were made by and from. HDF5 and NPZ have an array each (`about` is an attribute
of the HDF5 file), Parquet a column each and `about` among the metadata of its schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from slidevlm.data.formats.hdf5 import Hdf5File, text
from slidevlm.errors import ConfigError, DataError, SlideVLMError
from slidevlm.files import replacing

_KEY = b"slidevlm"  # of Parquet's metadata


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings of N specimens."""

    specimen_ids: tuple[str, ...]  # N
    patient_ids: tuple[str, ...]  # N
    tiles: np.ndarray  # [N] int64, tiles that were read
    image_embedding: np.ndarray  # [N, E] float32
    about: Mapping[str, Any]


def save_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write the file whole or not at all; one that is there is replaced.

    Raises:
        ConfigError: no such ending, or a package is missing.
    """
    write = _form(path)[0]
    with replacing(path) as new:
        write(new, embeddings)


def load_embeddings(path: Path) -> Embeddings:
    """What `save_embeddings` wrote.

    Raises:
        ConfigError: no such ending, or a package is missing.
        DataError: the file cannot be read, or is another.
    """
    read = _form(path)[1]
    try:
        return read(path)
    except SlideVLMError:
        raise
    except Exception as error:  # h5py, zipfile, numpy and pyarrow each have errors of their own
        raise DataError(
            f"{path} is not a file of embeddings that slidevlm wrote ({error}); choose another "
            "name or remove it"
        ) from error


def check_form(path: Path) -> None:
    """ConfigError where `path` has none of the endings, or its package is missing."""
    _form(path)


Form = tuple[Callable[[Path, Embeddings], None], Callable[[Path], Embeddings]]


def _form(path: Path) -> Form:
    forms: dict[str, Form] = {
        ".h5": (_write_hdf5, _read_hdf5),
        ".hdf5": (_write_hdf5, _read_hdf5),
        ".npz": (_write_npz, _read_npz),
        ".parquet": (_write_parquet, _read_parquet),
    }
    ending = path.suffix.lower()
    if ending not in forms:
        raise ConfigError(
            f"--output {path}: the ending tells the form, one of {', '.join(forms)}; - writes "
            "lines of JSON to the terminal"
        )
    if ending == ".parquet":
        _pyarrow(path)
    return forms[ending]


def _write_hdf5(path: Path, e: Embeddings) -> None:
    with h5py.File(path, "w") as file:
        text = h5py.string_dtype()
        file.create_dataset("specimen_ids", data=list(e.specimen_ids), dtype=text)
        file.create_dataset("patient_ids", data=list(e.patient_ids), dtype=text)
        file["tiles"] = e.tiles
        file["image_embedding"] = e.image_embedding
        file.attrs["about"] = json.dumps(e.about)


def _read_hdf5(path: Path) -> Embeddings:
    with closing(Hdf5File(path)) as file:

        def values(name: str) -> np.ndarray:
            found = file.dataset(name)
            if found is None:
                raise ValueError(f"it has no {name}")
            return file.values(found)

        def texts(name: str) -> tuple[str, ...]:
            return tuple(text(value, path, name) for value in values(name))

        return Embeddings(
            texts("specimen_ids"),
            texts("patient_ids"),
            values("tiles"),
            values("image_embedding"),
            dict(file.attribute("/", "about")),
        )


def _write_npz(path: Path, e: Embeddings) -> None:
    with path.open("wb") as file:
        np.savez(
            file,
            specimen_ids=np.array(e.specimen_ids),
            patient_ids=np.array(e.patient_ids),
            tiles=e.tiles,
            image_embedding=e.image_embedding,
            about=np.array(json.dumps(e.about)),
        )


def _read_npz(path: Path) -> Embeddings:
    with np.load(path, allow_pickle=False) as file:
        return Embeddings(
            tuple(file["specimen_ids"].tolist()),
            tuple(file["patient_ids"].tolist()),
            file["tiles"],
            file["image_embedding"],
            json.loads(str(file["about"])),
        )


def _write_parquet(path: Path, e: Embeddings) -> None:
    pyarrow, parquet = _pyarrow(path)
    width = e.image_embedding.shape[1]
    flat = pyarrow.array(np.ascontiguousarray(e.image_embedding).reshape(-1))
    columns = {
        "specimen_ids": pyarrow.array(list(e.specimen_ids), pyarrow.string()),
        "patient_ids": pyarrow.array(list(e.patient_ids), pyarrow.string()),
        "tiles": pyarrow.array(e.tiles),
        "image_embedding": pyarrow.FixedSizeListArray.from_arrays(flat, width),
    }
    table = pyarrow.table(columns)
    parquet.write_table(table.replace_schema_metadata({_KEY: json.dumps(e.about)}), path)


def _read_parquet(path: Path) -> Embeddings:
    table = _pyarrow(path)[1].read_table(path)
    about = json.loads((table.schema.metadata or {})[_KEY])
    column = table["image_embedding"].combine_chunks()
    rows = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
    return Embeddings(
        tuple(table["specimen_ids"].to_pylist()),
        tuple(table["patient_ids"].to_pylist()),
        table["tiles"].to_numpy(),
        rows,
        about,
    )


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{path}: Parquet needs the package pyarrow (pip install 'slidevlm[parquet]')"
        ) from None
    return pyarrow, pyarrow.parquet
