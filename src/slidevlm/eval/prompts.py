"""Prompt files and label files of zero-shot classification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidevlm.data.reports import read_table, read_utf8
from slidevlm.errors import DataError

_PLACES = ("CLASSNAME", "{class}", "{}")
_ID_COLUMNS = ("specimen", "specimen_id", "case_id", "slide_id", "id")
_LABEL_COLUMNS = ("label", "class", "subtype", "diagnosis")


@dataclass(frozen=True)
class Prompts:
    """Classes, sorted by name so that no result depends on a file's order, and their texts."""

    classes: tuple[str, ...]  # C
    texts: tuple[tuple[str, ...], ...]  # C tuples of at least one prompt


@dataclass(frozen=True)
class Labels:
    """The class of each specimen."""

    name: str  # stem of the file
    classes: Mapping[str, str]


def read_prompts(path: Path) -> Prompts:
    """Read `{class: prompt}`, `{class: [prompts]}` or `{classes, templates}`.

    In templates `CLASSNAME` (CONCH, TITAN), `{}` or `{class}` stands for each of a class's names.
    CONCH's files wrap the last form as `{"0": {"classnames", "templates"}}`.

    Raises:
        DataError: anything else, an empty list, a template without a place for the name.
    """
    content = _read_json(path)
    if isinstance(content, dict) and set(content) == {"0"} and isinstance(content["0"], dict):
        content = content["0"]
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: must be a mapping of classes to prompts")
    names = content.get("classes", content.get("classnames"))
    if isinstance(names, dict) and "templates" in content:
        templates = _texts(content["templates"], path, "templates")
        for template in templates:
            if not any(place in template for place in _PLACES):
                raise DataError(
                    f"{path}: template {template!r} has no place for the class; write CLASSNAME "
                    "where it belongs"
                )
        by_class = {
            str(c): tuple(_fill(t, n) for t in templates for n in _texts(v, path, str(c)))
            for c, v in names.items()
        }
    else:
        by_class = {str(c): _texts(v, path, str(c)) for c, v in content.items()}
    if len(by_class) < 2:
        raise DataError(f"{path}: classification needs at least 2 classes, it has {len(by_class)}")
    classes = tuple(sorted(by_class))
    return Prompts(classes, tuple(by_class[c] for c in classes))


def _fill(template: str, name: str) -> str:
    for place in _PLACES:
        if place in template:
            return template.replace(place, name)
    return template


def _texts(value: Any, path: Path, where: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if (
        not isinstance(texts, (list, tuple))
        or not texts
        or not all(isinstance(t, str) and t.strip() for t in texts)
    ):
        raise DataError(f"{path}: {where} must be a text or a list of texts, none empty")
    return tuple(texts)


def read_labels(path: Path, prompts: Prompts) -> Labels:
    """Read `{specimen: class}`, `{patient: {specimen: class}}`, or CSV with such columns.

    Raises:
        DataError: unreadable, or a class that has no prompt.
    """
    classes = read_classes(path)
    strange = sorted(set(classes.values()) - set(prompts.classes))
    if strange:
        raise DataError(
            f"{path}: classes without a prompt: {', '.join(strange[:10])}; the prompts are for "
            f"{', '.join(prompts.classes)}"
        )
    return Labels(path.stem, classes)


def read_classes(path: Path) -> dict[str, str]:
    """The class of each specimen from a label file in one of the forms of `read_labels`.

    Raises:
        DataError: none of these forms.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        classes = _table(path)
    else:
        content = _read_json(path)
        if not isinstance(content, dict) or not content:
            raise DataError(f"{path}: must be a mapping of specimens to classes")
        classes = {}
        for key, value in content.items():
            classes.update(value if isinstance(value, dict) else {key: value})
    return {str(s): str(c) for s, c in classes.items()}


def _table(path: Path) -> dict[str, str]:
    header, rows = read_table(read_utf8(path), path)
    names = [
        next((c for c in known if c in header), None) for known in (_ID_COLUMNS, _LABEL_COLUMNS)
    ]
    if names[0] is None or names[1] is None:
        raise DataError(
            f"{path}: needs a column {' or '.join(_ID_COLUMNS)} and a column "
            f"{' or '.join(_LABEL_COLUMNS)}; it has {', '.join(header)}"
        )
    return {row[names[0]]: row[names[1]] for row in rows}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_utf8(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
