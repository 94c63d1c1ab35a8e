"""Report texts: reading them from files, one normal form, and a number for each."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from slidevlm.documents import json_of
from slidevlm.errors import DataError

log = logging.getLogger("slidevlm.data")

V = TypeVar("V")
_LARGE = 10**8  # letters of a file that takes seconds to read, and no step of it can be told
ID_COLUMNS = ("specimen", "specimen_id", "case_id", "slide_id", "id")
TEXT_COLUMNS = ("report", "text", "diagnosis", "caption")
_ALSO_LABELS = ("diagnosis",)  # a column of that name may hold a class

# White space, control characters, and halves of surrogate pairs, which no encoder takes.
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_ASCII_BLANK = dict.fromkeys([*range(32), 127], " ")


def normalise(text: str) -> str:
    """Unicode NFC; each run of white space and control characters is one space; ends stripped."""
    if text.isascii():  # nearly always, and five times as fast
        return " ".join(text.translate(_ASCII_BLANK).split())
    return unicodedata.normalize("NFC", _BLANK.sub(" ", text)).strip()


def report_id(text: str) -> int:
    """A signed 64-bit number equal for equal reports, up to white space and case.

    The same in every process and on every machine (BLAKE2b of the normal form).
    """
    key = normalise(text).casefold().encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)


def read_text_file(
    path: str | os.PathLike[str], columns: Sequence[str] = TEXT_COLUMNS
) -> dict[str, str]:
    """Texts by specimen, from JSON, JSONL or CSV.

    JSON: `{patient: {specimen: text}}`, `{specimen: text}`, or a list of objects; JSONL: one
    object a line; CSV: a table. Objects and tables name the specimen in one of `ID_COLUMNS` and
    the text in one of `columns` (the first present counts). A specimen name that several
    patients share is told apart as "<patient>/<specimen>", as in `unique_cases`.

    DataError: unreadable, none of these forms, or two different texts for one specimen.
    """
    path = Path(path)
    content = read_utf8(path)
    if len(content) >= _LARGE:
        log.info("reading the reports of %s, %.0f million letters", path, len(content) / 1e6)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _collect(_of_rows(read_table(content, path)[1], path, columns), path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _collect(_of_rows(_json_lines(content, path), path, columns), path)
    try:
        data = json_of(content, unique=True)
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); texts come as JSON, .jsonl or .csv with that ending"
        ) from error
    if isinstance(data, Mapping):
        return _collect(_of_mapping(data, path), path)
    if isinstance(data, list):
        return _collect(_of_rows(data, path, columns), path)
    raise DataError(
        f"{path} holds {type(data).__name__}; give {{patient: {{specimen: text}}}}, "
        "{specimen: text} or a list of {id, report}"
    )


def read_utf8(path: Path) -> str:
    """The text of a file, without byte order mark; DataError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def read_table(content: str, path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV; comma, semicolon or tab, whichever the header has most of.

    Header names are lower-cased and stripped; missing cells are empty, empty lines left out.
    """
    header = content.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    # A report may be longer than the module's default limit for a cell.
    csv.field_size_limit(2**31 - 1)
    try:
        table = list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))
        # The rest of a file in one cell, without a word, where a quote is missing.
        if table and "\n" in "".join(table[-1][-1:]).strip() and content.count('"') % 2:
            _check_closed(content, delimiter, f"{path}, row {len(table)}")
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV ({error}); check its quotes") from error
    return by_header(table)


def _check_closed(content: str, delimiter: str, where: str) -> None:
    try:
        for _ in csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True):
            pass
    except csv.Error as error:
        if "end of data" in str(error):
            raise DataError(f"{where}: a quote is not closed; close it") from error


def by_header(table: Sequence[Sequence[str]]) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of cells, as `read_table` gives them."""
    names = [name.strip().lower() for name in table[0]] if table else []
    rows = [
        {name: row[i] if i < len(row) else "" for i, name in enumerate(names)}
        for row in table[1:]
        if any(cell.strip() for cell in row)
    ]
    return names, rows


def _json_lines(content: str, path: Path) -> list[Any]:
    values = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                values.append(json_of(line))
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number} is not JSON ({error}); write one object a line"
                ) from error
    return values


def _of_mapping(data: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str, str]]:
    """(patient or "", specimen, text) of the nested and the flat form; they may be mixed."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            for specimen, text in value.items():
                yield key.strip(), specimen.strip(), _string(text, path, f"{key}/{specimen}")
        else:
            yield "", key.strip(), _string(value, path, key)


def _of_rows(
    rows: Sequence[Any], path: Path, columns: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    told = False
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, entry {number}: {row!r:.80} is not an object {{id, report}}")
        id_column, text_column = _column(row, ID_COLUMNS), _column(row, columns)
        if id_column is None or text_column is None:
            raise DataError(
                f"{path}, entry {number} has the columns {', '.join(map(str, row))}; needed are "
                f"one of {', '.join(ID_COLUMNS)} and one of {', '.join(columns)}"
            )
        if text_column in _ALSO_LABELS and not told:
            told = True
            log.info("%s: the reports are its %r", path, text_column)
        name = row[id_column]
        if type(name) not in (str, int) or not str(name).strip():
            raise DataError(f"{path}, entry {number}: {name!r:.80} is not a specimen's name")
        yield "", str(name).strip(), _string(row[text_column], path, f"entry {number}")


def _column(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _string(value: Any, path: Path, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{path}, {where}: the text is {type(value).__name__}, not a string")
    return value


def told_apart(entries: Iterable[tuple[str, str, V]]) -> Iterator[tuple[str, V]]:
    """(patient or "", specimen, value) -> (name, value), in order.

    The name is the specimen's, or "<patient>/<specimen>" of one that several patients share, as in
    `unique_cases`.
    """
    found = list(entries)
    patients: dict[str, set[str]] = {}
    for patient, specimen, _ in found:
        patients.setdefault(specimen, set()).add(patient)
    for patient, specimen, value in found:
        shared = len(patients[specimen]) > 1 and patient
        yield f"{patient}/{specimen}" if shared else specimen, value


def names_of(specimen: str, patient: str) -> tuple[str, str]:
    """What a file may call a specimen: the name that tells patients apart before the plain one.

    The file and the data may each have had a reason to write the patient before the specimen.
    """
    return f"{patient}/{specimen}", specimen


def value_of(named: Mapping[str, V], specimen: str, patient: str) -> V | None:
    """What a file, read by `told_apart`, has for a specimen; None where it does not name it."""
    return next((named[n] for n in names_of(specimen, patient) if n in named), None)


def _collect(entries: Iterable[tuple[str, str, str]], path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, text in told_apart(entries):
        if texts.setdefault(name, text) != text:
            raise DataError(f"{path} has two different texts for {name!r}; keep one")
    if not texts:
        raise DataError(f"{path} holds no texts")
    return texts
