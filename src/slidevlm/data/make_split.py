"""Dividing a cohort into splits: whole patients or sites, classes in proportion, by a seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slidevlm.data.cases import Case
from slidevlm.data.reports import value_of
from slidevlm.data.sampling import generator
from slidevlm.errors import ConfigError, DataError

NO_CLASS = "(no label)"
_TCGA = re.compile(r"TCGA-([A-Z0-9]{2})-", re.IGNORECASE)
_PASSES = 20  # of the improvement; it settles in three or four


@dataclass(frozen=True)
class Division:
    """The specimens of each split, in the order of the cohort, and what balance was reached."""

    names: tuple[str, ...]  # S splits
    specimens: tuple[tuple[str, ...], ...]  # S
    groups: tuple[int, ...]  # S: groups in each
    classes: tuple[str, ...]  # C, sorted
    counts: np.ndarray  # [S, C] specimens


def divide(
    cases: Sequence[Case],
    names: Sequence[str],
    fractions: Sequence[float],
    *,
    classes: Mapping[str, str] | None = None,
    sites: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Division:
    """Put every patient (or site) wholly into one split, with the classes in proportion.

    The same arguments give the same division, whatever the order of `cases`.

    Args:
        names: of the S splits.
        fractions: share of the specimens each split should get, above 0, of sum 1.
        classes: specimen, or "<patient>/<specimen>", -> class; specimens it lacks are a class of
            their own. None: no classes.
        sites: patient -> site, which then is not divided either. None: patients are the groups.

    Raises:
        ConfigError: fractions that are none.
        DataError: fewer groups than splits.
    """
    _check_fractions(names, fractions)
    groups = _groups(cases, sites)
    kinds = [_class_of(case, classes or {}) for case in cases]
    known = tuple(sorted(set(kinds)))
    keys = sorted(set(groups))
    if len(keys) < len(names):
        what = "patients" if sites is None else "sites"
        raise DataError(
            f"{len(keys)} {what} cannot fill {len(names)} splits; give fewer --fractions"
            + ("" if sites is None else " or divide by patient alone")
        )
    number = {key: i for i, key in enumerate(keys)}
    column = {kind: i for i, kind in enumerate(known)}
    members = np.zeros((len(keys), len(known)), np.int64)  # [G, C] specimens
    for group, kind in zip(groups, kinds, strict=True):
        members[number[group], column[kind]] += 1
    order = generator("split", seed).permutation(len(keys))
    chosen = np.empty(len(keys), np.int64)
    chosen[order] = assign(members[order], np.asarray(fractions, np.float64))
    split_of = [int(chosen[number[group]]) for group in groups]
    return Division(
        tuple(names),
        tuple(
            tuple(c.specimen for c, its in zip(cases, split_of, strict=True) if its == split)
            for split in range(len(names))
        ),
        tuple(int((chosen == split).sum()) for split in range(len(names))),
        known,
        np.stack([members[chosen == split].sum(axis=0) for split in range(len(names))]),
    )


def _class_of(case: Case, classes: Mapping[str, str]) -> str:
    found = value_of(classes, case.specimen, case.patient)
    return NO_CLASS if found is None else found


def assign(members: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """The split of each group: counts [G, C], fractions [S] -> [G] int64; none is left empty.

    Minimises the sum over splits s and classes c of (count - target)^2 / target, where the target
    is fraction s of class c (Pearson's chi-square), and the same for the totals: the largest
    groups first, each where it fits best, then by moving single groups until none helps. Ties go
    by the order of the groups.
    """
    counts = np.concatenate([members, members.sum(axis=1, keepdims=True)], axis=1).astype(float)
    target = fractions[:, None] * counts.sum(axis=0)  # [S, C + 1]
    weight = 1 / np.maximum(target, 1e-9)
    filled = np.zeros_like(target)
    chosen = np.full(len(counts), -1, np.int64)
    sizes = np.zeros(len(fractions), np.int64)
    largest_first = np.argsort(-counts[:, -1], kind="stable")

    def cost(group: np.ndarray) -> np.ndarray:
        """What the sum grows by, in each split: [C + 1] -> [S]."""
        added: np.ndarray = (weight * group * (2 * (filled - target) + group)).sum(axis=1)
        return added

    def put(index: int, split: int) -> None:
        filled[split] += counts[index]
        sizes[split] += 1
        chosen[index] = split

    for index in largest_first:
        put(index, int(np.argmin(cost(counts[index]))))
    for _ in range(_PASSES):
        moved = False
        for index in largest_first:
            old = int(chosen[index])
            filled[old] -= counts[index]
            sizes[old] -= 1
            here = cost(counts[index])
            new = int(np.argmin(here))
            better = here[new] < here[old] - 1e-9 and sizes[old] > 0
            put(index, new if better else old)
            moved |= better and new != old
        if not moved:
            break
    for empty in np.flatnonzero(sizes == 0):
        # The smallest group of a split that can spare one.
        spare = next(i for i in largest_first[::-1] if sizes[chosen[i]] > 1)
        sizes[chosen[spare]] -= 1
        chosen[spare], sizes[empty] = empty, 1
    return chosen


def tcga_sites(cases: Sequence[Case]) -> dict[str, str]:
    """patient -> tissue source site, the second field of a TCGA barcode; DataError for others."""
    found = {case.patient: _TCGA.match(case.patient) for case in cases}
    strange = [patient for patient, match in found.items() if match is None]
    if strange:
        raise DataError(
            f"{len(strange)} patients have no TCGA barcode (TCGA-<site>-...), such as "
            f"{strange[0]!r}; name their sites by --site-table and --site-column"
        )
    return {patient: match.group(1).upper() for patient, match in found.items() if match}


def _check_fractions(names: Sequence[str], fractions: Sequence[float]) -> None:
    if len(fractions) != len(names) or not 2 <= len(fractions) <= 3:
        raise ConfigError(
            f"--fractions {_listed(fractions)}: give two (train, val) or three (train, val, test)"
        )
    if not all(0 < f < 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            f"--fractions {_listed(fractions)}: each must be above 0 and their sum 1, "
            f"it is {sum(fractions):g}"
        )


def _listed(fractions: Sequence[float]) -> str:
    return " ".join(f"{f:g}" for f in fractions)


def _groups(cases: Sequence[Case], sites: Mapping[str, str] | None) -> list[str]:
    """The group of each case: its patient, or the site."""
    if sites is None:
        return [case.patient for case in cases]
    without = sorted({case.patient for case in cases} - set(sites))
    if without:
        raise DataError(
            f"{len(without)} patients have no site, such as {without[0]!r}; complete the table or "
            "divide by patient alone"
        )
    return [sites[case.patient] for case in cases]
