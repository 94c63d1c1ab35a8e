"""The demo from nothing to results, as a user starts it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from slidevlm.cli import main
from slidevlm.flags import parse_config


@pytest.mark.slow
def test_from_nothing_to_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    words = ["demo", str(folder), "--specimens", "20", "--epochs", "1", "--workers", "0"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for line in re.findall(rf"^  ({re.escape(str(folder))}\S+) ", shown, re.MULTILINE):
        assert Path(line).exists(), "every place that it names is there"
    run = folder / "runs/demo"
    for name in ("test.md", "captions_test.json", "metrics.jsonl", "config.yaml", "checkpoints"):
        assert f"{run}/{name}" in shown
    result = json.loads((run / "test.json").read_text())["metrics"]
    for task in ("diagnosis", "grade", "margin"):
        assert 0 <= result[f"test/zero_shot/{task}/balanced_accuracy"] <= 1
    assert 0 < result["test/image_to_text/R@10"] <= 1
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in told if line["kind"] == "evaluation"] == [1.0]
    tests = set((folder / "cohort/test.txt").read_text().split())
    assert {w["id"] for w in json.loads((run / "captions_test.json").read_text())} == tests
    again, _ = parse_config(["--config", str(run / "config.yaml")])
    assert (again.optim.epochs, again.evaluation.val_gen_top_k) == (1, 1)

    before = (run / "test.json").read_bytes()
    assert main(words) == 2, "a second demo does not write over the first"
    assert "remove it or give another folder" in capsys.readouterr().err
    assert (run / "test.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--specimens", "19"], "--specimens must be at least 20, not 19"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--workers", "-1"], "--workers must be at least 0, not -1"),
        (["--specimen", "30"], "did you mean --specimens"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["demo", str(tmp_path / "demo"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_cohort_alone_has_the_same_ranges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "synthesize", str(tmp_path / "cohort"), "--seed", "-1"]) == 2
    assert "--seed must be at least 0, not -1" in capsys.readouterr().err
    assert not (tmp_path / "cohort").exists()
