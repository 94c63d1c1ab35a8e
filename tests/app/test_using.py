"""What commands keep of the specimens that are done."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

from slidevlm.app.using import Partial


def test_going_on_adds_to_what_is_there(tmp_path: Path) -> None:
    """Nothing is written again: of a million specimens that would be gigabytes at each start."""
    with Partial(tmp_path / "e.npz", {"of": "a"}) as begun:
        for name in "abc":
            begun.add({"id": name, "text": "é"})
    path = begun.path
    whole = path.read_bytes()
    path.write_bytes(whole + '{"id": "d", "text": "é'.encode()[:-1])  # killed within a character
    inode = path.stat().st_ino
    again = Partial(tmp_path / "e.npz", {"of": "a"})
    assert list(again.records) == ["a", "b", "c"]
    with again:
        again.add({"id": "d", "text": "whole"})
    assert path.stat().st_ino == inode and path.read_bytes().startswith(whole)
    third = Partial(tmp_path / "e.npz", {"of": "a"})
    assert third.records == {**begun.records, "d": {"id": "d", "text": "whole"}}
    before = path.read_bytes()
    with third:
        third.add({"id": "e", "text": ""})
    assert path.read_bytes() == before + b'{"id": "e", "text": ""}\n'


def test_going_on_takes_the_memory_of_the_records_alone(tmp_path: Path) -> None:
    with Partial(tmp_path / "e.npz", {"of": "a"}) as begun:
        for number in range(1000):
            begun.add({"id": str(number), "embedding": "x" * 10_000})
    tracemalloc.start()
    try:
        with Partial(tmp_path / "e.npz", {"of": "a"}) as again:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(again.records) == 1000
    assert peak < 1.5 * begun.path.stat().st_size
