"""A folder of feature files, one slide each, in any known format; or one file of several slides.

Without a slide table each slide is a specimen of its own, and its patient is TCGA's barcode where
the name begins with one, else the slide. With a table, the slides of a specimen are laid end to
end; each row keeps the number of its slide, and positions stay those of their slide.

Folders are listed, not opened: a file is opened when it is used, by the process that uses it,
which keeps a few open. A file that CLAM wrote twice (`h5_files` and `pt_files`) counts once, as
the former. Folders of coordinates and pictures (`patches`, `masks`, ...) are passed over.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from slidevlm.data.cases import Bag, Case, Facts, keys_of_slides, make_bag, unique_cases
from slidevlm.data.cohort import Likeness
from slidevlm.data.formats import FOLDERS
from slidevlm.data.formats.slides import (
    IMAGE_EXTENSIONS,
    OpenBags,
    Slide,
    bag_name,
    extensions,
    open_bags,
)
from slidevlm.data.slide_table import SlideRow, patient_of
from slidevlm.data.splits import some
from slidevlm.data.telling import Telling, telling
from slidevlm.errors import DataError

log = logging.getLogger("slidevlm.data")

_OPEN_FILES = 8
_SAMPLE = 16  # files looked into for several bags a file
_NOT_FEATURES = ("patches", "masks", "stitches", "thumbnails", "visualization", "contours")
_SIDECARS = (".index.npz", ".index.npy")
_KEY = "::"  # between a file and the bag in it, where a file has several


@dataclass(frozen=True, slots=True)
class Part:
    """One slide of a specimen: a bag of a file."""

    path: str
    bag: str | None  # its name in the file; None for the only one

    def __str__(self) -> str:
        return self.path if self.bag is None else f"{self.path}{_KEY}{self.bag}"


@FOLDERS.register("slide_folder")
class SlideFolder:
    """A `CaseStore` over the slides of a folder or of one file; it has no texts of its own.

    `cases` are in the order of the table, or else of the slides' names.
    """

    description = f"feature files, one slide each ({', '.join(extensions())})"

    def __init__(self, root: Path, slide_table: Sequence[SlideRow] | None = None) -> None:
        self.path = root
        one = root.is_file() or root.name.lower().endswith(".zarr")
        slides = _slides_of_file(root) if one else _slides(root)
        self._parts: dict[str, tuple[Part, ...]] = {}  # where they are more than `location` says
        if slide_table is None:
            found = [
                self._case(patient_of(name), name, [_one(name, parts, root)])
                for name, parts in slides.items()
            ]
        else:
            found = list(self._of_table(slide_table, slides))
        self.cases = unique_cases(found, root)
        self.expected: Likeness | None = None
        self._files: OrderedDict[str, OpenBags] = OrderedDict()
        self._pid = os.getpid()

    @staticmethod
    def recognises(root: Path) -> bool:
        """Whether any feature file is in the folder or below it."""
        return any(True for _ in _files(root, in_order=False))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_pid": -1}

    # -- the index -------------------------------------------------------------------------

    def _case(self, patient: str, specimen: str, parts: list[Part]) -> tuple[str, str, str]:
        location = ", ".join(map(str, parts)) or f"(no file of {specimen})"
        if parts != [Part(location, None)]:
            self._parts[location] = tuple(parts)
        return patient, specimen, location

    def _of_table(
        self, table: Sequence[SlideRow], slides: dict[str, list[Part]]
    ) -> Iterator[tuple[str, str, str]]:
        find = _Finder(slides, self.path)
        specimens: dict[tuple[str, str], list[Part]] = {}
        owners: dict[Part, SlideRow] = {}
        missing = []
        for row in table:
            parts = specimens.setdefault((row.patient, row.specimen), [])
            part = find(row.slide)
            if part is None:
                missing.append(row.slide)
                continue
            before = owners.setdefault(part, row)
            if before is not row:
                raise DataError(
                    f"slide table: {before.slide!r} of {before.specimen!r} and {row.slide!r} of "
                    f"{row.specimen!r} are the same file {part}; remove one"
                )
            parts.append(part)
        if not owners:
            raise DataError(
                f"none of the {len(table)} slides of the slide table has a file in {self.path}; "
                f"the table names {some([row.slide for row in table], 3)}, the folder has "
                f"{some(slides, 3)}"
            )
        if missing:
            log.warning(
                "%d of %d slides of the slide table have no file in %s: %s",
                len(missing), len(table), self.path, some(missing, 10),
            )  # fmt: skip
        unused = len(slides) - len(owners)
        if unused:
            log.info("%d slides of %s are not in the slide table", unused, self.path)
        for (patient, specimen), parts in specimens.items():
            yield self._case(patient, specimen, parts)

    def _parts_of(self, case: Case) -> tuple[Part, ...]:
        known = self._parts.get(case.location)
        return (Part(case.location, None),) if known is None else known

    # -- files -----------------------------------------------------------------------------

    def close(self) -> None:
        """Close all files of this process; the next use opens them again."""
        for bags in self._files.values():
            bags.close()
        self._files.clear()

    def _slide(self, case: Case, part: Part) -> Slide:
        """The open bag; the last few files stay open, in the process that opened them."""
        if self._pid != os.getpid():
            self.close()
            self._pid = os.getpid()
        bags = self._files.get(part.path)
        if bags is None:
            bags = open_bags(self.path / part.path)
            self._files[part.path] = bags
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(part.path)
        return self._checked(_only(bags, part), case)

    def _checked(self, slide: Slide, case: Case) -> Slide:
        if self.expected is not None and slide.length:
            mine = Likeness(slide.width, slide.unit, slide.encoder)
            if (difference := self.expected.difference(mine)) is not None:
                raise DataError(
                    f"{slide.path} differs from the cohort: {difference}; `slidevlm data check` "
                    "counts all such files"
                )
        return slide

    def _slides_of(self, case: Case) -> list[Slide]:
        """The open bags of a specimen; DataErrors name it."""
        parts = self._parts_of(case)
        if not parts:
            raise DataError(
                f"{self.path}: specimen {case.specimen!r} has no feature file; extract its "
                "features or remove it from the split"
            )
        try:
            return [self._slide(case, part) for part in parts]
        except DataError as error:
            _name(case, error)

    # -- reading ---------------------------------------------------------------------------

    def has_features(self, case: Case) -> bool:
        """Whether a file was there when the folder was listed."""
        return bool(self._parts_of(case))

    def length(self, case: Case) -> int:
        """Number of rows of all slides together."""
        return sum(slide.length for slide in self._slides_of(case))

    def facts(self, case: Case) -> Facts:
        """See `Described.facts`; what differs between the slides of a specimen is told as both."""
        slides = self._slides_of(case)
        full = [slide for slide in slides if slide.length] or slides
        warnings = dict.fromkeys(text for slide in slides for text in slide.warnings)
        return Facts(
            format=_both(slide.format for slide in slides),
            dtype=_both(slide.dtype for slide in full),
            unit=_both(slide.unit for slide in full),
            encoder=_both(slide.encoder for slide in full),
            tile_size=_both(slide.tile_size for slide in full),
            storage=_both(slide.storage for slide in full),
            source=", ".join(
                part.bag or part.path.rpartition("/")[2] or slide.path.name
                for part, slide in zip(self._parts_of(case), slides, strict=True)
            ),
            warnings=tuple(warnings),
        )

    def files(self, case: Case) -> tuple[Path, ...]:
        """See `Described.files`."""
        return tuple(self.path / part.path for part in self._parts_of(case))

    def tile_keys(self, case: Case) -> np.ndarray | None:
        """See `Keyed.tile_keys`: whole numbers, where a specimen has several slides."""
        numbers: list[np.ndarray] = []
        count = 0
        for slide in self._slides_of(case):
            mine = slide.slides()
            mine = np.zeros(slide.length, np.int64) if mine is None else mine
            numbers.append(mine + count)
            count += int(mine.max(initial=0)) + 1
        return keys_of_slides(np.concatenate(numbers)) if count > 1 else None

    def read(self, case: Case, rows: np.ndarray | None) -> Bag:
        """See `CaseStore.read`. DataErrors name file and specimen."""
        slides = self._slides_of(case)
        try:
            _check_one(slides)
            if len(slides) == 1:
                return _read(slides[0], rows)[0]
            return _joined(list(_pieces(slides, rows)))
        except DataError as error:
            _name(case, error)

    def text(self, case: Case) -> str | None:
        """None: reports come by --text-data-file."""
        return None


def _name(case: Case, error: DataError) -> NoReturn:
    """Raise the error again with the specimen in front."""
    raise DataError(f"specimen {case.specimen!r}: {error}") from error


def _both(values: Iterable[str | None]) -> str | None:
    """The distinct values that are known, joined."""
    return " and ".join(dict.fromkeys(v for v in values if v is not None)) or None


def _only(bags: OpenBags, part: Part) -> Slide:
    if part.bag is not None:
        if part.bag not in bags:
            raise DataError(f"{part.path} has no bag {part.bag!r} any more; it changed")
        return bags[part.bag]
    if len(bags) != 1:
        raise DataError(
            f"{part.path} holds {len(bags)} bags ({some(bags, 3)}), not one slide; give such a "
            "file by --hdf5_filename, or convert it with `slidevlm data convert`"
        )
    return next(iter(bags.values()))


def _check_one(slides: list[Slide]) -> None:
    """DataError where the slides of one specimen cannot be laid end to end."""
    full = [slide for slide in slides if slide.length]
    for slide in full[1:]:
        first = Likeness(full[0].width, full[0].unit, full[0].encoder)
        difference = first.difference(Likeness(slide.width, slide.unit, slide.encoder))
        if difference is not None:
            raise DataError(f"{slide.path} differs from {full[0].path}: {difference}")


def _read(slide: Slide, rows: np.ndarray | None) -> tuple[Bag, int]:
    """A bag of one file, and how many slides it has."""
    features, positions = slide.read(rows)
    numbers = slide.slides()
    if numbers is None:
        numbers = np.zeros(slide.length, np.int64)
    count = int(numbers.max()) + 1 if len(numbers) else 1
    return make_bag(features, positions, numbers, slide.unit, rows), count


def _pieces(slides: list[Slide], rows: np.ndarray | None) -> Iterator[tuple[Bag, int]]:
    """The bag of each slide that has rows, and the number of its first slide."""
    start = number = 0
    for slide in slides:
        stop = start + slide.length
        if rows is None:
            mine, wanted = None, slide.length > 0
        else:
            low, high = np.searchsorted(rows, (start, stop))
            mine, wanted = rows[low:high] - start, high > low
        if wanted:
            bag, count = _read(slide, mine)
            yield bag, number
        else:
            numbers = slide.slides()
            count = 1 if numbers is None or not len(numbers) else int(numbers.max()) + 1
        start, number = stop, number + count


def _joined(pieces: list[tuple[Bag, int]]) -> Bag:
    if not pieces:
        return Bag(torch.empty(0, 0), None, torch.empty(0, dtype=torch.int64), None)
    bags = [bag for bag, _ in pieces]
    kind = bags[0].features.dtype
    for bag in bags[1:]:
        kind = torch.promote_types(kind, bag.features.dtype)
    positions = [bag.positions for bag in bags if bag.positions is not None]
    centres = [bag.centres for bag in bags if bag.centres is not None]
    slides = [bag.slides + first for bag, first in pieces if bag.slides is not None]
    return Bag(
        torch.cat([bag.features.to(kind) for bag in bags]),
        torch.cat(positions) if positions else None,
        torch.cat(slides),
        bags[0].unit,
        torch.cat(centres) if centres else None,
    )


# -- listing -------------------------------------------------------------------------------


def _files(root: Path, *, in_order: bool = True) -> Iterator[str]:
    """Paths of feature files below `root`, relative to it; a zarr folder is one.

    Without order the first comes before its folder has been listed to the end.
    """
    known = extensions()
    left = [""]
    listing = Telling(f"listing {root}")
    while left:
        below = left.pop()
        folders = []
        try:
            with os.scandir(root / below) as found:
                entries: Iterable[os.DirEntry[str]] = listing.over(found)
                if in_order:
                    entries = sorted(entries, key=lambda entry: entry.name)
                for entry in entries:
                    name, lower = entry.name, entry.name.lower()
                    if name.startswith(".") or lower.endswith(_SIDECARS):
                        continue
                    if entry.is_dir():
                        if lower.endswith(".zarr"):
                            yield f"{below}{name}"
                        elif lower not in _NOT_FEATURES:
                            folders.append(f"{below}{name}/")
                    elif lower.endswith(known) and not lower.endswith(".zarr"):
                        yield f"{below}{name}"
        except OSError as error:
            raise DataError(f"{root / below} cannot be listed: {error.strerror}") from error
        left.extend(reversed(folders))


def _slides(root: Path) -> dict[str, list[Part]]:
    """Slides by name. Only a sample of the files is opened, to see whether they hold several."""
    paths = list(_files(root))
    slides: dict[str, list[Part]] = {}
    if any(_several(root / path) for path in paths[:: max(1, -(-len(paths) // _SAMPLE))]):
        for path in telling(paths, f"opening the files of {root}", len(paths)):
            for name, parts in _slides_of_file(root / path, path).items():
                slides.setdefault(name, []).extend(parts)
        return slides
    for path in paths:
        slides.setdefault(bag_name(path.rpartition("/")[2]), []).append(Part(path, None))
    return {name: _without_clam_twins(parts) for name, parts in slides.items()}


def _several(path: Path) -> bool:
    """Whether a file holds several bags; a damaged one is told of when it is used."""
    try:
        with open_bags(path) as bags:
            return len(bags) > 1
    except DataError:
        return False


def _slides_of_file(path: Path, name: str = "") -> dict[str, list[Part]]:
    """The slides of one file."""
    with open_bags(path) as bags:
        names = list(bags)
    if names == [bag_name(path.name)]:
        return {names[0]: [Part(name, None)]}
    return {bag: [Part(name, bag)] for bag in names}


def _without_clam_twins(parts: list[Part]) -> list[Part]:
    """CLAM writes a slide twice; its HDF5 has the coordinates."""
    folders = {part.path.rpartition("/")[0] for part in parts}
    return [
        part
        for part in parts
        if not (
            (folder := part.path.rpartition("/")[0]).endswith("pt_files")
            and f"{folder.removesuffix('pt_files')}h5_files" in folders
        )
    ]


def _one(name: str, parts: list[Part], root: Path) -> Part:
    if len(parts) > 1:
        raise DataError(
            f"{root}: slide {name!r} is there as {' and as '.join(map(str, parts[:4]))}; give the "
            "folder of one encoder and one form, or a --slide-table with paths"
        )
    return parts[0]


class _Finder:
    """Finds the file of a slide as a table writes it: a path, or a name without or with it."""

    def __init__(self, slides: dict[str, list[Part]], root: Path) -> None:
        self._slides = slides
        self._root = root
        self._paths = {str(part): part for parts in slides.values() for part in parts}

    def __call__(self, written: str) -> Part | None:
        path = written.replace("\\", "/").removeprefix("./")
        if path in self._paths:
            return self._paths[path]
        folder, _, name = path.rpartition("/")
        for candidate in (name, bag_name(name), _without_image_extension(name)):
            parts = self._slides.get(candidate, [])
            # A table may name the picture with its path; then only the name counts.
            near = [part for part in parts if part.path.rpartition("/")[0] == folder]
            if near or parts:
                return _one(candidate, near or parts, self._root)
        return None


def _without_image_extension(name: str) -> str:
    lower = name.lower()
    return next((name[: -len(e)] for e in IMAGE_EXTENSIONS if lower.endswith(e)), name)
