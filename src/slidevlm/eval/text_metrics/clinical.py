"""Clinical agreement: what two reports say of site, procedure, type, grade, stage and so on.

Values are found by the regular expressions of a YAML file, which users can replace: clinical.yaml
beside this module says how it is made. They find words, and understand nothing: agreement of what
they find in generated and true reports says less than a pathologist's reading, but says it of each
field, and a score of n-grams does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.documents import DocumentError, yaml_of
from slidevlm.errors import ConfigError

_ROMAN = {"i": "1", "ii": "2", "iii": "3", "iv": "4", "v": "5"}
_REACH = 80  # letters before a match in which a negation is looked for


@dataclass(frozen=True)
class Field:
    """One thing that a report may say."""

    values: tuple[tuple[str, re.Pattern[str]], ...]  # how a value is written, and what finds it
    roman: bool = False
    skip_negated: bool = False


@dataclass(frozen=True)
class Extractor:
    """Finds values of fields in a text."""

    fields: Mapping[str, Field]
    negation: re.Pattern[str] | None = None

    def __call__(self, text: str) -> dict[str, frozenset[str]]:
        """Text -> the values of each field; none where it says nothing."""
        plain = " ".join(text.split())
        return {name: frozenset(self._values(plain, f)) for name, f in self.fields.items()}

    def _values(self, text: str, field: Field) -> set[str]:
        found = set()
        for value, pattern in field.values:
            for match in pattern.finditer(text):
                if not (field.skip_negated and self._negated(text, match.start())):
                    found.add(_filled(value, match, roman=field.roman))
        return found

    def _negated(self, text: str, place: int) -> bool:
        if self.negation is None:
            return False
        before = re.split(r"[.;:]", text[max(0, place - _REACH) : place])[-1]
        return self.negation.search(before) is not None


def _filled(value: str, match: re.Match[str], *, roman: bool) -> str:
    groups = [g.lower() for g in match.groups() if g is not None]
    for number, group in enumerate(groups, 1):
        value = value.replace(f"{{{number}}}", _ROMAN.get(group, group) if roman else group)
    return value


def read_extractor(path: Path | None = None) -> Extractor:
    """The extractor of a YAML file, or the one that comes with slidevlm.

    Raises:
        ConfigError: unreadable, a key that is not known, an expression that is none.
    """
    where = "clinical.yaml" if path is None else str(path)
    try:
        if path is None:
            text = resources.files(__package__).joinpath("clinical.yaml").read_text("utf-8")
        else:
            text = path.read_text(encoding="utf-8")
        content = yaml_of(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    except DocumentError as error:
        raise ConfigError(f"{where} is not plain YAML: {error}") from error
    return _extractor(content, where)


def _extractor(content: Any, where: str) -> Extractor:
    _check_keys(content, {"fields", "negation"}, where)
    fields = content.get("fields")
    if not isinstance(fields, Mapping) or not fields:
        raise ConfigError(f"{where}: needs fields: a mapping of names to their values")
    negation = content.get("negation")
    return Extractor(
        {str(name): _field(f, f"{where}: {name}") for name, f in fields.items()},
        None if negation is None else _compiled(negation, f"{where}: negation"),
    )


def _field(content: Any, where: str) -> Field:
    _check_keys(content, {"values", "roman", "negated"}, where)
    values, roman = content.get("values"), content.get("roman", False)
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(f"{where}: needs values: a mapping of values to expressions")
    if not isinstance(roman, bool):
        raise ConfigError(f"{where}: roman is true or false, not {roman!r}")
    if content.get("negated", "count") not in ("skip", "count"):
        raise ConfigError(f"{where}: negated is skip or count, not {content['negated']!r}")
    pairs = tuple((str(v), _compiled(e, f"{where}: {v}")) for v, e in values.items())
    for value, pattern in pairs:
        for number in map(int, re.findall(r"\{(\d+)\}", value)):
            if not 1 <= number <= pattern.groups:
                raise ConfigError(
                    f"{where}: {value}: {{{number}}} stands for a group of the expression, which "
                    f"has {pattern.groups}; put what it is to stand for in brackets"
                )
    return Field(pairs, roman, content.get("negated") == "skip")


def _check_keys(content: Any, known: set[str], where: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: must be a mapping with {', '.join(sorted(known))}")
    strange = [str(key) for key in content if key not in known]
    if strange:
        raise ConfigError(f"{where}: does not know {', '.join(strange)}; it knows "
                          f"{', '.join(sorted(known))}")  # fmt: skip


def _compiled(expression: Any, where: str) -> re.Pattern[str]:
    if not isinstance(expression, str) or not expression:
        raise ConfigError(f"{where}: {expression!r} is not an expression; put it in quotes")
    try:
        return re.compile(expression, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {expression!r} is not a regular expression: {error}"
        ) from error


def statistics(
    generated: Sequence[Mapping[str, frozenset[str]]],
    references: Sequence[Mapping[str, frozenset[str]]],
    fields: Sequence[str],
) -> np.ndarray:
    """[N, F, 3]: how many values both reports have, the generated one, the true one."""
    rows = [
        [(len(ours[f] & theirs[f]), len(ours[f]), len(theirs[f])) for f in fields]
        for ours, theirs in zip(generated, references, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, len(fields), 3)


def finish(sums: np.ndarray, fields: Sequence[str]) -> dict[str, np.ndarray]:
    """Sums [..., F, 3] -> `clinical/<field>/precision`, `recall` and `f1`, each [...].

    NaN where no report says anything of the field.
    """
    found: dict[str, np.ndarray] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, name in enumerate(fields):
            both, ours, theirs = np.moveaxis(sums[..., i, :], -1, 0)
            key = f"clinical/{name.replace(' ', '_')}"
            found[f"{key}/precision"] = both / ours
            found[f"{key}/recall"] = both / theirs
            found[f"{key}/f1"] = 2 * both / (ours + theirs)
    return found
