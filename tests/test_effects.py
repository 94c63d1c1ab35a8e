"""Every argument has its effect: where it is, and the tests that show it, are there.

docs/spec/effects.yaml says it for each of them; docs/arguments.md is made of it.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slidevlm.flags import Argument, arguments, markdown_effects, markdown_table

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TESTS = ROOT / "src/slidevlm", ROOT / "tests"
ARGUMENTS = {a.flag: a for a in arguments()}


@pytest.fixture(scope="module")
def effects() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docs/spec/effects.yaml").read_text())


@functools.cache
def functions_of(file: str) -> frozenset[str]:
    path = TESTS / f"{file}.py"
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef))


def problems(effects: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the table, an argument at a time."""
    for flag in ARGUMENTS.keys() - effects.keys():
        yield f"{flag}: no entry in docs/spec/effects.yaml"
    for flag in effects.keys() - ARGUMENTS.keys():
        yield f"{flag}: no such argument"
    for flag, effect in effects.items():
        if unknown := effect.keys() - {"in", "shown", "edges"}:
            yield f"{flag}: unknown keys {sorted(unknown)}"
        if flag in ARGUMENTS:
            yield from _of_one(ARGUMENTS[flag], effect)


def _of_one(argument: Argument, effect: dict[str, Any]) -> Iterator[str]:
    flag, name = argument.flag, argument.name
    modules, shown = effect.get("in", []), effect.get("shown", [])
    if not modules or not shown:
        yield f"{flag}: names no module or no test"
    for module in modules:
        if not (SOURCE / f"{module}.py").is_file():
            yield f"{flag}: no module {module}"
    if not any(_reads(SOURCE / f"{module}.py", name) for module in modules):
        yield f"{flag}: none of {modules} reads .{name}"
    for test in (*shown, *effect.get("edges", {}).values()):
        file, _, function = test.partition("::")
        if not function.startswith("test_") or function not in functions_of(file):
            yield f"{flag}: no test {test}"
    if not any(_speaks_of(TESTS / f"{test.partition('::')[0]}.py", argument) for test in shown):
        yield f"{flag}: no file of {shown} gives it a value"


def _reads(module: Path, name: str) -> bool:
    if not module.is_file():
        return False
    nodes = ast.walk(ast.parse(module.read_text()))
    return any(isinstance(n, ast.Attribute) and n.attr == name for n in nodes)


def _speaks_of(file: Path, argument: Argument) -> bool:
    """As a flag or as the name of a field that is set."""
    name = re.escape(argument.name)
    words = rf"""{re.escape(argument.flag)}(?![\w-])|["']{name}["']|\b{name}\s*="""
    return file.is_file() and re.search(words, file.read_text()) is not None


def test_every_argument_has_its_effect_and_a_test_of_it(effects: dict[str, Any]) -> None:
    assert list(problems(effects)) == []


@pytest.mark.parametrize(
    ("flag", "change", "message"),
    [
        ("--lr", None, "no entry"),
        ("--lr", {"shown": []}, "no module or no test"),
        ("--lr", {"shown": ["app/test_fitting::test_that_is_not_there"]}, "no test app/test_fit"),
        ("--lr", {"shown": ["app/test_nowhere::test_rates"]}, "no test app/test_nowhere"),
        ("--lr", {"shown": ["test_registry::test_at_most_three"]}, "gives it a value"),
        ("--lr", {"edges": {"x": "test_config::test_nothing"}}, "no test test_config::test_no"),
        ("--lr", {"in": ["train/nowhere"]}, "no module train/nowhere"),
        ("--lr", {"in": ["errors"]}, r"reads .lr"),
        ("--lr", {"shwon": []}, "unknown keys"),
        ("--nothing", {"in": ["errors"], "shown": []}, "no such argument"),
    ],
)
def test_a_table_that_has_gone_stale_is_found(
    effects: dict[str, Any], flag: str, change: dict[str, Any] | None, message: str
) -> None:
    spoilt = {key: value for key, value in effects.items() if key != flag}
    if change is not None:
        spoilt[flag] = {**effects.get(flag, {}), **change}
    assert any(problem.startswith(flag) and message in problem for problem in problems(spoilt))


def test_the_page_is_made_of_the_declarations_and_the_table(effects: dict[str, Any]) -> None:
    page = (ROOT / "docs/arguments.md").read_text()
    assert page == markdown_table() + markdown_effects(effects), "run: make docs"
