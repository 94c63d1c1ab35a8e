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

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.data.cases import Bag, Case, Facts, keys_of_slides, make_bag, unique_cases
from slidevlm.data.formats import FOLDERS
from slidevlm.data.formats.torch_files import TileParts, load, tile_parts
from slidevlm.data.reports import read_utf8
from slidevlm.data.slide_table import SlideRow
from slidevlm.documents import is_file_name, json_of
from slidevlm.errors import ConfigError, DataError

_INDEX = "feature_information.txt"


@FOLDERS.register("case_folders")
class CaseFolders:
    """A `CaseStore` over a folder of case folders; it has no texts of its own."""

    description = f"data_*/{_INDEX} with data_*/extracted_features/*.pth"

    def __init__(self, root: Path, slide_table: Sequence[SlideRow] | None = None) -> None:
        if slide_table is not None:
            raise ConfigError(
                f"--slide-table: {root} is of the form {self.description}, which names its "
                "specimens itself; leave the table out"
            )
        self.path = root
        self.cases = unique_cases(
            [entry for index in _indices(root) for entry in _entries(index)], root
        )
        self._last: TileParts | None = None
        self._last_location = ""

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
        return len(self._tiles(case).row_slides())

    def read(self, case: Case, rows: np.ndarray | None) -> Bag:
        """See `CaseStore.read`."""
        tiles = self._tiles(case)
        features = tiles.rows().read(rows)
        positions = tiles.row_positions()
        unit = None if positions is None else "px"
        return make_bag(features, positions, tiles.row_slides(), unit, rows)

    def facts(self, case: Case) -> Facts:
        """See `Described.facts`."""
        tiles = self._tiles(case)
        return Facts(
            format="case folders",
            dtype=tiles.rows().dtype,
            unit=None if tiles.positions is None else "px",
            source=Path(case.location).name,
        )

    def files(self, case: Case) -> tuple[Path, ...]:
        """See `Described.files`."""
        return (Path(case.location),)

    def tile_keys(self, case: Case) -> np.ndarray | None:
        """See `Keyed.tile_keys`: whole numbers, where a specimen has several slides."""
        slides = self._tiles(case).row_slides()
        return keys_of_slides(slides) if slides.any() else None

    def text(self, case: Case) -> str | None:
        """None: reports come by --text-data-file."""
        return None

    def _tiles(self, case: Case) -> TileParts:
        """The specimen's file; the last one is kept, as its length is asked before its rows."""
        if self._last is None or self._last_location != case.location:
            self._last = _load(Path(case.location), case)
            self._last_location = case.location
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
            described = json_of(info)
            patient, specimen = str(described["patient"]), str(described["specimen"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{index}, line {number}: {info!r:.120} is not a JSON object with 'patient' and "
                f"'specimen' ({error!r})"
            ) from error
        if not file.endswith(".pth") or not is_file_name(file):
            raise DataError(
                f"{index}, line {number + 1}: {name!r:.120} is not the name of a .pth file in "
                "extracted_features"
            )
        yield patient, specimen, str(index.parent / "extracted_features" / file)


def _load(path: Path, case: Case) -> TileParts:
    """Map a .pth file and list its tiles; DataError when it has another form."""
    owner = f"{path} of specimen {case.specimen!r}"
    if not path.is_file():
        raise DataError(
            f"no feature file {owner}; restore it or remove the specimen from the split"
        )
    return tile_parts(load(path, owner), owner)
