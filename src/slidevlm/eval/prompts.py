"""Prompt files and label files of zero-shot classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidevlm.data.reports import read_table, read_utf8, told_apart, value_of
from slidevlm.documents import DocumentError, json_of, size_problem, yaml_of
from slidevlm.errors import DataError

# Published files of prompts have 0.3 MB at most; each prompt is embedded.
_MOST_PROMPTS, _MOST_LABELS = 16_000_000, 256_000_000  # bytes
_PLACES = ("CLASSNAME", "{class}", "{}")
_ID_COLUMNS = ("specimen", "specimen_id", "case_id", "slide_id", "id")
_LABEL_COLUMNS = ("label", "class", "subtype", "diagnosis")


@dataclass(frozen=True)
class Prompts:
    """Classes, sorted by name so that no result depends on a file's order, and their texts."""

    classes: tuple[str, ...]  # C
    texts: tuple[tuple[str, ...], ...]  # C tuples of at least one prompt
    # The ensembles of a file that has several (MI-Zero's), each C tuples of prompts.
    sets: tuple[tuple[tuple[str, ...], ...], ...] = ()


@dataclass(frozen=True)
class Labels:
    """The class of each specimen, or its classes."""

    name: str  # stem of the file
    classes: Mapping[str, tuple[str, ...]]  # by specimen, or by "<patient>/<specimen>"
    several: bool = False  # a multi-label task: any number of classes a specimen, perhaps none

    def of(self, specimen: str, patient: str) -> tuple[str, ...] | None:
        """The classes of a specimen; None where the file does not name it."""
        return value_of(self.classes, specimen, patient)

    @property
    def names(self) -> tuple[str, ...]:
        """All classes, sorted."""
        return tuple(sorted({c for found in self.classes.values() for c in found}))


def read_prompts(path: Path) -> Prompts:
    """Read `{class: prompt}`, `{class: [prompts]}` or `{classes, templates}`, as JSON or YAML.

    `classes` (CONCH: `classnames`) maps each class to its name or names, or lists classes that are
    their own names. In templates `CLASSNAME` (CONCH), `{}` or `{class}` stands for the name.
    CONCH's files wrap this form as `{"0": ...}`, MI-Zero's are several of them, `{"0": ..., "1":
    ...}`, whose prompts together are the ensemble. TITAN's are YAML, with other keys beside
    `prompts: {class: [prompts]}`; MOSAIC's map each class to its prompts.

    Raises:
        DataError: anything else, an empty list, a template without a place for the name.
    """
    content = _read_mapping(path, "a mapping of classes to prompts", _MOST_PROMPTS)
    numbered = [content.get(str(i)) for i in range(len(content))]
    if all(isinstance(one, dict) for one in numbered):
        return _join([_prompts(one, path) for one in numbered if one is not None], path)
    return _prompts(content, path)


def prompts_of(classes: Mapping[str, str | Sequence[str]] | Sequence[str]) -> Prompts:
    """Prompts that a program gives: `{class: prompt or prompts}`, or texts, each its own class.

    >>> prompts_of({"lung": ["lung", "a tumour of the lung"], "kidney": "kidney"}).classes
    ('kidney', 'lung')
    >>> prompts_of(["lung", "kidney"]).texts
    (('kidney',), ('lung',))

    Raises:
        DataError: fewer than two classes, an empty text.
    """
    where = Path("the prompts")
    if isinstance(classes, Mapping):
        return _prompts(classes, where)
    texts = _texts(classes, where, "a class")
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise DataError(f"{where}: {', '.join(map(repr, twice))} given twice; leave one out")
    return _prompts({text: text for text in texts}, where)


def _join(sets: Sequence[Prompts], path: Path) -> Prompts:
    """One ensemble of several, which must have the same classes."""
    classes = sets[0].classes
    if any(one.classes != classes for one in sets):
        raise DataError(f"{path}: its numbered ensembles differ in their classes; make them alike")
    if len(sets) == 1:
        return sets[0]
    columns = zip(*(one.texts for one in sets), strict=True)
    texts = tuple(tuple(dict.fromkeys(t for part in c for t in part)) for c in columns)
    return Prompts(classes, texts, tuple(one.texts for one in sets))


def _prompts(content: Mapping[str, Any], path: Path) -> Prompts:
    content = dict(content)
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


