"""What all specimens of a cohort must share: feature width, tile encoder, unit of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np

from slidevlm.data.cases import Case, CaseStore, Described
from slidevlm.errors import DataError

SAMPLE = 32  # specimens looked at before a run; the rest is held to them as it is read

_NAMES = {"width": "feature width", "unit": "unit of positions", "encoder": "tile encoder"}


@dataclass(frozen=True)
class Likeness:
    """What two specimens must have in common to be in one cohort."""

    width: int
    unit: str | None
    encoder: str | None  # None where it is not told, which contradicts nothing

    def difference(self, other: Likeness) -> str | None:
        """What `other` has otherwise, in words; None where the two go together."""
        for name, text in _NAMES.items():
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its and not (name == "encoder" and None in (mine, its)):
                return f"{text} {its} instead of {mine}"
        return None


@runtime_checkable
class Expecting(Protocol):
    """A store that can hold each file it opens to what the cohort is."""

    expected: Likeness | None


def likeness(store: CaseStore, case: Case) -> Likeness | None:
    """What `case` has, from one of its tiles; None where it has no tile."""
    if not store.length(case):
        return None
    tile = store.read(case, np.zeros(1, np.int64))
    encoder = store.facts(case).encoder if isinstance(store, Described) else None
    return Likeness(int(tile.features.shape[1]), tile.unit, encoder)


def hold_together(store: CaseStore, cases: Sequence[Case]) -> None:
    """Look at `SAMPLE` of the cases, evenly spread, and hold the store to what they share.

    DataError where they differ, counting each value and naming examples. Specimens that cannot
    be read are left to who reads them.
    """
    chosen = cases[:: max(1, -(-len(cases) // SAMPLE))]
    found: dict[str, Likeness] = {}
    for case in chosen:
        try:
            mine = likeness(store, case)
        except DataError:
            continue
        if mine is not None:
            found[case.specimen] = mine
    for field in fields(Likeness):
        _check_one(field.name, found, store)
    if found and isinstance(store, Expecting):
        first = next(iter(found.values()))
        encoder = next((one.encoder for one in found.values() if one.encoder is not None), None)
        store.expected = Likeness(first.width, first.unit, encoder)


def _check_one(name: str, found: dict[str, Likeness], store: CaseStore) -> None:
    groups: dict[object, list[str]] = {}
    for specimen, mine in found.items():
        groups.setdefault(getattr(mine, name), []).append(specimen)
    if name == "encoder":
        groups.pop(None, None)
    if len(groups) < 2:
        return
    parts = [
        f"{len(names)} have {value or 'none'} (such as {', '.join(names[:3])})"
        for value, names in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]
    raise DataError(
        f"{store.path}: the specimens do not share one {_NAMES[name]}: of {len(found)} looked at, "
        f"{'; '.join(parts)}; give one of them at a time (`slidevlm data check` counts all)"
    )
