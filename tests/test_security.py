"""docs/security.md is true: its files, tests and attacks are there. And rules of the source that
make a guard hold wherever such a file is read, also in code that is yet to be written.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TESTS, PAGE = ROOT / "src/slidevlm", ROOT / "tests", ROOT / "docs/security.md"
_ROW = re.compile(r"^\|(?P<threat>[^|]+)\|(?P<guard>[^|]+)\|(?P<test>[^|]+)\|$", re.MULTILINE)


# --- the page -----------------------------------------------------------------------------------


@functools.cache
def names_in(file: str) -> frozenset[str]:
    """What is defined at the top of a file of tests."""
    path = TESTS / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef))


@functools.cache
def attacks() -> frozenset[str]:
    """Names of the attacks: the keys of the tables of tests/hard/test_guards.py."""
    tree = ast.parse((TESTS / "hard/test_guards.py").read_text())
    tables = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("GUARDS", "PAGES", "SCRIPT")
    ]
    assert len(tables) == 3
    keys = [key for table in tables if isinstance(table, ast.Dict) for key in table.keys]
    return frozenset(key.value for key in keys if isinstance(key, ast.Constant))


def problems(page: str) -> Iterator[str]:
    """What is wrong with the page."""
    rows = [m for m in _ROW.finditer(page) if not set(m["test"]) <= set("- ")]
    rows = [m for m in rows if m["threat"].strip() != "threat"]
    named: set[str] = set()
    for row in rows:
        threat = row["threat"].strip()
        files = re.findall(r"`([\w/]+\.(?:py|js))`", row["guard"])
        if not files and "rules of the source" not in row["guard"]:
            yield f"{threat}: names no file"
        for file in files:
            if not (SOURCE / file).is_file():
                yield f"{threat}: no file {file}"
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", row["test"])
        mine = re.findall(r"\[([^\]]+)\]", row["test"])
        if not tests and not mine:
            yield f"{threat}: names no test"
        for file, name in tests:
            if name not in names_in(file):
                yield f"{threat}: no test {file}::{name}"
        for name in mine:
            if name not in attacks():
                yield f"{threat}: no attack {name}"
        named.update(mine)
    for name in sorted(attacks() - named):
        yield f"{name}: no row names this attack"


def test_the_page_names_what_is_there_and_every_attack() -> None:
    page = PAGE.read_text()
    assert list(problems(page)) == []
    assert len(_ROW.findall(page)) > 40


@pytest.mark.parametrize(
    ("there", "instead", "message"),
    [
        ("[YAML tag],", "", "YAML tag: no row names this attack"),
        ("[YAML tag],", "[YAML tags],", "no attack YAML tags"),
        ("`eval/stored.py`", "`eval/storage.py`", "no file eval/storage.py"),
        ("`eval/stored.py`", "", "names no file"),
        ("::test_json_nested_without_end", "::test_json_nested", "no test hard/test_malicious.py"),
        ("`hard/test_malicious.py::test_case_paths_stay_in_their_file`", "-x", "names no test"),
    ],
)
def test_a_page_that_has_gone_stale_is_found(there: str, instead: str, message: str) -> None:
    page = PAGE.read_text()
    assert there in page
    assert any(message in problem for problem in problems(page.replace(there, instead)))


# --- the source ---------------------------------------------------------------------------------

_RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile"}
_UNPACK = {"extractall", "extract", "unpack_archive"}
_ANSWERS = {  # what must be told to functions that otherwise may run code, or ask whether to
    ("torch", "load"): ("weights_only", True),
    ("np", "load"): ("allow_pickle", False),
}
_TRUST = ("from_pretrained", "from_config")
# Who opens HDF5 to read it: the class that looks at links, and what reads back its own file.
_HDF5 = ("data/formats/hdf5.py", "data/formats/hdf5_target.py")
_YAML = {"documents.py": None, "flags.py": {"safe_dump", "safe_load"}}  # flags: the project's own
_HTML = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function")


def broken_rules(file: str, source: str) -> Iterator[str]:
    """Rules of the source that a file breaks."""
    if file.endswith(".js"):
        yield from (f"{file}: {word}" for word in _HTML.findall(source))
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} & _RUN_CODE:
                yield f"{file}: imports {name}"
        elif isinstance(node, ast.Call):
            yield from _call(file, node)


def _call(file: str, node: ast.Call) -> Iterator[str]:
    function = node.func
    told = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if isinstance(function, ast.Name) and function.id in ("eval", "exec"):
        yield f"{file}: {function.id}()"
    if not isinstance(function, ast.Attribute):
        return
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    name = function.attr
    word, answer = _ANSWERS.get((owner, name), ("", None))
    if word and told.get(word) is not answer:
        yield f"{file}: {owner}.{name} without {word}={answer}"
    if name in _TRUST and told.get("trust_remote_code") is not False:
        yield f"{file}: {name} without trust_remote_code=False"
    if name in _UNPACK:
        yield f"{file}: {name} unpacks an archive"
    if told.get("shell") is True:
        yield f"{file}: {name} by a shell"
    if (owner, name) == ("h5py", "File") and file not in _HDF5 and not _writes(node):
        yield f"{file}: h5py.File to read"
    if owner == "yaml" and file != "documents.py" and name not in (_YAML.get(file) or ()):
        yield f"{file}: yaml.{name}"


def _writes(node: ast.Call) -> bool:
    mode = node.args[1] if len(node.args) > 1 else None
    return isinstance(mode, ast.Constant) and mode.value == "w"


def test_the_source_keeps_the_rules() -> None:
    files = [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.js")]
    assert len(files) > 150
    found = [
        problem
        for path in files
        for problem in broken_rules(path.relative_to(SOURCE).as_posix(), path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("a.py", "import pickle", "imports pickle"),
        ("a.py", "def f():\n    from joblib import load", "imports joblib"),
        ("a.py", "torch.load(path)", "torch.load without weights_only=True"),
        ("a.py", "torch.load(path, weights_only=wanted)", "without weights_only=True"),
        ("a.py", "np.load(path)", "np.load without allow_pickle=False"),
        ("a.py", "np.load(path, allow_pickle=True)", "without allow_pickle=False"),
        ("a.py", "AutoModel.from_pretrained(path)", "without trust_remote_code=False"),
        ("a.py", "eval(text)", "eval()"),
        ("a.py", "archive.extractall(folder)", "unpacks"),
        ("a.py", "subprocess.run(text, shell=True)", "by a shell"),
        ("a.py", "h5py.File(path)", "h5py.File to read"),
        ("a.py", "h5py.File(path, 'r+')", "h5py.File to read"),
        ("flags.py", "yaml.load(text)", "yaml.load"),
        ("a.py", "yaml.safe_load(text)", "yaml.safe_load"),
        ("a.js", "node.innerHTML = text", "innerHTML"),
    ],
)
def test_a_broken_rule_is_found(file: str, source: str, message: str) -> None:
    assert any(message in problem for problem in broken_rules(file, source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True, mmap=True)",
        "np.load(path, allow_pickle=False)",
        "h5py.File(path, 'w')",
        "re.compile(text)",
    ],
)
def test_what_the_rules_allow(source: str) -> None:
    assert list(broken_rules("a.py", source)) == []
