"""What a file or a folder of features is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.data.cases import Case, CaseStore, Facts
from slidevlm.data.formats.slides import Slide, open_bags
from slidevlm.data.scan import facts_of
from slidevlm.errors import DataError

LOOKED_AT = 1000  # bags at most, spread over all; a cohort of any size answers in seconds


@dataclass(frozen=True)
class BagRow:
    """One bag: N tiles of D features."""

    name: str
    length: int | None  # None where it could not be read
    width: int | None
    facts: Facts
    problem: str | None = None


@dataclass(frozen=True)
class Inspection:
    """What is at a path."""

    path: str
    kind: str  # "file" or "folder"
    formats: Mapping[str, int]  # format -> bags looked at
    bags: int
    specimens: int | None  # None where a file does not divide its bags into specimens
    patients: int | None
    rows: tuple[BagRow, ...]  # of the bags looked at
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a case layout

    def values(self, what: str) -> dict[str, int]:
        """How many bags have which value of a fact; None left out."""
        found = Counter(str(v) for r in self.rows if (v := asdict(r.facts)[what]) is not None)
        return dict(found.most_common())

    @property
    def widths(self) -> dict[str, int]:
        """How many bags have which width D; empty bags may not tell it."""
        return dict(Counter(str(r.width) for r in self.rows if r.width).most_common())

    @property
    def lengths(self) -> list[int]:
        """N of each bag that could be read."""
        return [row.length for row in self.rows if row.length is not None]

    @property
    def warnings(self) -> dict[str, list[str]]:
        """Warning -> the bags it is about."""
        found: dict[str, list[str]] = defaultdict(list)
        for row in self.rows:
            for text in row.facts.warnings:
                found[text].append(row.name)
            if row.problem is not None:
                found[row.problem].append(row.name)
            elif row.length == 0:
                found["no tile"].append(row.name)
        for what, values in (
            ("feature width", self.widths),
            ("tile encoder", self.values("encoder")),
            ("unit of positions", self.values("unit")),
        ):
            if len(values) > 1 and len(self.attributes.get("features", ())) < 2:
                parts = "; ".join(f"{value}: {count}" for value, count in values.items())
                found[f"the bags differ in {what}: {parts}"] = []
        return dict(found)

    @property
    def hints(self) -> list[str]:
        """What would make it better."""
        slow = [text for text in self.values("storage") if _is_slow(text)]
        found = []
        if slow:
            found.append(
                f"few rows of many are slow to read from {slow[0]}; `slidevlm data convert` "
                "writes a file of which they are cheap"
            )
        wide = [name for name in self.values("dtype") if name in ("float32", "float64")]
        if wide:
            found.append(
                f"{wide[0]} takes {'twice' if wide[0] == 'float32' else 'four times'} the space "
                "and time of float16, which `slidevlm data convert` writes"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "widths": self.widths,
            "tiles": sum(self.lengths),
            "warnings": self.warnings,
            "hints": self.hints,
        }


def _is_slow(storage: str) -> bool:
    """Whether reading a row costs much more than the row: a large or compressed chunk."""
    if not storage.startswith("chunks of "):
        return False
    return ", " in storage or int(storage.split()[2]) > 64


def inspect_file(path: Path) -> Inspection:
    """A file of any known format; DataError where it is none."""
    attributes: dict[str, tuple[str, ...]] = {}
    specimens = patients = None
    with open_bags(path) as bags:
        rows = []
        for name in _spread(list(bags)):
            rows.append(_of_bag(name, bags))
    if any(row.facts.format == "case layout" for row in rows):
        from slidevlm.data.formats.hdf5_cases import attribute_names

        features, texts = attribute_names(path)
        attributes = {"features": features, "texts": texts}
        groups = [name.rpartition("/")[0] for name in bags]
        specimens = len(set(groups))
        patients = len({name.partition("/")[0] for name in groups})
    return Inspection(
        str(path), "file", _formats(rows), len(bags), specimens, patients, tuple(rows), attributes
    )


def _of_bag(name: str, bags: Mapping[str, Slide]) -> BagRow:
    try:
        bag = bags[name]
        facts = Facts(
            format=bag.format,
            dtype=bag.dtype,
            unit=bag.unit,
            encoder=bag.encoder,
            tile_size=bag.tile_size,
            storage=bag.storage,
            warnings=bag.warnings,
        )
        return BagRow(name, bag.length, bag.width or None, facts)
    except DataError as error:
        return BagRow(name, None, None, Facts(), str(error))


def inspect_store(store: CaseStore, path: Path) -> Inspection:
    """A folder, as training would see it: one bag a specimen."""
    rows = [_of_case(case, store) for case in _spread(list(store.cases))]
    return Inspection(
        str(path),
        "folder",
        _formats(rows),
        len(store.cases),
        len(store.cases),
        len({case.patient for case in store.cases}),
        tuple(rows),
    )


def _of_case(case: Case, store: CaseStore) -> BagRow:
    if not store.has_features(case):
        return BagRow(case.specimen, None, None, Facts(), "no features")
    try:
        length, facts = store.length(case), facts_of(store, case)
        width = None
        if length:
            width = store.read(case, np.zeros(1, np.int64)).features.shape[1]
        return BagRow(case.specimen, length, width, facts)
    except DataError as error:
        return BagRow(case.specimen, None, None, Facts(), str(error))


def _formats(rows: Iterable[BagRow]) -> dict[str, int]:
    return dict(Counter(row.facts.format or "unknown" for row in rows if row.problem is None))


def _spread(names: list[Any]) -> Iterator[Any]:
    """All of them, or `LOOKED_AT` at equal distances."""
    if len(names) <= LOOKED_AT:
        yield from names
        return
    for place in np.linspace(0, len(names) - 1, LOOKED_AT).astype(int):
        yield names[place]
