"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slidevlm.files import replacing


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_there_when_all_of_it_is(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with replacing(path) as new:
            with new.open("w") as file:
                file.write(text)
            assert (path.read_text() if path.exists() else None) == before
            assert new.parent == path.parent, "a rename over two disks is none"
            assert new.name.startswith(".") and new.suffix != path.suffix, "taken for another"
        assert path.read_text() == text and names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as new:
        new.write_text("ne")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with pytest.raises(error), replacing(path):
        raise error  # before there is anything to take away


def test_whoever_may_read_other_new_files_may_read_this(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.txt") as new:
            new.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
