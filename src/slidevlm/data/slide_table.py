"""Slide tables: which slides belong to which specimen and patient.

    case_id,slide_id          CLAM         PATIENT,FILENAME       STAMP
    TCGA-02-0001,TCGA-02...   (one row a slide; further columns are ignored)

CSV or TSV (comma, semicolon or tab) or the first sheet of an XLSX (extra `xlsx`). Names of
columns are compared without case. The specimen is in the first present of `SPECIMEN_COLUMNS`,
the slide in the first of `SLIDE_COLUMNS`; where the specimen's column is not the patient's and
there is one of `PATIENT_COLUMNS` besides, it names the patient.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidevlm.data.reports import by_header, read_table, read_utf8
from slidevlm.errors import ConfigError, DataError

PATIENT_COLUMNS = ("patient", "patient_id", "patient_barcode")
SPECIMEN_COLUMNS = ("specimen", "specimen_id", "case_id", "case", *PATIENT_COLUMNS)
SLIDE_COLUMNS = ("slide_id", "slide", "slide_name", "filename", "file_name", "file", "wsi")

_TCGA = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SlideRow:
    """One slide of a table."""

    specimen: str
    patient: str
    slide: str  # as written: a name, a file name, or a path relative to the folder


def patient_of(name: str) -> str:
    """The patient of a slide or a specimen: TCGA's barcode of the patient, else the name."""
    found = _TCGA.match(name)
    return found.group().upper() if found else name


def read_slide_table(path: str | os.PathLike[str]) -> tuple[SlideRow, ...]:
    """Slides in the table's order, each once.

    DataError: unreadable, without the columns, with an empty cell in one of them, or with one
    slide for two specimens or one specimen for two patients.
    """
    path = Path(path)
    names, rows = _xlsx(path) if path.suffix.lower() == ".xlsx" else _text(path)
    specimen = _column(names, SPECIMEN_COLUMNS, "specimen", path)
    slide = _column(names, SLIDE_COLUMNS, "slide", path)
    patient = None if specimen in PATIENT_COLUMNS else _first(names, PATIENT_COLUMNS)
    found: dict[str, SlideRow] = {}
    patients: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        cells = [row[c].strip() for c in (specimen, slide, *([patient] if patient else []))]
        if not all(cells):
            raise DataError(
                f"{path}, row {number} below the header: an empty cell in "
                f"{', '.join(c for c in (specimen, slide, patient) if c)}; fill it in"
            )
        owner = cells[2] if patient else _patient(cells[0], specimen)
        entry = SlideRow(cells[0], owner, cells[1])
        before = found.setdefault(entry.slide, entry)
        if before.specimen != entry.specimen or before.patient != entry.patient:
            raise DataError(
                f"{path}: slide {entry.slide!r} is listed for {before.specimen!r} of patient "
                f"{before.patient!r} and for {entry.specimen!r} of {entry.patient!r}; a slide "
                "belongs to one specimen"
            )
        known = patients.setdefault(entry.specimen, owner)
        if known != owner:
            raise DataError(
                f"{path}: specimen {entry.specimen!r} is listed for the patients {known!r} and "
                f"{owner!r}; write the patient into its name"
            )
    if not found:
        raise DataError(f"{path} lists no slide; write one row a slide below the header")
    return tuple(found.values())


def _patient(specimen: str, column: str) -> str:
    return specimen if column in PATIENT_COLUMNS else patient_of(specimen)


def _first(names: Sequence[str], wanted: Iterable[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _column(names: Sequence[str], wanted: tuple[str, ...], what: str, path: Path) -> str:
    found = _first(names, wanted)
    if found is None:
        raise DataError(
            f"slide table {path} has the columns {', '.join(names) or '(none)'}; the {what} must "
            f"be in one of {', '.join(wanted)}"
        )
    return found


def _text(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    return read_table(read_utf8(path), path)


def _xlsx(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of the first sheet; formulas count as what was last computed."""
    try:
        import openpyxl
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the extra xlsx: pip install 'slidevlm[xlsx]', or save it as CSV"
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            table = [[_cell(value) for value in row] for row in _sheet(book)]
        finally:
            book.close()
    except Exception as error:  # openpyxl raises whatever the damage leads it to
        raise DataError(
            f"{path} cannot be read as XLSX ({type(error).__name__}: {error}); save it again, or "
            "as CSV"
        ) from error
    return by_header(table)


def _sheet(book: Any) -> Iterable[tuple[Any, ...]]:
    rows: Iterable[tuple[Any, ...]] = book.worksheets[0].iter_rows(values_only=True)
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
