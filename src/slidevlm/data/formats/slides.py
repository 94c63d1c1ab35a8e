"""Files of tile features, one slide each (some hold more), as the tools of the field write them.

    with open_bags(path) as bags:            # what the file is, is found by its content
        for name, slide in bags.items():     # usually one: the file's name without extension
            print(name, slide.format, slide.length, slide.width, slide.unit)
            features, positions = slide.read(None)

A format is one module of this package that registers a `SlideFormat`. What a file is, is decided
by its content alone: the formats are asked in their `order`, and the first that recognises the
file opens it. All errors that a file can cause are DataErrors which name it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

import slidevlm.data.formats as package
from slidevlm.data.formats.hdf5 import Hdf5File, Hdf5Rows, is_hdf5
from slidevlm.data.formats.rows import Rows, damage
from slidevlm.errors import DataError
from slidevlm.registry import Registry

HDF5_EXTENSIONS = (".h5", ".hdf5", ".hdf")
TORCH_EXTENSIONS = (".pt", ".pth")
# Names of arrays where a container holds several, in the order in which they are looked for.
FEATURE_NAMES = ("embeddings", "features", "feats", "tile_embeds")
POSITION_NAMES = ("coords", "coordinates", "positions", "locations")
# Of the pictures themselves: slide tables often name these instead of the feature files.
IMAGE_EXTENSIONS = (
    ".ome.tiff", ".ome.tif", ".svs", ".ndpi", ".mrxs", ".tiff", ".tif", ".scn", ".svslide",
    ".bif", ".vms", ".vmu", ".czi", ".isyntax", ".dcm", ".qptiff", ".sdpc",
)  # fmt: skip


def find_arrays(names: Sequence[str], path: Path) -> tuple[str, str | None]:
    """Names of the features and of the coordinates (or None) among a container's arrays."""
    position = next((name for name in POSITION_NAMES if name in names), None)
    known = [name for name in FEATURE_NAMES if name in names]
    others = [name for name in names if name not in POSITION_NAMES]
    if known or len(others) == 1:
        return (known or others)[0], position
    raise DataError(
        f"{path} holds the arrays {', '.join(map(str, list(names)[:10])) or '(none)'}; one of "
        f"them must be named {', '.join(FEATURE_NAMES)}, or it must be the only one"
    )


def size_text(size: object, unit: str) -> str | None:
    """Such as "256 um" from an attribute; None where it is no number."""
    if isinstance(size, bool) or not isinstance(size, int | float):
        return None
    return f"{size:g} {unit}"


