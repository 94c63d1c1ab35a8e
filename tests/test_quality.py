"""The runner of `make quality`: side by side, what a failure says, what is not computed again."""

from __future__ import annotations

import importlib
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from slidevlm.data.splits import read_identifiers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quality() -> Any:
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.quality")
    finally:
        sys.path.remove(str(ROOT))


def test_tasks_run_side_by_side_and_keep_their_order(quality: Any) -> None:
    both = threading.Barrier(2, timeout=60)

    def task(number: int) -> Path:
        both.wait()  # one after the other they would wait for ever
        return Path(str(number))

    tasks = [partial(task, n) for n in range(4)]
    assert quality.side_by_side(tasks, 2) == [Path(str(n)) for n in range(4)]


def test_after_a_failure_nothing_more_begins(quality: Any) -> None:
    begun = []

    def task(number: int) -> Path:
        begun.append(number)
        raise RuntimeError(f"task {number}")

    with pytest.raises(RuntimeError, match="task 0"):
        quality.side_by_side([partial(task, n) for n in range(5)], 1)
    assert begun == [0]


def test_a_command_keeps_its_log_and_seconds_and_a_failure_shows_its_end(
    quality: Any, tmp_path: Path
) -> None:
    commands = quality.Commands(tmp_path, at_once=64)
    assert commands.environment["OMP_NUM_THREADS"] == "1"
    commands("version", "--version")
    assert (tmp_path / "version.log").read_text().strip()
    assert list(commands.seconds) == ["version"]
    with pytest.raises(RuntimeError, match=r"(?s)wrong ended with 2.*nonsense"):
        commands("wrong", "nonsense")
    assert list(commands.seconds) == ["version"]


def test_what_is_there_is_not_computed_again(quality: Any, tmp_path: Path) -> None:
    run = tmp_path / "tcga-3"
    (run / "evaluation-1").mkdir(parents=True)
    for name in ("test.json", "evaluation-1/metrics.json", "slides.npz"):
        (run / name).touch()
    named: list[str] = []

    def commands(name: str, *words: object) -> None:
        named.append(name)

    assert quality.tcga_run(3, tmp_path, tmp_path, commands) == run
    assert named == ["caption-tcga-3"]


def test_refit_trains_on_both_splits_and_validates_on_none(quality: Any, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for folder in (data, out):
        folder.mkdir()
    (data / "train.txt").write_text("a,\nb")
    (data / "val.txt").write_text("c\n")
    (data / "test.txt").write_text("d\n")
    for _ in range(2):  # a run that was stopped goes on
        joined, recipe = quality.joined(data, out)
    assert read_identifiers(joined / "train.txt") == ["a", "b", "c"]
    assert read_identifiers(joined / "test.txt") == ["d"]
    assert (data / "train.txt").read_text() == "a,\nb", "the data are as they were"
    settings, kept = (yaml.safe_load(f.read_text()) for f in (quality.RECIPE, recipe))
    assert settings.items() >= kept.items() and kept["epochs"] == settings["epochs"]
    given: list[tuple[object, ...]] = []

    def commands(name: str, *words: object) -> None:
        given.append(words)

    quality.tcga_run(0, joined, out, commands, recipe, reports=False)
    assert [words[0] for words in given] == ["train", "evaluate"]
    assert recipe in given[0] and "--val-split" not in given[0]
