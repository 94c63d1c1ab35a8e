"""Specimens in one HDF5 file, grouped by patient.

    /patients/<patient>/<specimen>/<feature attribute>/features    [N, D], [1, N, D] or [N, S, D]
                                                      /positions   [N, 2], optional, with `unit`
                                                      /tile_keys   [N] strings, optional
                                  /<text attribute>                one string, optional
    /case-index/case_ids, case_paths                               [cases] strings, optional
               /checksums                                          see hdf5_target, optional

`features` are float16, float32, float64, or bfloat16. bfloat16 is taken from its bits: a
dataset of 2-byte unsigned integers or of 2-byte opaque values holds bfloat16 bits, always, as
features are never integers. (A custom 16-bit HDF5 float type is converted by HDF5 to float32.)
`[N, S, D]` (S sub-tiles a tile) and `[1, N, D]` are flattened to rows `[N * S, D]`; positions and
tile keys may be given for each row or for each tile, and are repeated then.

`positions` are x, y (further columns are ignored) in the unit named by the dataset's attribute
`unit`, else by the root's: "um" or "px". Files that name none are taken as "px", with a warning.

`tile_keys` name slides as "<slide>/<tile>", as "(specimen, slide, section, tile)", or as
integers [N, 4] of that meaning; other keys put all rows on one slide.

Nothing outside the file is ever opened: external links, external storage and virtual datasets
are refused.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from slidevlm.data.cases import Bag, Case, Facts, make_bag, unique_cases
from slidevlm.data.formats.hdf5 import Hdf5File, Hdf5Rows, positions_of_rows, storage_text, text
from slidevlm.data.formats.hdf5_target import texts_checksum, tiles_checksum
from slidevlm.data.formats.rows import damage, dtype_name, flat_shape, for_each_row
from slidevlm.data.formats.slides import (
    FORMATS,
    HDF5_EXTENSIONS,
    OpenBags,
    Slide,
    SlideFormat,
    Source,
)
from slidevlm.data.telling import telling
from slidevlm.errors import DataError

log = logging.getLogger("slidevlm.data")

UNITS = ("um", "px")


class CaseWriter:
    """Write an HDF5 case file; it appears under its name only when it is whole.

    Use as a context manager. Everything goes to a temporary file in the same folder, which is
    renamed over `path` at a successful exit and removed after an exception. Datasets are
    contiguous, because chunks make reading sorted rows ten times slower.

    `attributes` are written to the root of the file; `attributes["unit"]`, "um" or "px", is the
    unit of all positions and is required as soon as positions are added.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        feature_attribute: str,
        text_attribute: str = "report",
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.feature_attribute = _name(feature_attribute, "feature attribute")
        self.text_attribute = _name(text_attribute, "text attribute")
        if feature_attribute == text_attribute:
            raise DataError(
                f"feature and text attribute are both {text_attribute!r}; give them two names"
            )
        self.attributes = dict(attributes or {})
        if "unit" in self.attributes and self.attributes["unit"] not in UNITS:
            raise DataError(
                f"unit {self.attributes['unit']!r} of {self.path}; write positions in 'um' "
                "(micrometres) or 'px' (level-0 pixels)"
            )
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        self._file: h5py.File | None = None
        self._ids: list[str] = []
        self._paths: list[str] = []

    def __enter__(self) -> CaseWriter:
        try:
            self._file = h5py.File(self._temporary, "w", libver=("v110", "latest"))
        except OSError as error:
            raise DataError(
                f"cannot write {self.path}: {error}; choose a folder that exists and is writable"
            ) from error
        self._file.attrs.update(self.attributes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                strings = h5py.string_dtype()
                index = self._file.create_group("case-index")
                index.create_dataset("case_ids", data=np.array(self._ids, object), dtype=strings)
                index.create_dataset(
                    "case_paths", data=np.array(self._paths, object), dtype=strings
                )
            self._file.close()
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            self._file = None
            self._temporary.unlink(missing_ok=True)

    def add(
        self,
        patient: str,
        specimen: str,
        features: np.ndarray,
        report: str | None,
        positions: np.ndarray | None = None,
        tile_keys: Sequence[str] | None = None,
    ) -> None:
        """Append one specimen.

        `features` [N, D] float16, float32 or float64 (or bfloat16 bits as uint16), `positions`
        [N, 2] in the file's unit, `tile_keys` N strings `"<slide>/<number>"`. DataError when the
        lengths differ, the specimen is already there, or positions come without a unit.
        """
        assert self._file is not None, "CaseWriter.add is used inside `with`"
        path = f"/patients/{_name(patient, 'patient')}/{_name(specimen, 'specimen')}"
        if path in self._file:
            raise DataError(f"{path} is added twice to {self.path}; specimens must be unique")
        if features.ndim != 2:
            raise DataError(f"features of {path} have shape {features.shape}; give [N, D]")
        rows = len(features)
        if positions is not None:
            if "unit" not in self.attributes:
                raise DataError(
                    f"positions of {path} without a unit; pass attributes={{'unit': 'um'}} or 'px'"
                )
            if positions.shape != (rows, 2):
                raise DataError(
                    f"positions of {path} have shape {positions.shape}; give [{rows}, 2]"
                )
        if tile_keys is not None and len(tile_keys) != rows:
            raise DataError(f"{path}: {len(tile_keys)} tile keys for {rows} rows of features")
        group = self._file.create_group(f"{path}/{self.feature_attribute}")
        group.create_dataset("features", data=features)
        if positions is not None:
            dataset = group.create_dataset("positions", data=np.asarray(positions, np.float32))
            dataset.attrs["unit"] = self.attributes["unit"]
        if tile_keys is not None:
            # Fixed length strings: one read for all of them, no heap look-up for each.
            group.create_dataset("tile_keys", data=np.array([k.encode() for k in tile_keys], "S"))
        if report is not None:
            self._file[path].create_dataset(
                self.text_attribute, data=report, dtype=h5py.string_dtype()
            )
        self._ids.append(specimen)
        self._paths.append(path)


def _name(name: str, role: str) -> str:
    """A name that can be one HDF5 path component."""
    if not name or "/" in name or name in (".", "..") or "\0" in name:
        raise DataError(f"{role} {name!r} cannot name an HDF5 group; use no '/' and no empty name")
    return name


class Hdf5Cases:
    """A `CaseStore` over one HDF5 case file.

    Opening reads the index and looks at specimens until one has the attributes asked for, which
    in a sound file is the first. DataError: file missing, damaged, or without the attributes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        feature_attribute: str,
        text_attribute: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.feature_attribute = feature_attribute
        self.text_attribute = text_attribute
        self._file = Hdf5File(self.path, "check --hdf5_filename")
        self.cases = unique_cases(case_index(self._file), self.path)
        first = self._first_with(feature_attribute, "features", "feature", self._feature_names)
        if text_attribute is not None:
            self._first_with(text_attribute, "", "text", self._text_names)
        self._default_unit = self._unit_of_file(first)
        self._sums: dict[str, tuple[str, str]] | None = None

    def close(self) -> None:
        """Close the file of this process; the next use opens it again."""
        self._file.close()

    # -- the index -------------------------------------------------------------------------

    def _first_with(
        self, attribute: str, child: str, kind: str, names: Callable[[Case], list[str]]
    ) -> Case:
        """The first case that has `attribute`; else DataError with the names that exist."""
        suffix = f"/{child}" if child else ""
        looking = f"looking for {attribute} in {self.path}"
        for case in telling(self.cases, looking, len(self.cases)):
            found = self._file.object(f"{case.location}/{attribute}{suffix}")
            if found is not None and (child or _is_text(found)):
                return case
        existing = sorted({name for case in self.cases[:100] for name in names(case)})
        if not existing and not any(self._file.object(case.location) for case in self.cases[:100]):
            raise DataError(
                f"{self.path}: no case path of /case-index exists in the file, such as "
                f"{self.cases[0].location}; delete /case-index to have it rebuilt"
            )
        raise DataError(
            f"{self.path} has no {kind} attribute {attribute!r}; "
            f"--hdf5_{kind}_attribute can be: {', '.join(existing) or '(there is none)'}"
        )

    def _feature_names(self, case: Case) -> list[str]:
        names = self._file.names(case.location)
        return [n for n in names if self._file.object(f"{case.location}/{n}/features") is not None]

    def _text_names(self, case: Case) -> list[str]:
        names = self._file.names(case.location)
        return [n for n in names if _is_text(self._file.object(f"{case.location}/{n}"))]

    def _unit_of_file(self, first: Case) -> str:
        """Unit of positions whose dataset names none."""
        if (unit := self._file.attribute("/", "unit")) is not None:
            return _checked_unit(unit, self.path, "/")
        path = f"{first.location}/{self.feature_attribute}/positions"
        if self._file.dataset(path) is not None and self._file.attribute(path, "unit") is None:
            log.warning(
                "%s: positions name no unit (attribute 'unit', 'um' or 'px', of %s); "
                "level-0 pixels are assumed",
                self.path,
                path,
            )
        return "px"

    # -- reading ---------------------------------------------------------------------------

    def has_features(self, case: Case) -> bool:
        """Whether the features' dataset exists."""
        return self._file.exists(f"{case.location}/{self.feature_attribute}/features")

    def _features(self, case: Case) -> h5py.Dataset:
        path = f"{case.location}/{self.feature_attribute}/features"
        dataset = self._file.dataset(path)
        if dataset is None:
            if self._file.object(case.location) is None:
                raise DataError(
                    f"{self.path}: specimen {case.specimen!r} is in /case-index, but "
                    f"{case.location} does not exist; delete /case-index to have it rebuilt"
                )
            raise DataError(
                f"{self.path}: specimen {case.specimen!r} has no {path}; it has: "
                f"{', '.join(self._feature_names(case)) or '(no features)'}"
            )
        return dataset

    def length(self, case: Case) -> int:
        """Number of rows after flattening."""
        with damage(self.path, f"specimen {case.specimen!r}"):
            dataset = self._features(case)
            return flat_shape(dataset.shape or (1,), self.path, dataset.name)[0]

    def read(self, case: Case, rows: np.ndarray | None) -> Bag:
        """See `CaseStore.read`. DataError for damaged data, naming file and specimen."""
        group = f"{case.location}/{self.feature_attribute}"
        with damage(self.path, f"specimen {case.specimen!r}"):
            dataset = self._features(case)
            shape = dataset.shape
            features = self._file.rows(dataset, rows)
            slides = _slides(self._file, f"{group}/tile_keys", shape)
            positions, unit = self._positions(f"{group}/positions", shape)
            return make_bag(features, positions, slides, unit, rows)

    def text(self, case: Case) -> str | None:
        """The text dataset as written; None where the specimen has none or none was asked for."""
        if self.text_attribute is None:
            return None
        return self._file.string(f"{case.location}/{self.text_attribute}")

    # -- what is told beside the features --------------------------------------------------

    def facts(self, case: Case) -> Facts:
        """See `Described.facts`; the feature attribute stands for an encoder that is not named."""
        group = f"{case.location}/{self.feature_attribute}"
        with damage(self.path, f"specimen {case.specimen!r}"):
            dataset = self._features(case)
            told = {
                name: None if value is None else str(value)
                for name in ("encoder", "tile_size", "source")
                for value in [self._file.attribute(group, name)]
            }
            return Facts(
                format="case layout",
                dtype=dtype_name(dataset.dtype, self.path, dataset.name),
                unit=self._unit(f"{group}/positions"),
                encoder=told["encoder"] or self.feature_attribute,
                tile_size=told["tile_size"],
                storage=storage_text(dataset),
                source=told["source"],
            )

    def files(self, case: Case) -> tuple[Path, ...]:
        """See `Described.files`."""
        return (self.path,)

    def tile_keys(self, case: Case) -> np.ndarray | None:
        """See `Keyed.tile_keys`: those of the file, for each row."""
        path = f"{case.location}/{self.feature_attribute}/tile_keys"
        with damage(self.path, f"specimen {case.specimen!r}"):
            dataset = self._file.dataset(path)
            if dataset is None:
                return None
            keys = self._file.values(dataset)
            if keys.dtype.kind == "O":
                keys = np.array([k.encode() if isinstance(k, str) else k for k in keys], "S")
            return for_each_row(keys, self._features(case).shape, self.path, path)

    def texts(self, case: Case) -> dict[str, str]:
        """Every text beside the features, by the name of its attribute."""
        found = {}
        for name in self._text_names(case):
            path = f"{case.location}/{name}"
            dataset = self._file.dataset(path)
            if dataset is not None and dataset.size == 1 and h5py.check_string_dtype(dataset.dtype):
                found[name] = self._file.string(path) or ""
        return found

    # -- checksums (see hdf5_target) -------------------------------------------------------

    def has_checksum(self, case: Case) -> bool:
        """See `Verified.has_checksum`."""
        return bool(self._checksums().get(case.location, ("", ""))[0])

    def damaged(self, case: Case, features: str) -> tuple[str, ...]:
        """See `Verified.damaged`: "tiles" (features, positions, keys) and "texts"."""
        tiles, texts = self._checksums()[case.location]
        group = f"{case.location}/{self.feature_attribute}"
        parts = []
        with damage(self.path, f"specimen {case.specimen!r}"):
            positions, keys = (
                None if dataset is None else self._file.values(dataset)
                for dataset in (
                    self._file.dataset(f"{group}/{name}") for name in ("positions", "tile_keys")
                )
            )
            if tiles_checksum(features, positions, self._unit(f"{group}/positions"), keys) != tiles:
                parts.append("tiles")
            if texts_checksum(self.texts(case)) != texts:
                parts.append("texts")
        return tuple(parts)

    def _checksums(self) -> dict[str, tuple[str, str]]:
        """Location -> checksums of tiles and texts; empty where the file has none."""
        if self._sums is None:
            self._sums = {}
            dataset = self._file.dataset("/case-index/checksums")
            if dataset is not None and self.feature_attribute == self._file.attribute(
                "/", "feature_attribute"
            ):
                with damage(self.path, dataset.name):
                    paths = _strings(self._file, "/case-index/case_paths")
                    sums = self._file.values(dataset).reshape(-1, 2)
                    self._sums = {
                        path: (bytes(tiles).decode("latin-1"), bytes(texts).decode("latin-1"))
                        for path, (tiles, texts) in zip(paths, sums, strict=True)
                    }
        return self._sums

    def _unit(self, positions: str) -> str | None:
        """Unit of a dataset of positions; None where there is none."""
        if self._file.dataset(positions) is None:
            return None
        unit = self._file.attribute(positions, "unit")
        return self._default_unit if unit is None else _checked_unit(unit, self.path, positions)

    def _positions(self, path: str, shape: tuple[int, ...]) -> tuple[np.ndarray | None, str | None]:
        """Positions of all rows [N, 2] and their unit; None, None where there are none."""
        positions = positions_of_rows(self._file, path, shape)
        if positions is None:
            return None, None
        return positions, self._unit(path)


def is_case_file(path: Path) -> bool:
    """Whether a file is in the case layout; DataError where it cannot be opened."""
    return _is_case_file(Source(path))


def attribute_names(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the feature attributes and of the text attributes of a file's first specimens.

    DataError where the file is not in the case layout.
    """
    file = Hdf5File(path)
    features, texts = set(), set()
    try:
        with damage(path, "the index"):
            for _, _, location in case_index(file)[:100]:
                for name in file.names(location):
                    here = file.object(f"{location}/{name}")
                    if file.object(f"{location}/{name}/features") is not None:
                        features.add(name)
                    elif _is_text(here):
                        texts.add(name)
    finally:
        file.close()
    return tuple(sorted(features)), tuple(sorted(texts))


def _is_text(found: Any) -> bool:
    return isinstance(found, h5py.Dataset) and h5py.check_string_dtype(found.dtype) is not None


def case_index(file: Hdf5File) -> list[tuple[str, str, str]]:
    """(patient, specimen, path) of every case, from /case-index or else from the groups."""
    if file.object("/case-index") is None:
        return list(_walk(file))
    ids = _strings(file, "/case-index/case_ids")
    paths = _strings(file, "/case-index/case_paths")
    if len(ids) != len(paths):
        raise DataError(
            f"{file.path}: /case-index has {len(ids)} case_ids and {len(paths)} case_paths; "
            "write both again, or delete /case-index to have it rebuilt"
        )
    found = []
    for specimen, path in zip(ids, paths, strict=True):
        parts = path.strip("/").split("/")
        if len(parts) != 3 or parts[0] != "patients":
            raise DataError(
                f"{file.path}: case path {path!r} of {specimen!r} in /case-index is not "
                "/patients/<patient>/<specimen>; correct it, or delete /case-index to have "
                "it rebuilt"
            )
        found.append((parts[1], specimen, "/" + "/".join(parts)))
    return found


def _walk(file: Hdf5File) -> Iterator[tuple[str, str, str]]:
    if not isinstance(file.object("/patients"), h5py.Group):
        raise DataError(
            f"{file.path} has neither /case-index nor /patients (it has: "
            f"{', '.join(file.names()[:10]) or 'nothing'}); it is not in the case layout"
        )
    patients = file.names("/patients")
    for patient in telling(patients, f"listing the patients of {file.path}", len(patients)):
        for specimen in file.names(f"/patients/{patient}"):
            path = f"/patients/{patient}/{specimen}"
            if isinstance(file.object(path), h5py.Group):
                yield patient, specimen, path


def _strings(file: Hdf5File, path: str) -> list[str]:
    dataset = file.dataset(path)
    if dataset is None:
        raise DataError(f"{file.path}: {path} is missing; delete /case-index to have it rebuilt")
    with damage(file.path, path):
        return [text(value, file.path, path) for value in np.ravel(file.values(dataset))]


def _checked_unit(value: Any, path: Path, where: str) -> str:
    unit = text(value, path, where)
    if unit not in UNITS:
        raise DataError(
            f"{path}: attribute unit of {where} is {unit!r}; make it 'um' (micrometres) or 'px' "
            "(level-0 pixels)"
        )
    return unit


def _slides(file: Hdf5File, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """[N] int64: index of each row's slide, in order of appearance."""
    total = flat_shape(shape, file.path, path)[0]
    dataset = file.dataset(path)
    if dataset is None or total == 0:
        return np.zeros(total, np.int64)
    keys = file.values(dataset)
    if keys.dtype.kind in "iu" and keys.ndim == 2 and keys.shape[1] == 4:
        slides = _numbered(keys[:, 1:2], np.ones(len(keys), np.int64))
    elif keys.dtype.kind in "SO":
        slides = slides_of_keys(keys.reshape(-1))
    else:
        raise DataError(
            f"{file.path}: {path} has type {keys.dtype} and shape {keys.shape}; write [N] "
            "strings '<slide>/<tile>' or '(specimen, slide, section, tile)'"
        )
    return for_each_row(slides, shape, file.path, path)


def slides_of_keys(keys: np.ndarray) -> np.ndarray:
    """Index of the slide that each tile key names: [N] strings -> [N] int64.

    "<slide>/<tile>" and "(specimen, slide, section, tile)" name slides; where any key has
    neither form, all rows are of slide 0. Works on bytes as a matrix, as 200,000 Python strings
    would take longer than reading the features.
    """
    if keys.dtype.kind == "O":
        keys = np.array([k.encode() if isinstance(k, str) else k for k in keys], "S")
    if keys.dtype.itemsize == 0:
        return np.zeros(len(keys), np.int64)
    letters = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), -1)  # [N, bytes]
    ends = _slide_ends(letters)
    return np.zeros(len(keys), np.int64) if ends is None else _numbered(letters, ends)


