"""Specimens as one .pth file each, in numbered folders (the layout of MOSAIC).

    <root>/data_*/feature_information.txt
                 /extracted_features/*.pth
    <root>_remainder/data_*/...            optional, of the same form

`feature_information.txt` has three lines a specimen: a JSON list of the slides' names, a JSON
object with "patient" and "specimen", and the name of the .pth file in quotes.

A .pth file holds `{component: {(specimen, slide, section, tile): {"feature": [S, D] or [D],
"position": [2 or more]}}}`. Component 0 is read, as MOSAIC does by default. Tiles of S sub-tiles
are flattened to S rows; positions (x, y first, repeated for sub-tiles) are taken as level-0
pixels, as the format names no unit. Files are mapped, not loaded, so only sampled rows are read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slidevlm.data.cases import Bag, Case, make_bag, unique_cases
from slidevlm.data.formats import FOLDERS
from slidevlm.data.reports import read_utf8
from slidevlm.errors import DataError

_COMPONENT = 0
_INDEX = "feature_information.txt"


@dataclass(frozen=True)
class _Tiles:
    """The parts of a file, still on disk: P of them, of S rows each."""

    location: str
    features: list[Tensor]  # P of [S, D]
    positions: np.ndarray | None  # [P, 2]
    slides: np.ndarray  # [P] int64


@FOLDERS.register("case_folders")
class CaseFolders:
    """A `CaseStore` over a folder of case folders; it has no texts of its own."""

    description = f"data_*/{_INDEX} with data_*/extracted_features/*.pth"

    def __init__(self, root: Path) -> None:
        self.path = root
        self.cases = unique_cases(
            [entry for index in _indices(root) for entry in _entries(index)], root
        )
        self._last: _Tiles | None = None

    @staticmethod
    def recognises(root: Path) -> bool:
        """Whether any index file is there."""
        return any(True for _ in _indices(root))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def has_features(self, case: Case) -> bool:
        """Whether the .pth file exists."""
        return Path(case.location).is_file()

    def length(self, case: Case) -> int:
        """Number of rows after flattening."""
        return sum(len(feature) for feature in self._tiles(case).features)

    def width(self) -> int:
        """Width D of the features, from the first case that has any."""
        for case in self.cases:
            if self.has_features(case) and (features := self._tiles(case).features):
                return int(features[0].shape[1])
        raise DataError(
            f"{self.path}: no .pth file named in {_INDEX} exists or holds tiles; looked for "
            f"{self.cases[0].location}"
        )

    def read(self, case: Case, rows: np.ndarray | None) -> Bag:
        """See `CaseStore.read`."""
        tiles = self._tiles(case)
        sizes = np.array([len(feature) for feature in tiles.features], np.int64)
        owner = np.repeat(np.arange(len(sizes)), sizes)  # [N] the part of each row
        positions = None if tiles.positions is None else tiles.positions[owner]
        slides = tiles.slides[owner]
        if rows is None:
            features = torch.cat(tiles.features) if tiles.features else torch.empty(0, 0)
        else:
            within = torch.from_numpy(rows - (np.cumsum(sizes) - sizes)[owner[rows]])
            parts, starts = np.unique(owner[rows], return_index=True)
            features = torch.cat(
                [
                    tiles.features[part][chosen]
                    for part, chosen in zip(
                        parts, torch.tensor_split(within, torch.from_numpy(starts[1:])), strict=True
                    )
                ]
            )
        if features.dtype == torch.float64:
            features = features.float()
        return make_bag(features, positions, slides, None if positions is None else "px", rows)

    def text(self, case: Case) -> str | None:
        """None: reports come by --text-data-file."""
        return None

    def _tiles(self, case: Case) -> _Tiles:
        """The specimen's file; the last one is kept, as its length is asked before its rows."""
        if self._last is None or self._last.location != case.location:
            self._last = _load(Path(case.location), case)
        return self._last


def _indices(root: Path) -> Iterator[Path]:
    root = root.absolute()
    for folder in (root, root.with_name(f"{root.name}_remainder")):
        yield from sorted(folder.glob(f"data_*/{_INDEX}"))


def _entries(index: Path) -> Iterator[tuple[str, str, str]]:
    """(patient, specimen, path of the .pth) of each three lines."""
    lines = [line.strip() for line in read_utf8(index).split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if len(numbered) % 3:
        raise DataError(
            f"{index} has {len(numbered)} lines, not three a specimen (slides, specimen, file); "
            "it is cut short or has another form"
        )
    for (_, _), (number, info), (_, name) in zip(
        numbered[0::3], numbered[1::3], numbered[2::3], strict=True
    ):
        file = name.strip("'\"")
        try:
            described = json.loads(info)
            patient, specimen = str(described["patient"]), str(described["specimen"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{index}, line {number}: {info!r:.120} is not a JSON object with 'patient' and "
                f"'specimen' ({error!r})"
            ) from error
        if not file.endswith(".pth") or Path(file).name != file:
            raise DataError(
                f"{index}, line {number + 1}: {name!r:.120} is not the name of a .pth file in "
                "extracted_features"
            )
        yield patient, specimen, str(index.parent / "extracted_features" / file)


def _load(path: Path, case: Case) -> _Tiles:
    """Map a .pth file and list its tiles; DataError when it has another form."""
    if not path.is_file():
        raise DataError(
            f"no feature file {path} of specimen {case.specimen!r}; restore it or remove the "
            "specimen from the split"
        )
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch raises whatever the damage leads its unpickler to
        raise DataError(
            f"{path} of specimen {case.specimen!r} cannot be read ({error}); it must hold plain "
            "tensors, dictionaries and tuples, saved by torch.save"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(_COMPONENT), dict):
        held = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} of specimen {case.specimen!r} has no component {_COMPONENT} (a dictionary of "
            f"tiles); it holds {held}"
        )
    features, positions, slides = [], [], []
    for key, tile in content[_COMPONENT].items():
        try:
            feature = tile["feature"]
            features.append(feature.reshape(-1, feature.shape[-1]))
            slides.append(int(key[1]))
            if "position" in tile:
                positions.append([float(value) for value in tile["position"]][:2])
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise DataError(
                f"{path} of specimen {case.specimen!r}, tile {key!r}: not of the form (specimen, "
                f"slide, section, tile): {{'feature': tensor, 'position': tensor}} ({error!r})"
            ) from error
    if len({feature.shape[1] for feature in features}) > 1:
        raise DataError(f"{path} of specimen {case.specimen!r} has tiles of different widths")
    if positions and (len(positions) != len(features) or min(map(len, positions)) < 2):
        raise DataError(
            f"{path} of specimen {case.specimen!r}: {len(positions)} of {len(features)} tiles have "
            "a position, or some have less than two numbers; give x and y for all or none"
        )
    _, order = np.unique(np.array(slides, np.int64), return_inverse=True)
    return _Tiles(
        str(path),
        features,
        np.array(positions, np.float64) if positions else None,
        order.astype(np.int64),
    )
