"""The commands of the README are found; CI runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location(
    "readme_commands", ROOT / "scripts/readme_commands.py"
)
assert SPEC is not None and SPEC.loader is not None
readme_commands = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme_commands)


def test_marked_blocks_are_taken_and_others_left() -> None:
    text = (
        "<!-- ci:run -->\n```sh\na\nb\n```\n\n```sh\nnot me\n```\n<!-- ci:run -->\n```sh\nc\n```\n"
    )
    assert readme_commands.commands(text) == "a\nb\nc\n"


def test_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block"):
        readme_commands.commands("```sh\na\n```")


def test_the_readme_has_commands() -> None:
    assert "slidevlm train" in readme_commands.commands((ROOT / "README.md").read_text())


@pytest.mark.parametrize(
    "stray",
    [
        "<!-- ci:run -->\n\n```sh\nafter an empty line\n```\n",
        "<!-- ci:run -->\n```python\nanother language\n```\n",
        "<!-- ci:run -->\ntext\n",
        "<!-- ci:run -->\n```sh\nnever closed\n",
    ],
)
def test_a_mark_without_its_block_is_an_error(stray: str) -> None:
    with pytest.raises(ValueError, match="2 marks"):
        readme_commands.commands("<!-- ci:run -->\n```sh\na\n```\n" + stray)


def test_backquotes_within_a_command_do_not_end_the_block() -> None:
    text = "<!-- ci:run -->\n```sh\necho '```'\necho b\n```\n"
    assert readme_commands.commands(text) == "echo '```'\necho b\n"