@dataclass
class Slide:
    """One bag of tiles in an open file: N tiles of D features. Not picklable."""

    format: str  # as a user would say it: "TRIDENT", "STAMP", ...
    path: Path
    rows: Rows
    unit: str | None = None  # of the positions, "um" or "px" (level-0 pixels); None without them
    encoder: str | None = None  # of the tiles, where the file tells it
    tile_size: str | None = None  # an edge, where the file tells it: "256 um", "512 px at level 0"
    warnings: tuple[str, ...] = ()  # what a user should know, such as coordinates that are left out
    positions: Callable[[], np.ndarray | None] = lambda: None  # [N, 2] float64
    slide_numbers: Callable[[], np.ndarray | None] = lambda: None  # [N] int64

    @property
    def length(self) -> int:
        """N; 0 for an empty slide."""
        return self.rows.shape[0]

    @property
    def width(self) -> int:
        """D; 0 where an empty slide does not tell it."""
        return self.rows.shape[1]

    @property
    def dtype(self) -> str:
        """Type of the features on disk: "float16", "bfloat16", "float32" or "float64"."""
        return self.rows.dtype

    @property
    def storage(self) -> str | None:
        """How the features lie on disk, where it matters to the speed of reading few rows."""
        return self.rows.storage if isinstance(self.rows, Hdf5Rows) else None

    def read(self, rows: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        """Features [K, D] of `rows` ([K] int64, strictly increasing; None: all N), and positions.

        Features are float16, bfloat16 or float32 (float64 becomes float32). Of them, only `rows`
        are read where the container allows it. Positions are those of ALL rows, [N, 2] float64,
        x and y, or None where there are none.
        """
        assert rows is None or (
            len(rows) and rows[0] >= 0 and rows[-1] < self.length and np.all(np.diff(rows) > 0)
        ), f"rows of {self.length} tiles: {rows}"
        with damage(self.path, "the bag"):
            features = self.rows.read(rows)
            positions = self.positions()
        count = self.length if rows is None else len(rows)
        assert tuple(features.shape) == (count, self.width), (features.shape, self.path)
        return features, positions

    def slides(self) -> np.ndarray | None:
        """[N] int64, number of each row's slide in this bag; None where all are of one slide."""
        with damage(self.path, "the tiles' slides"):
            return self.slide_numbers()


class OpenBags(Mapping[str, Slide]):
    """The bags of one file by name. Each is opened when it is asked for, and once."""

    def __init__(
        self,
        names: Iterator[str] | list[str],
        open_bag: Callable[[str], Slide],
        close: Callable[[], None],
    ) -> None:
        self._opened: dict[str, Slide | None] = dict.fromkeys(names)
        self._open = open_bag
        self._close = close

    def __getitem__(self, name: str) -> Slide:
        found = self._opened[name]
        if found is None:
            found = self._opened[name] = self._open(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)

    def __contains__(self, name: object) -> bool:
        return name in self._opened

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._close()

    def __enter__(self) -> OpenBags:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Source:
    """A path whose format is to be found: what the formats look at, each opened once.

    `hdf5` and `zip_names` are None where the file is no such container. DataError: an HDF5 file
    or a zip archive by its first bytes that cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"no file {path} (looked in {Path.cwd()}); check the path")
        self.path = path

    @property
    def name(self) -> str:
        """The file's name without the extension of a feature file."""
        return bag_name(self.path.name)

    @cached_property
    def head(self) -> bytes:
        """The first 16 bytes; empty for a folder."""
        if self.path.is_dir():
            return b""
        try:
            with open(self.path, "rb") as file:
                return file.read(16)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error

    @cached_property
    def hdf5(self) -> Hdf5File | None:
        """The open HDF5 file; who takes the bags closes it."""
        return Hdf5File(self.path) if is_hdf5(self.path, self.head) else None

    @cached_property
    def zip_names(self) -> tuple[str, ...] | None:
        """Names of a zip archive's members."""
        if not self.head.startswith(b"PK\x03\x04"):
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(archive.namelist())
        except Exception as error:  # a damaged directory leads zipfile to whatever it leads it to
            raise DataError(
                f"{self.path} is a damaged or cut zip archive ({error}); copy or write it again"
            ) from error


@dataclass(frozen=True)
class SlideFormat:
    """One form of files. `order` decides who is asked first; the lower."""

    order: int
    description: str  # by what it is recognised, for docs and for the message when nothing fits
    extensions: tuple[str, ...]
    recognises: Callable[[Source], bool]  # looks at names and headers only
    open: Callable[[Source], OpenBags]


FORMATS: Registry[SlideFormat] = Registry("slide format")


@cache
def formats() -> list[tuple[str, SlideFormat]]:
    """Every format by name, in the order in which they are asked."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return sorted(((name, FORMATS[name]) for name in FORMATS), key=lambda entry: entry[1].order)


@cache
def extensions() -> tuple[str, ...]:
    """Extensions of all formats, the longest first."""
    found = {e for _, f in formats() for e in f.extensions}
    return tuple(sorted(found, key=lambda e: (-len(e), e)))


def bag_name(file: str) -> str:
    """A file's name without the extension of a feature file; other dots belong to the name."""
    lower = file.lower()
    return next((file[: -len(e)] for e in extensions() if lower.endswith(e)), file)


def open_bags(path: str | os.PathLike[str]) -> OpenBags:
    """Open a file (or a zarr folder) of a known format.

    DataError: it does not exist, is of no known format, is refused, or is damaged.
    """
    source = Source(Path(path))
    try:
        for _, form in formats():
            if form.recognises(source):
                return form.open(source)
    except BaseException:
        if "hdf5" in source.__dict__ and source.hdf5 is not None:
            source.hdf5.close()
        raise
    forms = "; ".join(f"{name}: {form.description}" for name, form in formats())
    raise DataError(f"{path} is of no known format; they are: {forms}")
