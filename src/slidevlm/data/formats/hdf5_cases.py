"""Specimens in one HDF5 file, grouped by patient.

    /patients/<patient>/<specimen>/<feature attribute>/features    [N, D], [1, N, D] or [N, S, D]
                                                      /positions   [N, 2], optional, with `unit`
                                                      /tile_keys   [N] strings, optional
                                  /<text attribute>                one string, optional
    /case-index/case_ids, case_paths                               [cases] strings, optional

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

import itertools
import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from slidevlm.data.cases import Bag, Case, make_bag, unique_cases
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


# A gap between two wanted rows smaller than this is read along: the disk reads whole pages.
_PAGE_BYTES = 4096
# HDF5 reads contiguous data well, but each of its calls costs 20 times a plain pread.
_HAS_PREAD = hasattr(os, "preadv")
_LINKS_FOLLOWED = 16


@dataclass(frozen=True)
class _Handle:
    """The open file of one process."""

    pid: int
    file: h5py.File
    raw: FileIO


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
        self._handle: _Handle | None = None
        self.cases = unique_cases(self._index(), self.path)
        first = self._first_with(feature_attribute, "features", "feature", self._feature_names)
        if text_attribute is not None:
            self._first_with(text_attribute, "", "text", self._text_names)
        self._default_unit = self._unit_of_file(first)

    # -- opening ---------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _open(self) -> h5py.File:
        """The file, opened by this process: a handle inherited by a fork is not shared."""
        if self._handle is not None and self._handle.pid == os.getpid():
            return self._handle.file
        if self._handle is not None:
            # Closes this process's copy. Left open, HDF5 would hand it out again.
            self.close()
        if not self.path.is_file():
            raise DataError(
                f"no HDF5 file {self.path}; check --hdf5_filename (looked in {Path.cwd()})"
            )
        try:
            file = h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be opened as HDF5 ({error}); it is damaged, cut short or no "
                "HDF5 file: copy or write it again, and check it with `h5ls`"
            ) from error
        self._handle = _Handle(os.getpid(), file, open(self.path, "rb", buffering=0))  # noqa: SIM115
        return file

    def close(self) -> None:
        """Close the file of this process; the next use opens it again."""
        if self._handle is not None:
            self._handle.file.close()
            self._handle.raw.close()
            self._handle = None

    def _object(self, path: str) -> h5py.Group | h5py.Dataset | None:
        """The object at an absolute path, or None. DataError where a link leaves the file."""
        file = self._open()
        done, left, followed = "", deque(path.split("/")), 0
        while left:
            name = left.popleft()
            if name in ("", "."):
                continue
            here = f"{done}/{name}"
            try:
                kind = file.id.links.get_info(here.encode()).type
            except (KeyError, RuntimeError):
                return None
            if kind == h5py.h5l.TYPE_SOFT and followed < _LINKS_FOLLOWED:
                target = file.get(here, getlink=True).path
                done = "" if target.startswith("/") else done
                left.extendleft(reversed(target.split("/")))
                followed += 1
            elif kind == h5py.h5l.TYPE_HARD:
                done = here
            else:
                raise DataError(
                    f"{self.path}: {here} is a link that leaves the file or never ends; only "
                    "data of the file itself is read: copy the linked data into it"
                )
        return file[done or "/"]

    def _dataset(self, path: str) -> h5py.Dataset | None:
        """The dataset at an absolute path, or None where nothing is."""
        found = self._object(path)
        if found is None:
            return None
        if not isinstance(found, h5py.Dataset):
            raise DataError(f"{self.path}: {path} is a group where a dataset is expected")
        if found.external is not None or found.is_virtual:
            raise DataError(
                f"{self.path}: {path} keeps its data in another file; only data of the file "
                "itself is read: write it again without external or virtual storage"
            )
        return found

    # -- the index -------------------------------------------------------------------------

    def _index(self) -> list[tuple[str, str, str]]:
        """(patient, specimen, path) of every case, from /case-index or else from the groups."""
        if self._object("/case-index") is None:
            return list(self._walk())
        ids = self._strings("/case-index/case_ids")
        paths = self._strings("/case-index/case_paths")
        if len(ids) != len(paths):
            raise DataError(
                f"{self.path}: /case-index has {len(ids)} case_ids and {len(paths)} case_paths; "
                "write both again, or delete /case-index to have it rebuilt"
            )
        found = []
        for specimen, path in zip(ids, paths, strict=True):
            parts = path.strip("/").split("/")
            if len(parts) != 3 or parts[0] != "patients":
                raise DataError(
                    f"{self.path}: case path {path!r} of {specimen!r} in /case-index is not "
                    "/patients/<patient>/<specimen>; correct it, or delete /case-index to have "
                    "it rebuilt"
                )
            found.append((parts[1], specimen, "/" + "/".join(parts)))
        return found

    def _walk(self) -> Iterator[tuple[str, str, str]]:
        patients = self._object("/patients")
        if not isinstance(patients, h5py.Group):
            raise DataError(
                f"{self.path} has neither /case-index nor /patients (it has: "
                f"{_listed(self._open())}); it is not in the case layout"
            )
        for patient in patients:
            group = self._object(f"/patients/{patient}")
            if isinstance(group, h5py.Group):
                for specimen in group:
                    path = f"/patients/{patient}/{specimen}"
                    if isinstance(self._object(path), h5py.Group):
                        yield patient, specimen, path

    def _strings(self, path: str) -> list[str]:
        dataset = self._dataset(path)
        if dataset is None:
            raise DataError(
                f"{self.path}: {path} is missing; delete /case-index to have it rebuilt"
            )
        return [_text(value, self.path, path) for value in np.ravel(dataset[()])]

    def _first_with(
        self, attribute: str, child: str, kind: str, names: Callable[[Case], list[str]]
    ) -> Case:
        """The first case that has `attribute`; else DataError with the names that exist."""
        suffix = f"/{child}" if child else ""
        for case in self.cases:
            if self._object(f"{case.location}/{attribute}{suffix}") is not None:
                return case
        existing = sorted({name for case in self.cases[:100] for name in names(case)})
        if not existing and not any(self._object(case.location) for case in self.cases[:100]):
            raise DataError(
                f"{self.path}: no case path of /case-index exists in the file, such as "
                f"{self.cases[0].location}; delete /case-index to have it rebuilt"
            )
        raise DataError(
            f"{self.path} has no {kind} attribute {attribute!r}; "
            f"--hdf5_{kind}_attribute can be: {', '.join(existing) or '(there is none)'}"
        )

    def _feature_names(self, case: Case) -> list[str]:
        group = self._object(case.location)
        names = list(group) if isinstance(group, h5py.Group) else []
        return [n for n in names if self._object(f"{case.location}/{n}/features") is not None]

    def _text_names(self, case: Case) -> list[str]:
        group = self._object(case.location)
        names = list(group) if isinstance(group, h5py.Group) else []
        return [n for n in names if isinstance(self._object(f"{case.location}/{n}"), h5py.Dataset)]

    def _unit_of_file(self, first: Case) -> str:
        """Unit of positions whose dataset names none."""
        root = self._open().attrs
        if "unit" in root:
            return self._checked_unit(root["unit"], "/")
        path = f"{first.location}/{self.feature_attribute}/positions"
        positions = self._dataset(path)
        if positions is not None and "unit" not in positions.attrs:
            log.warning(
                "%s: positions name no unit (attribute 'unit', 'um' or 'px', of %s); "
                "level-0 pixels are assumed",
                self.path,
                path,
            )
        return "px"

    def _checked_unit(self, value: Any, where: str) -> str:
        unit = _text(value, self.path, where)
        if unit not in UNITS:
            raise DataError(
                f"{self.path}: attribute unit of {where} is {unit!r}; make it 'um' "
                "(micrometres) or 'px' (level-0 pixels)"
            )
        return unit

    # -- reading ---------------------------------------------------------------------------

    def has_features(self, case: Case) -> bool:
        """Whether the features' dataset exists."""
        return self._object(f"{case.location}/{self.feature_attribute}/features") is not None

    def _features(self, case: Case) -> h5py.Dataset:
        path = f"{case.location}/{self.feature_attribute}/features"
        dataset = self._dataset(path)
        if dataset is None:
            if self._object(case.location) is None:
                raise DataError(
                    f"{self.path}: specimen {case.specimen!r} is in /case-index, but "
                    f"{case.location} does not exist; delete /case-index to have it rebuilt"
                )
            raise DataError(
                f"{self.path}: specimen {case.specimen!r} has no {path}; it has: "
                f"{', '.join(self._feature_names(case)) or '(no features)'}"
            )
        if dataset.ndim not in (2, 3):
            raise DataError(
                f"{self.path}: {path} has shape {dataset.shape}; write [N, D], [1, N, D] or "
                "[N, S, D]"
            )
        return dataset

    def length(self, case: Case) -> int:
        """Number of rows after flattening."""
        return int(np.prod(self._features(case).shape[:-1]))

    def width(self) -> int:
        """Width D of the features, from the first case that has any."""
        for case in self.cases:
            if self.has_features(case):
                return int(self._features(case).shape[-1])
        raise AssertionError("checked when the file was opened")

    def read(self, case: Case, rows: np.ndarray | None) -> Bag:
        """See `CaseStore.read`. DataError for damaged data, naming file and specimen."""
        dataset = self._features(case)
        total = int(np.prod(dataset.shape[:-1]))
        group = f"{case.location}/{self.feature_attribute}"
        try:
            features = self._rows(dataset, total, rows)
            slides = self._slides(f"{group}/tile_keys", dataset.shape, total)
            positions, unit = self._positions(f"{group}/positions", dataset.shape, total)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.path}: specimen {case.specimen!r} cannot be read ({error}); the file is "
                "damaged: copy or write it again"
            ) from error
        return make_bag(features, positions, slides, unit, rows)

    def text(self, case: Case) -> str | None:
        """The text dataset as written; None where the specimen has none or none was asked for."""
        if self.text_attribute is None:
            return None
        path = f"{case.location}/{self.text_attribute}"
        dataset = self._dataset(path)
        if dataset is None:
            return None
        if dataset.size != 1:
            raise DataError(
                f"{self.path}: {path} has shape {dataset.shape}; a text attribute is one string"
            )
        return _text(np.ravel(dataset[()])[0], self.path, path)

    def _rows(self, dataset: h5py.Dataset, total: int, rows: np.ndarray | None) -> Tensor:
        """Rows of the flattened features: [K, D]."""
        assert rows is None or (np.all(np.diff(rows) > 0) and len(rows)), "rows strictly increase"
        kind, size = dataset.dtype.kind, dataset.dtype.itemsize
        if (kind, size) not in (("f", 2), ("f", 4), ("f", 8), ("u", 2), ("V", 2)):
            raise DataError(
                f"{self.path}: {dataset.name} has type {dataset.dtype}; write float16, float32, "
                "float64, or bfloat16 bits as uint16"
            )
        width = dataset.shape[-1]
        if total == 0:
            values = np.empty((0, width), dataset.dtype)
        elif (offset := _plain_offset(dataset)) is not None:
            values = self._pread(dataset, offset, total, rows)
        else:
            values = self._slices(dataset, total, rows)
        if kind == "f":
            native = values.astype(np.float32 if size == 8 else f"=f{size}", copy=False)
            return torch.from_numpy(native)
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)

    def _pread(
        self, dataset: h5py.Dataset, offset: int, total: int, rows: np.ndarray | None
    ) -> np.ndarray:
        """Contiguous data, straight from the file: [N, S, D] is [N * S, D] there already."""
        values = np.empty((total if rows is None else len(rows), dataset.shape[-1]), dataset.dtype)
        row_bytes = dataset.shape[-1] * dataset.dtype.itemsize
        if not row_bytes:
            return values
        # V2 has no buffer format, bytes have.
        out = values.reshape(-1).view(np.uint8)
        if rows is None:
            self._read_bytes(out.data, offset)
            return values
        cuts = np.flatnonzero(np.diff(rows) > max(1, _PAGE_BYTES // row_bytes)) + 1
        edges = [0, *cuts.tolist(), len(rows)]
        starts, stops = rows[edges[:-1]].tolist(), (rows[np.array(edges[1:]) - 1] + 1).tolist()
        for first, last, start, stop in zip(edges[:-1], edges[1:], starts, stops, strict=True):
            target = out[first * row_bytes : last * row_bytes]
            if stop - start == last - first:
                self._read_bytes(target.data, offset + start * row_bytes)
            else:
                block = np.empty((stop - start, row_bytes), np.uint8)
                self._read_bytes(block.reshape(-1).data, offset + start * row_bytes)
                target.reshape(-1, row_bytes)[:] = block[rows[first:last] - start]
        return values

    def _read_bytes(self, target: memoryview, offset: int) -> None:
        """Fill `target` from the file at `offset`; one read may return less than asked."""
        assert self._handle is not None
        done = 0
        while done < len(target):
            count = os.preadv(self._handle.raw.fileno(), [target[done:]], offset + done)
            if count == 0:
                raise OSError(f"file ends at byte {offset + done}")
            done += count

    def _slices(self, dataset: h5py.Dataset, total: int, rows: np.ndarray | None) -> np.ndarray:
        """Chunked or compressed data, through HDF5: one slice for each chunk that is touched."""
        width = dataset.shape[-1]
        if dataset.ndim == 2:
            axis, per_step = 0, 1
        elif dataset.shape[0] == 1:
            axis, per_step = 1, 1
        else:
            axis, per_step = 0, dataset.shape[1]

        def read(start: int, stop: int) -> np.ndarray:
            first, last = start // per_step, -(-stop // per_step)
            block = self._read_slice(dataset, axis, first, last).reshape(-1, width)
            return block[start - first * per_step : stop - first * per_step]

        if rows is None:
            return read(0, total)
        if dataset.chunks is not None:
            run = dataset.chunks[axis] * per_step
            cuts = np.flatnonzero(np.diff(rows // run)) + 1
        else:
            cuts = np.flatnonzero(np.diff(rows // per_step) > 1) + 1
        return _gather(rows, cuts, read, width, dataset.dtype)

    def _read_slice(self, dataset: h5py.Dataset, axis: int, start: int, stop: int) -> np.ndarray:
        values: np.ndarray = dataset[start:stop] if axis == 0 else dataset[:, start:stop]
        return values

    def _positions(
        self, path: str, shape: tuple[int, ...], total: int
    ) -> tuple[np.ndarray | None, str | None]:
        """Positions of all rows [N, 2] and their unit; None, None where there are none."""
        dataset = self._dataset(path)
        if dataset is None:
            return None, None
        if dataset.ndim < 2 or dataset.shape[-1] < 2 or dataset.dtype.kind not in "fiu":
            raise DataError(
                f"{self.path}: {path} has shape {dataset.shape} and type {dataset.dtype}; write "
                "[N, 2] numbers, x and y"
            )
        positions = dataset[()].reshape(-1, dataset.shape[-1])[:, :2].astype(np.float64)
        positions = self._for_each_row(positions, path, shape, total)
        bad = int((~np.isfinite(positions)).any(axis=1).sum())
        if bad:
            raise DataError(
                f"{self.path}: {bad} of {total} rows of {path} are not finite; write them again"
            )
        if "unit" in dataset.attrs:
            return positions, self._checked_unit(dataset.attrs["unit"], path)
        return positions, self._default_unit

    def _slides(self, path: str, shape: tuple[int, ...], total: int) -> np.ndarray:
        """[N] int64: index of each row's slide, in order of appearance."""
        dataset = self._dataset(path)
        if dataset is None or total == 0:
            return np.zeros(total, np.int64)
        keys = dataset[()]
        if keys.dtype.kind in "iu" and keys.ndim == 2 and keys.shape[1] == 4:
            slides = _numbered(keys[:, 1:2])
        elif keys.dtype.kind in "SO":
            slides = slides_of_keys(keys.reshape(-1))
        else:
            raise DataError(
                f"{self.path}: {path} has type {keys.dtype} and shape {keys.shape}; write [N] "
                "strings '<slide>/<tile>' or '(specimen, slide, section, tile)'"
            )
        return self._for_each_row(slides, path, shape, total)

    def _for_each_row(
        self, values: np.ndarray, path: str, shape: tuple[int, ...], total: int
    ) -> np.ndarray:
        """Repeat what is given for each tile of [N, S, D] for each of its S rows."""
        if len(values) == total:
            return values
        if len(shape) == 3 and len(values) == shape[0]:
            return np.repeat(values, shape[1], axis=0)
        raise DataError(
            f"{self.path}: {path} has {len(values)} rows, the features {total} (shape {shape}); "
            "they must agree: write both again"
        )


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
    slashes = letters == ord("/")
    if slashes.any(axis=1).all():
        after = np.cumsum(slashes[:, ::-1], axis=1, dtype=np.int16)[
            :, ::-1
        ]  # slashes from here to the end
        return _numbered(np.where(after > 0, letters, 0))
    commas = np.cumsum(letters == ord(","), axis=1, dtype=np.int16)
    if (letters[:, 0] == ord("(")).all() and (commas[:, -1] == 3).all():
        return _numbered(np.where(commas < 2, letters, 0))
    return np.zeros(len(keys), np.int64)


def _numbered(rows: np.ndarray) -> np.ndarray:
    """Number equal rows by first appearance: [N, K] -> [N] int64."""
    # Tiles of a slide follow each other nearly always, so only the first of each run is looked up.
    starts = np.flatnonzero(np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)]))
    numbers: dict[bytes, int] = {}
    heads = [numbers.setdefault(rows[start].tobytes(), len(numbers)) for start in starts]
    return np.repeat(np.array(heads, np.int64), np.diff([*starts.tolist(), len(rows)]))


def _plain_offset(dataset: h5py.Dataset) -> int | None:
    """Byte offset of contiguous, unconverted data in the file; None where HDF5 must read it."""
    offset: int | None = dataset.id.get_offset()
    if not _HAS_PREAD or offset is None or dataset.file.userblock_size:
        return None
    same_type = dataset.id.get_type() == h5py.h5t.py_create(dataset.dtype)
    return offset if same_type else None


def _gather(
    rows: np.ndarray,
    cuts: np.ndarray,
    read: Callable[[int, int], np.ndarray],
    width: int,
    dtype: np.dtype[Any],
) -> np.ndarray:
    """Rows [K, width] by one read for each run of rows between `cuts`."""
    values = np.empty((len(rows), width), dtype)
    edges = [0, *cuts.tolist(), len(rows)]
    for first, last in itertools.pairwise(edges):
        start, stop = int(rows[first]), int(rows[last - 1]) + 1
        block = read(start, stop)
        values[first:last] = (
            block if len(block) == last - first else block[rows[first:last] - start]
        )
    return values


def _text(value: Any, path: Path, where: str) -> str:
    """A string of the file as str; HDF5 strings are UTF-8 or ASCII bytes."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise DataError(f"{path}: {where} holds {type(value).__name__}, not a string")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: {where} is not UTF-8 ({error.reason} at byte {error.start}); write the "
            "text as UTF-8"
        ) from error


def _listed(group: h5py.Group) -> str:
    return ", ".join(list(group)[:10]) or "nothing"
