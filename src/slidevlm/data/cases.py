"""What the program knows of a cohort's files: cases, bags, and stores that read them.

A format is one module of `slidevlm.data.formats`; nothing else knows how features lie on disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from slidevlm.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Case:
    """One specimen. `specimen` is unique in its store; `location` is the format's own key.

    Where two patients have specimens of one name ("A", "B"), `specimen` is "<patient>/<name>".
    """

    specimen: str
    patient: str
    location: str


@dataclass(frozen=True)
class Bag:
    """Some or all tiles of one specimen, N of them, in the order of the file."""

    features: Tensor  # [N, D] float16, bfloat16 or float32, as on disk; float64 becomes float32
    positions: Tensor | None  # [N, 2] float32, x and y in `unit`, as on disk
    slides: Tensor | None  # [N] int64, index of the tile's slide; 0 where nothing names slides
    unit: str | None  # "um" (micrometres) or "px" (level-0 pixels); None without positions
    centres: Tensor | None = None  # [N, 2] float32, centre of the tile's slide; see `centres_of`

    def relative_positions(self) -> Tensor | None:
        """[N, 2] float32: positions from the centre of their slide, or None without positions."""
        if self.positions is None or self.centres is None:
            return None
        return self.positions - self.centres


class CaseStore(Protocol):
    """Read access to a cohort. Picklable; reopens its files in the process that uses it."""

    path: Path
    cases: tuple[Case, ...]

    def has_features(self, case: Case) -> bool:
        """Whether features of `case` are there; looks at names only, reads no data."""
        ...

    def length(self, case: Case) -> int:
        """Number of tiles of `case`; reads no features."""
        ...

    def read(self, case: Case, rows: np.ndarray | None) -> Bag:
        """The bag of `case`; with `rows` ([K] int64, strictly increasing) only those tiles.

        Of the features, only the rows asked for are read from disk.
        """
        ...

    def text(self, case: Case) -> str | None:
        """The report kept beside the features, or None."""
        ...


@dataclass(frozen=True)
class Facts:
    """What a format tells of a specimen beside its features; None where it does not tell."""

    format: str | None = None  # as a user would say it: "TRIDENT", "case layout", ...
    dtype: str | None = None  # of the features on disk
    unit: str | None = None  # of the positions
    encoder: str | None = None  # of the tiles
    tile_size: str | None = None  # with its unit: "256 um", "512 px at level 0"
    storage: str | None = None  # of the features: "contiguous", "chunks of 1 rows, gzip 4"
    source: str | None = None  # file that the features were converted from
    warnings: tuple[str, ...] = ()


@runtime_checkable
class Described(Protocol):
    """A store that knows more of a specimen than its features."""

    def facts(self, case: Case) -> Facts:
        """Facts of `case`; reads no features."""
        ...

    def files(self, case: Case) -> tuple[Path, ...]:
        """The files that hold `case`; opens none."""
        ...


@runtime_checkable
class Keyed(Protocol):
    """A store that names tiles."""

    def tile_keys(self, case: Case) -> np.ndarray | None:
        """Names of all tiles of `case`; None where none tells slides apart.

        [N] byte strings, "<slide>/<tile>" or the like, or [N, 4] whole numbers: (specimen, slide,
        section, tile).
        """
        ...


@runtime_checkable
class Verified(Protocol):
    """A store whose file may hold a checksum of each specimen."""

    def has_checksum(self, case: Case) -> bool:
        """Whether there is one of `case`."""
        ...

    def damaged(self, case: Case, features: str) -> tuple[str, ...]:
        """Parts of `case` that are not what was written, given the `Digest` of its features."""
        ...


def open_store(
    *,
    hdf5_filename: str | os.PathLike[str] | None,
    hdf5_feature_attribute: str | None,
    hdf5_text_attribute: str | None,
    root_dir: str | os.PathLike[str] | None,
    slide_table: str | os.PathLike[str] | None = None,
) -> CaseStore:
    """Open the one source of data that is given, perhaps with a table of its slides.

    ConfigError when none or two are given, or an argument that has no effect; DataError when it
    cannot be used.
    """
    if hdf5_filename and root_dir:
        raise ConfigError(
            f"--hdf5_filename {hdf5_filename} and --root-dir {root_dir} are both given; "
            "data comes from one of them"
        )
    # The formats import this module, and only they may pay for h5py.
    from slidevlm.data.formats import open_file, open_folder
    from slidevlm.data.slide_table import read_slide_table

    table = None if slide_table is None else read_slide_table(slide_table)
    if hdf5_filename:
        return open_file(
            Path(hdf5_filename), hdf5_feature_attribute or None, hdf5_text_attribute or None, table
        )
    if root_dir:
        return open_folder(Path(root_dir), table)
    raise ConfigError("no data: give --hdf5_filename (with --hdf5_feature_attribute) or --root-dir")


def unique_cases(found: list[tuple[str, str, str]], path: Path) -> tuple[Case, ...]:
    """Cases from (patient, specimen, location), told apart where patients share specimen names.

    DataError when one patient has the same specimen twice, or a name could not be written down:
    of a file or a group that is not UTF-8.
    """
    counts: dict[str, int] = {}
    for _, specimen, _ in found:
        counts[specimen] = counts.get(specimen, 0) + 1
    cases: dict[tuple[str, str], Case] = {}
    for patient, specimen, location in found:
        try:
            f"{patient}{specimen}".encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}: the name {specimen!a} (patient {patient!a}) is not UTF-8, and "
                "no table of results could hold it; rename the file or the group"
            ) from error
        if (patient, specimen) in cases:
            raise DataError(
                f"{path}: specimen {specimen!r} of patient {patient!r} is listed twice, as "
                f"{cases[patient, specimen].location} and {location}; remove one"
            )
        name = specimen if counts[specimen] == 1 else f"{patient}/{specimen}"
        cases[patient, specimen] = Case(name, patient, location)
    if not cases:
        raise DataError(f"{path} holds no specimens; check that it is the right place")
    return tuple(cases.values())


def keys_of_slides(slides: np.ndarray) -> np.ndarray:
    """Tile keys (specimen, slide, section, tile) from the slide of each row: [N] -> [N, 4] int32.

    Rows count as tiles; what is not known is 0.
    """
    keys = np.zeros((len(slides), 4), np.int32)
    keys[:, 1] = slides
    keys[:, 3] = np.arange(len(slides))
    return keys


def centres_of(positions: np.ndarray, slides: np.ndarray) -> np.ndarray:
    """Centre of each row's slide: [N, 2] positions, [N] slides -> [N, 2] float32.

    The centre is that of the bounding box of ALL rows of the slide, so it does not depend on
    which of them are sampled afterwards.
    """
    if not len(positions):
        return np.zeros((0, 2), np.float32)
    # Tiles of a slide follow each other nearly always: one reduction for each run of them, along
    # a column by itself, as reductions of rows of two numbers are slow.
    starts = np.flatnonzero(np.diff(slides, prepend=-1))
    owners = slides[starts]
    present = np.unique(owners)
    middle = np.zeros((int(present[-1]) + 1, 2))
    for axis in range(2):
        column = np.ascontiguousarray(positions[:, axis])
        low, high = np.full(len(middle), np.inf), np.full(len(middle), -np.inf)
        np.minimum.at(low, owners, np.minimum.reduceat(column, starts))
        np.maximum.at(high, owners, np.maximum.reduceat(column, starts))
        middle[present, axis] = (low[present] + high[present]) / 2
    centres: np.ndarray = middle.astype(np.float32)[slides]
    return centres


def make_bag(
    features: Tensor,
    positions: np.ndarray | None,
    slides: np.ndarray,
    unit: str | None,
    rows: np.ndarray | None,
) -> Bag:
    """A bag from features [K, D] of the chosen rows and positions, slides [N] of all rows."""
    chosen = slice(None) if rows is None else rows
    if positions is None:
        return Bag(features, None, torch.from_numpy(slides[chosen].copy()), None)
    centres = centres_of(positions, slides)
    return Bag(
        features,
        torch.from_numpy(positions[chosen].astype(np.float32)),
        torch.from_numpy(slides[chosen].copy()),
        unit,
        torch.from_numpy(centres[chosen].copy()),
    )
