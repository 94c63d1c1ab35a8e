"""JSON and YAML of users' files, read so that no file can run code, hang a run or end it untold;
and CSV, written so that it reads back.

The libraries' own readers stop at what is too deep with a RecursionError, repeat what a YAML alias
stands for as often as it is named (a file of 400 bytes can stand for billions of nodes), and
raise on damaged values whatever that damage leads them to. Likewise the archives of torch.save,
which hold nothing that is compressed.
"""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

# PyYAML reads some 100,000 characters a second: beyond this it would seem to hang.
MOST_YAML = 4_000_000
MOST_NODES = 1_000_000  # of a YAML document, with everything that its aliases repeat


class DocumentError(ValueError):
    """Text that is no such document; callers say of which file."""


def json_of(text: str | bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: of the document.
        unique: a key that one object has twice, with other values, is an error; else the last
            counts, as the library has it.

    Raises:
        DocumentError: it is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except DocumentError:
        raise
    except ValueError as error:
        raise DocumentError(str(error)) from error


def finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have.

    >>> finite({"a": [1.0, float("nan")], "b": ("c", float("inf"))})
    {'a': [1.0, None], 'b': ['c', None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise DocumentError(f"{key!r} is given twice, with different values; keep one")
    return found


def yaml_of(text: str, *, texts: bool = False, unique: bool = False) -> Any:
    """The value of a plain YAML document: no tag makes more of a node than numbers and text.

    Args:
        text: of the document.
        texts: every scalar stays the text that it is: NO is not false, 01 is not 1.
        unique: a key that one mapping has twice is an error; else the last counts.

    Raises:
        DocumentError: it is none, or stands for more than a million nodes.
    """
    import yaml

    kind: Any = yaml.BaseLoader if texts else yaml.SafeLoader
    try:
        loader = kind(_short_enough(text))
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node)
        if unique:
            _check_keys(node)
        return loader.construct_document(node)
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except DocumentError:
        raise
    # Of a value that is none, such as !!int "", PyYAML raises IndexError, KeyError and others.
    except Exception as error:
        raise DocumentError(str(error) or type(error).__name__) from error


def yaml_keys(text: str) -> list[str]:
    """The keys of a document that is a mapping, as they are written, repeated ones too.

    Raises:
        DocumentError: it is no YAML.
    """
    import yaml

    try:
        node = yaml.compose(_short_enough(text), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DocumentError(str(error)) from error
    return [] if not isinstance(node, yaml.MappingNode) else [str(k.value) for k, _ in node.value]


def _short_enough(text: str) -> str:
    if len(text) > MOST_YAML:
        raise DocumentError(
            f"{len(text) / 1e6:.0f} million characters are too many for YAML, which is read "
            f"slowly (at most {MOST_YAML / 1e6:.0f} million); write it as JSON"
        )
    return text


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node.value, list):
        for child in node.value:
            yield from child if isinstance(child, tuple) else (child,)


def _count(root: yaml.Node) -> None:
    """Refuse what stands for too many nodes, or for endlessly many: an alias within its anchor."""
    known: dict[int, int] = {}
    within: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in within:
            raise DocumentError("an alias stands within what it is the alias of")
        if id(node) not in known:
            within.add(id(node))
            known[id(node)] = 1 + sum(map(size, _children(node)))
            within.remove(id(node))
            if known[id(node)] > MOST_NODES:
                raise DocumentError("its aliases stand for more than a million nodes")
        return known[id(node)]

    size(root)


def _check_keys(node: yaml.Node) -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise DocumentError(f"{twice!r} is given twice; keep one")
    for child in _children(node):
        _check_keys(child)


def size_problem(length: int, most: int, what: str) -> str | None:
    """What is wrong with a file of `length` bytes; None where it is not too large to be one."""
    if length <= most:
        return None
    return (
        f"{length / 1e6:.0f} MB are too many for {what} (at most {most / 1e6:.0f} MB); is it the "
        "right file?"
    )


_FOLDER = 0x10  # of the attributes of MS-DOS, the lowest byte of a member's


def check_stored(archive: zipfile.ZipFile) -> None:
    """That an archive is as torch.save writes it: a few kilobytes cannot stand for all memory.

    Nothing that has content is marked as a folder either, which one flipped bit does: of a tensor
    so marked torch reads nothing, and hands out memory as it found it.

    Raises:
        BadZipFile: something in it is compressed, or such a folder, which torch never writes.
    """
    for member in archive.infolist():
        if member.file_size and (member.is_dir() or member.external_attr & _FOLDER):
            raise zipfile.BadZipFile(f"{member.filename} is marked as a folder")
        if member.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{member.filename} is compressed")


def is_file_name(name: object) -> bool:
    """Whether a name that stands in a file is that of a file of one folder, and leads out of none.

    >>> [is_file_name(name) for name in ("a.pt", "../a.pt", "..", "/a.pt", "b\\\\a.pt", 7)]
    [True, False, False, False, False, False]
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\\\0") & set(name)


class Table(list[str]):
    """A CSV that grows by rows, and reads back as it was written.

    Python's own writer leaves a carriage return bare where lines end in "\\n" (before 3.13), and a
    reader then takes it for the end of a row; generated text may hold any character.
    """

    def writerow(self, row: Sequence[object]) -> None:
        file = io.StringIO(newline="")
        cells = [c.replace("\0", "\ufffd") if isinstance(c, str) else c for c in row]
        csv.writer(file, lineterminator="\r\n").writerow(cells)
        self.append(file.getvalue().removesuffix("\r\n"))

    def text(self) -> str:
        """The whole of it; lines end in a line feed."""
        return "".join(f"{line}\n" for line in self)
