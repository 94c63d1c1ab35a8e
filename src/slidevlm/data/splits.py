"""Split files: which specimens a run trains on and which it is judged by."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.reports import normalise, read_table, read_utf8, value_of
from slidevlm.documents import json_of
from slidevlm.errors import DataError

log = logging.getLogger("slidevlm.data")

COLUMNS = ("specimen", "specimen_id", "case_id", "slide_id", "patient", "patient_id")


@dataclass(frozen=True)
class Split:
    """The usable specimens of one split file, in its order."""

    name: str  # stem of the file
    cases: tuple[Case, ...]  # N
    reports: tuple[str, ...]  # N, normalised, none empty
    missing: tuple[str, ...] = ()  # identifiers without features
    without_text: tuple[str, ...] = ()  # specimens dropped for want of a report

    def __len__(self) -> int:
        return len(self.cases)

    def first(self, count: int) -> Split:
        """The split's first `count` specimens."""
        return replace(self, cases=self.cases[:count], reports=self.reports[:count])


def read_identifiers(path: str | os.PathLike[str]) -> list[str]:
    """Identifiers of a split file, in order, each once.

    Separated by commas and/or newlines; or a JSON list; or a CSV with one of `COLUMNS` (the
    first present counts). They may contain spaces. DataError: unreadable or empty.
    """
    path = Path(path)
    content = read_utf8(path)
    found = _identifiers(content, path)
    unique = list(dict.fromkeys(name for name in (f.strip() for f in found) if name))
    if not unique:
        raise DataError(
            f"split file {path} names no specimen; write identifiers separated by commas "
            "or newlines"
        )
    return unique


def _identifiers(content: str, path: Path) -> Iterable[str]:
    if path.suffix.lower() == ".json" or content.lstrip().startswith("["):
        return _of_json(content, path)
    # Only the first line tells a table from a list; a list may hold any quote.
    names, _ = read_table(content.split("\n", 1)[0], path)
    column = next((name for name in COLUMNS if name in names), None)
    if column is not None:
        return [row[column] for row in read_table(content, path)[1]]
    if path.suffix.lower() in (".csv", ".tsv"):
        raise DataError(
            f"split file {path} has the columns {', '.join(names)}; one of {', '.join(COLUMNS)} "
            "is needed (a list without header is a .txt)"
        )
    return content.replace("\r", "\n").replace("\n", ",").split(",")


def _of_json(content: str, path: Path) -> list[str]:
    try:
        data: Any = json_of(content)
    except ValueError as error:
        raise DataError(
            f"split file {path} is not JSON ({error}); write a list of names"
        ) from error
    if not isinstance(data, list) or not all(type(name) in (str, int) for name in data):
        raise DataError(f'split file {path} is not a JSON list of names; write ["a", "b"]')
    return [str(name) for name in data]


def write_identifiers(names: Sequence[str]) -> str:
    """The content of a split file that `read_identifiers` reads back as exactly `names`.

    One name a line; a JSON list where a name could not stand in a line (a comma, a column's name).
    """
    plain = "\n".join(names) + "\n"
    # Comma and line break separate names, the rest would be a table's header.
    readable = not any(re.search(r"[,\r\n]", name) for name in names)
    header = [part.strip().lower() for part in re.split(r"[;\t]", names[0].replace('"', ""))]
    if readable and not names[0].startswith("[") and not set(header) & set(COLUMNS):
        return plain
    return json.dumps(list(names), ensure_ascii=False, indent=0) + "\n"


@dataclass(frozen=True)
class Found:
    """What a split file names."""

    cases: tuple[Case, ...]  # with features, each once
    missing: tuple[str, ...]  # identifiers without features


def find(identifiers: Sequence[str], store: CaseStore) -> Found:
    """The specimens of `identifiers`: names of specimens or, failing that, of patients."""
    by_specimen = {case.specimen: case for case in store.cases}
    by_patient: dict[str, list[Case]] = {}
    for case in store.cases:
        by_patient.setdefault(case.patient, []).append(case)
    chosen: dict[str, Case] = {}
    missing = []
    for name in identifiers:
        named = [by_specimen[name]] if name in by_specimen else by_patient.get(name, [])
        present = [case for case in named if _has_features(case, store)]
        chosen.update((case.specimen, case) for case in present)
        if not present:
            missing.append(name)
    return Found(tuple(chosen.values()), tuple(missing))


def _has_features(case: Case, store: CaseStore) -> bool:
    """Whether there is something to read; what is wrong with it, the reader of the bag tells."""
    try:
        return store.has_features(case)
    except DataError:
        return True


def resolve(
    path: str | os.PathLike[str], store: CaseStore, texts: Mapping[str, str] | None = None
) -> Split:
    """Find a split file's specimens in `store`, with their reports.

    An identifier names a specimen or, failing that, a patient (all the specimens). Reports come
    from `texts` where it is given, else from the store; never from both. Identifiers without
    features and specimens without text are left out with a warning; DataError when none is left.
    """
    path = Path(path)
    identifiers = read_identifiers(path)
    found = find(identifiers, store)
    chosen, missing = {case.specimen: case for case in found.cases}, found.missing
    if not chosen:
        raise DataError(
            f"split file {path}: none of its {len(identifiers)} identifiers has features in "
            f"{store.path}; it names {some(identifiers, 3)}, the data "
            f"{some((c.specimen for c in store.cases), 3)} "
            f"(patients {some(dict.fromkeys(c.patient for c in store.cases), 3)})"
        )
    if missing:
        log.warning(
            "split %s: %d of %d identifiers have no features in %s: %s",
            path.stem, len(missing), len(identifiers), store.path, some(missing, 10),
        )  # fmt: skip

    reports = {name: report_of(case, store, texts) for name, case in chosen.items()}
    without = [name for name, report in reports.items() if not report]
    if len(without) == len(chosen):
        raise DataError(
            f"split file {path}: none of its {len(chosen)} specimens has a report; check "
            "--hdf5_text_attribute or the identifiers in --text-data-file"
        )
    if without:
        log.warning(
            "split %s: %d of %d specimens have no report and are dropped: %s",
            path.stem, len(without), len(chosen), some(without, 10),
        )  # fmt: skip
    kept = [name for name in chosen if reports[name]]
    return Split(
        path.stem,
        tuple(chosen[name] for name in kept),
        tuple(reports[name] for name in kept),
        missing,
        tuple(without),
    )


def report_of(case: Case, store: CaseStore, texts: Mapping[str, str] | None) -> str:
    """The normalised report, or "" where there is none."""
    if texts is None:
        return normalise(store.text(case) or "")
    return normalise(value_of(texts, case.specimen, case.patient) or "")


def check_leakage(splits: Sequence[Split]) -> None:
    """DataError when a patient is in two splits: what is learnt of one would be judged by it."""
    for a, b in itertools.combinations(splits, 2):
        shared = sorted({case.patient for case in a.cases} & {case.patient for case in b.cases})
        if shared:
            raise DataError(
                f"leakage: {len(shared)} patient(s) are both in split {a.name!r} and in split "
                f"{b.name!r}: {some(shared, 5)}; move each to one split, or accept it with "
                "--allow-patient-overlap"
            )


def some(names: Iterable[str], count: int) -> str:
    """The first `count` names, and how many more there are."""
    listed = list(names)
    more = f", ... ({len(listed) - count} more)" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more