def read_labels(path: Path, prompts: Prompts | None = None) -> Labels:
    """Read `{specimen: class}` or `{patient: {specimen: class}}`, JSON or YAML, or a CSV.

    A list of classes in the place of a class makes it a multi-label task. A specimen name that
    several patients share is told apart as "<patient>/<specimen>", as in `data.cases.unique_cases`.

    Args:
        path: the file.
        prompts: of the classes that may occur; without them any may.

    Raises:
        DataError: unreadable, two classes for one specimen, an empty one, or one without a prompt.
    """
    classes, several = _read_classes(path)
    known = None if prompts is None else prompts.classes
    # With prompts it is one of those without.
    if known is None and (blank := [s for s, found in classes.items() if "" in found]):
        raise DataError(
            f"{path}: {len(blank)} specimens have an empty class, such as {blank[0]!r}; leave them "
            "out, or write their class"
        )
    strange = {
        c: s for s, found in classes.items() for c in found if known is not None and c not in known
    }
    if strange and known is not None:
        shown = ", ".join(f"{c!r} (of {strange[c]!r})" for c in sorted(strange)[:10])
        raise DataError(
            f"{path}: classes without a prompt: {shown}; the prompts are for "
            f"{', '.join(known)}; add a prompt or leave these specimens out"
        )
    return Labels(path.stem, classes, several)


def read_examples(path: Path) -> dict[str, tuple[str, ...]]:
    """Read few-shot examples, `{class: [specimens]}`, JSON or YAML.

    Raises:
        DataError: anything else, fewer than two classes, a specimen of two classes.
    """
    content = _read_mapping(path, "a mapping of classes to lists of specimens")
    found = {_name(c): tuple(dict.fromkeys(map(_name, _texts(v, path, c)))) for c, v in
             content.items()}  # fmt: skip
    if len(found) < 2:
        raise DataError(f"{path}: has examples of {len(found)} class; at least 2 are needed")
    owner: dict[str, str] = {}
    for c, specimens in found.items():
        for specimen in specimens:
            if owner.setdefault(specimen, c) != c:
                raise DataError(
                    f"{path}: {specimen!r} is an example of both {owner[specimen]!r} and {c!r}; "
                    "keep one"
                )
    return found


def read_classes(path: Path) -> dict[str, str]:
    """The class of each specimen from a label file in one of the forms of `read_labels`.

    Raises:
        DataError: none of these forms, several classes for one specimen.
    """
    classes, several = _read_classes(path)
    if several:
        raise DataError(f"{path}: has lists of classes; here every specimen must have one class")
    return {name: found[0] for name, found in classes.items()}


def _read_classes(path: Path) -> tuple[dict[str, tuple[str, ...]], bool]:
    """Classes by specimen, and whether the file has lists of them."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return _collect(_table(path), path), False
    found, several = [], False
    for key, value in _read_mapping(path, "a mapping of specimens to classes").items():
        nested = isinstance(value, dict)
        for specimen, label in value.items() if nested else [(key, value)]:
            several |= isinstance(label, list)
            labels = label if isinstance(label, list) else [label]
            names = tuple(dict.fromkeys("" if one is None else _name(one) for one in labels))
            found.append((_name(key) if nested else "", _name(specimen), names))
    return _collect(found, path), several


def _collect(
    found: list[tuple[str, str, tuple[str, ...]]], path: Path
) -> dict[str, tuple[str, ...]]:
    """(patient or "", specimen, classes) -> classes by specimen."""
    classes: dict[str, tuple[str, ...]] = {}
    for name, labels in told_apart(found):
        if set(classes.setdefault(name, labels)) != set(labels):
            one, other = (" and ".join(map(repr, part)) for part in (classes[name], labels))
            raise DataError(f"{path}: two classes for {name!r}: {one} and {other}; keep one")
    return classes


def _table(path: Path) -> list[tuple[str, str, tuple[str, ...]]]:
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
    return [("", _name(row[names[0]]), (_name(row[names[1]]),)) for row in rows]


def _read_mapping(path: Path, what: str, most_bytes: int = _MOST_LABELS) -> dict[str, Any]:
    if path.is_file() and (problem := size_problem(path.stat().st_size, most_bytes, what)):
        raise DataError(f"{path}: {problem}")
    content = read_utf8(path)
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            # A class NO is not false, 01 is not 1.
            value = yaml_of(content, texts=True, unique=True)
        else:
            value = json_of(content, unique=True)
    except DocumentError as error:
        kind = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "JSON"
        raise DataError(f"{path} is not {kind} ({error}); it must be {what}") from error
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path}: holds {_kind(value)}; it must be {what}")
    return value


def _kind(value: Any) -> str:
    return f"an empty {type(value).__name__}" if value in ({}, [], "") else type(value).__name__
