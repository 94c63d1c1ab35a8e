"""Prompt files and label files of zero-shot classification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
    classes: Mapping[str, str]  # by specimen, or by "<patient>/<specimen>"

    def of(self, specimen: str, patient: str) -> str | None:
        """The class of a specimen; None where the file does not name it."""
        # Either side may have had a reason to write the patient before the specimen.
        return self.classes.get(f"{patient}/{specimen}", self.classes.get(specimen))


def read_prompts(path: Path) -> Prompts:
    """Read `{class: prompt}`, `{class: [prompts]}` or `{classes, templates}`, as JSON or YAML.

    `classes` (CONCH: `classnames`) maps each class to its name or names, or lists classes that are
    their own names. In templates `CLASSNAME` (CONCH), `{}` or `{class}` stands for the name.
    CONCH's files wrap this form as `{"0": ...}`; TITAN's are YAML, with other keys beside
    `prompts: {class: [prompts]}`.

    Raises:
        DataError: anything else, an empty list, a template without a place for the name.
    """
    content = _read_mapping(path, "a mapping of classes to prompts")
    if set(content) == {"0"} and isinstance(content["0"], dict):
        content = content["0"]
    if isinstance(content.get("prompts"), dict):
        templates = content.get("templates")
        content = content["prompts"]
        if templates is not None:
            content = {"classes": content, "templates": templates}
    if "templates" in content:
        found = _from_templates(content, path)
    else:
        found = {c: _texts(v, path, c) for c, v in content.items()}
    by_class = {_name(c): texts for c, texts in found.items()}
    if len(by_class) < len(found):
        raise DataError(f"{path}: two classes differ only by white space; keep one of them")
    if len(by_class) < 2:
        raise DataError(
            f"{path}: classification needs at least 2 classes, it has {len(by_class)}; add the "
            "others with their prompts"
        )
    classes = tuple(sorted(by_class))
    return Prompts(classes, tuple(by_class[c] for c in classes))


def _from_templates(content: Mapping[str, Any], path: Path) -> dict[str, tuple[str, ...]]:
    key = "classnames" if "classnames" in content else "classes"
    names = content.get(key)
    if isinstance(names, list):
        names = {c: c for c in _texts(names, path, key)}
    if set(content) != {key, "templates"} or not isinstance(names, dict):
        raise DataError(
            f"{path}: has the keys {', '.join(content)}; beside 'templates' there must be "
            "'classes' alone, a mapping of classes to their names or a list of them"
        )
    templates = _texts(content["templates"], path, "templates")
    for template in templates:
        if not any(place in template for place in _PLACES):
            raise DataError(
                f"{path}: template {template!r} has no place for the class; write CLASSNAME "
                "where it belongs"
            )
    return {
        c: tuple(_fill(t, n) for t in templates for n in _texts(v, path, c))
        for c, v in names.items()
    }


def _name(value: Any) -> str:
    """A class or specimen as files name it: white space around it, as in a CSV, is harmless."""
    return str(value).strip()


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
        raise DataError(
            f"{path}: {where} must be a text or a list of texts, none empty, not {texts!r:.60}"
        )
    return tuple(texts)


def read_labels(path: Path, prompts: Prompts) -> Labels:
    """Read `{specimen: class}` or `{patient: {specimen: class}}`, JSON or YAML, or a CSV.

    A specimen name that several patients share is told apart as "<patient>/<specimen>", as in
    `data.cases.unique_cases`.

    Raises:
        DataError: unreadable, two classes for one specimen, or a class that has no prompt.
    """
    classes = read_classes(path)
    strange = {c: s for s, c in classes.items() if c not in prompts.classes}
    if strange:
        shown = ", ".join(f"{c!r} (of {strange[c]!r})" for c in sorted(strange)[:10])
        raise DataError(
            f"{path}: classes without a prompt: {shown}; the prompts are for "
            f"{', '.join(prompts.classes)}; add a prompt or leave these specimens out"
        )
    return Labels(path.stem, classes)


def read_classes(path: Path) -> dict[str, str]:
    """The class of each specimen from a label file in one of the forms of `read_labels`.

    Raises:
        DataError: none of these forms, or two classes for one specimen.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        found = _table(path)
    else:
        found = []
        for key, value in _read_mapping(path, "a mapping of specimens to classes").items():
            nested = isinstance(value, dict)
            for specimen, label in value.items() if nested else [(key, value)]:
                found.append((_name(key) if nested else "", _name(specimen), _name(label)))
    return _collect(found, path)


def _collect(found: list[tuple[str, str, str]], path: Path) -> dict[str, str]:
    """(patient or "", specimen, class) -> class by specimen."""
    patients: dict[str, set[str]] = {}
    for patient, specimen, _ in found:
        patients.setdefault(specimen, set()).add(patient)
    classes: dict[str, str] = {}
    for patient, specimen, label in found:
        name = f"{patient}/{specimen}" if patient and len(patients[specimen]) > 1 else specimen
        if classes.setdefault(name, label) != label:
            raise DataError(
                f"{path}: two classes for {name!r}: {classes[name]!r} and {label!r}; keep one"
            )
    return classes


def _table(path: Path) -> list[tuple[str, str, str]]:
    header, rows = read_table(read_utf8(path), path)
    names = [
        next((c for c in known if c in header), None) for known in (_ID_COLUMNS, _LABEL_COLUMNS)
    ]
    if names[0] is None or names[1] is None:
        raise DataError(
            f"{path}: needs a column {' or '.join(_ID_COLUMNS)} and a column "
            f"{' or '.join(_LABEL_COLUMNS)}; it has {', '.join(header)}"
        )
    if not rows:
        raise DataError(f"{path}: has a header but no rows; write a specimen and its class in each")
    return [("", _name(row[names[0]]), _name(row[names[1]])) for row in rows]


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    content = read_utf8(path)
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            # Every scalar stays the text that it is: a class NO is not false, 01 is not 1.
            value = yaml.load(content, Loader=yaml.BaseLoader)
        else:
            value = json.loads(content)
    except (ValueError, yaml.YAMLError) as error:
        kind = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "JSON"
        raise DataError(f"{path} is not {kind} ({error}); it must be {what}") from error
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path}: holds {_kind(value)}; it must be {what}")
    return value


def _kind(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ({}, [], "") else type(value).__name__
