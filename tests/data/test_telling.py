from __future__ import annotations

import logging

import pytest

from slidevlm.data import reports, telling
from slidevlm.data.formats import open_folder
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.reports import read_text_file
from slidevlm.data.splits import resolve
from slidevlm.data.telling import Telling


@pytest.fixture
def clock(monkeypatch):
    """A list whose only element is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def info(caplog):
    caplog.set_level(logging.INFO, "slidevlm")
    return caplog


def test_a_line_after_some_seconds_and_then_every_ten(clock, info):
    for item in Telling("reading", 30).over(range(30)):
        clock[0] += 1
        assert item == clock[0] - 101
    assert info.messages == ["reading: 3 of 30", "reading: 13 of 30", "reading: 23 of 30"]


def test_what_is_quick_is_not_told(clock, info):
    for _ in Telling("reading", 1000).over(range(1000)):
        clock[0] += 0.002
    assert info.messages == []


def test_several_runs_count_as_one(clock, info):
    listing = Telling("listing")
    for _ in range(3):
        for _ in listing.over("ab"):
            clock[0] += 1
    assert info.messages == ["listing: 3 so far"]


def test_a_folder_and_the_reports_of_a_split_are_told(write, tmp_path, info, monkeypatch):
    path = write([1, 2, 3])
    (tmp_path / "test.txt").write_text("s0,s1,s2")
    store = Hdf5Cases(path, "uni", "report")
    quiet = resolve(tmp_path / "test.txt", store)
    assert info.messages == []
    monkeypatch.setattr(telling, "FIRST_SECONDS", 0.0)
    assert resolve(tmp_path / "test.txt", store) == quiet
    assert info.messages == [
        "looking for features of specimens: 0 of 3",
        "split test: reading reports: 0 of 3",
    ]
    info.clear()
    open_folder(tmp_path)
    assert f"listing {tmp_path}: 0 so far" in info.messages


def test_a_large_file_of_reports_is_told_before_it_is_parsed(tmp_path, info, monkeypatch):
    (tmp_path / "a.json").write_text('{"a": "Liver."}')
    read_text_file(tmp_path / "a.json")
    assert info.messages == []
    monkeypatch.setattr(reports, "_LARGE", 10)
    read_text_file(tmp_path / "a.json")
    assert info.messages == [f"reading the reports of {tmp_path / 'a.json'}, 0 million letters"]