def _slide_ends(letters: np.ndarray) -> np.ndarray | None:
    """How many bytes of each key [N, bytes] name the slide: [N]; None where keys name none."""
    count, width = letters.shape
    # Found in one pass over all bytes; reductions of short rows would each take ten times as long.
    row, column = np.divmod(np.flatnonzero(letters == ord("/")), width)
    ends = np.zeros(count, np.int64)
    ends[row] = column + 1  # of several in a row, the last stays
    if ends.all():
        return ends
    row, column = np.divmod(np.flatnonzero(letters == ord(",")), width)
    if (letters[:, 0] == ord("(")).all() and np.array_equal(row, np.repeat(np.arange(count), 3)):
        return column[1::3]
    return None


def _numbered(rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Number rows equal up to `ends` by first appearance: [N, K], [N] -> [N] int64."""
    # Tiles of a slide follow each other nearly always, so only the first of each run is looked up.
    reach = int(ends.max())
    row, column = np.nonzero(rows[1:, :reach] != rows[:-1, :reach])
    changed = np.concatenate([[True], ends[1:] != ends[:-1]])
    changed[row[column < ends[1:][row]] + 1] = True
    starts = np.flatnonzero(changed)
    numbers: dict[bytes, int] = {}
    heads = [
        numbers.setdefault(rows[start, : ends[start]].tobytes(), len(numbers)) for start in starts
    ]
    return np.repeat(np.array(heads, np.int64), np.diff([*starts.tolist(), len(rows)]))


def _is_case_file(source: Source) -> bool:
    return source.hdf5 is not None and not {"case-index", "patients"}.isdisjoint(
        source.hdf5.names()
    )


def _case_bags(source: Source) -> OpenBags:
    """Bags by "<patient>/<specimen>/<feature attribute>"."""
    file = source.hdf5
    assert file is not None
    names = [
        f"{location.removeprefix('/patients/')}/{name}"
        for _, _, location in case_index(file)
        for name in file.names(location)
        if file.object(f"{location}/{name}/features") is not None
    ]

    def open_bag(name: str) -> Slide:
        group = f"/patients/{name}"
        rows = Hdf5Rows(file, f"{group}/features")
        positions = f"{group}/positions"
        there = file.dataset(positions) is not None
        unit = file.attribute(positions, "unit") or file.attribute("/", "unit")
        return Slide(
            "case layout",
            file.path,
            rows,
            unit=_checked_unit(unit or "px", file.path, positions) if there else None,
            encoder=file.attribute(group, "encoder") or name.rpartition("/")[2],
            tile_size=file.attribute(group, "tile_size"),
            warnings=("positions name no unit; level-0 pixels are assumed",)
            if there and unit is None
            else (),
            positions=lambda: positions_of_rows(file, positions, rows.full_shape),
            slide_numbers=lambda: _slides(file, f"{group}/tile_keys", rows.full_shape),
        )

    return OpenBags(names, open_bag, file.close)


FORMATS.register("case layout")(
    SlideFormat(
        0,
        "HDF5 with /case-index or /patients",
        HDF5_EXTENSIONS,
        _is_case_file,
        _case_bags,
    )
)
