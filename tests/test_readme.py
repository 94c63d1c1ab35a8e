"""The commands of the README are found; CI runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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


# Every page that shows commands which must work, each from nothing.
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "<!-- ci:run -->" in page.read_text(encoding="utf-8")
]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a training on whatever machine this is
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_work_as_they_are_written(page: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, words in {"slidevlm": "-m slidevlm", "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (tools / name).chmod(0o755)
    script, place = tmp_path / "page.sh", tmp_path / "checkout"
    script.write_text(readme_commands.commands(page.read_text(encoding="utf-8")))
    place.mkdir()
    for part in ("examples", "src", "docs"):  # what commands of a page may name
        (place / part).symlink_to(ROOT / part)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", str(script)],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    if page.name == "README.md":
        _newcomer_has_a_report(place)


def _newcomer_has_a_report(place: Path) -> None:
    """The end of the path from a clone to a captioned file of one's own."""
    head, report = (place / "demo/my_slide.txt").read_text().splitlines()
    assert head.startswith("# model ")
    name, text = report.split("\t")
    assert name == "my_slide" and len(text.split()) > 5
    with np.load(place / "demo/my_slide.npz") as file:
        assert file["specimen_ids"].tolist() == ["my_slide"]
        assert np.linalg.norm(file["image_embedding"], axis=1) == pytest.approx(1, abs=1e-4)
    assert json.loads((place / "logs/first/test.json").read_text())["metrics"]


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
