"""A whole run on a folder of slide files with a slide table."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from slidevlm.cli import main


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """16 specimens, the first of two slides, as TRIDENT writes them; the words of a run."""
    folder, rng = tmp_path / "slides", np.random.default_rng(0)
    folder.mkdir()
    table, texts = ["case_id,patient,slide_id"], {}
    for number in range(17):
        specimen = f"s{max(0, number - 1)}"
        with h5py.File(folder / f"{number}.h5", "w") as file:
            file["features"] = rng.normal(size=(9, 8)).astype(np.float32)
            file["coords"] = rng.integers(0, 9999, (9, 2))
            file["features"].attrs["encoder"] = "uni"
            file["coords"].attrs["patch_size_level0"] = 512
        table.append(f"{specimen},p{specimen},{number}.svs")
        texts[specimen] = f"Report of {specimen}, which is number {number}."
    (tmp_path / "table.csv").write_text("\n".join(table))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "train.txt").write_text(",".join(f"s{i}" for i in range(12)))
    (tmp_path / "val.txt").write_text(",".join(f"ps{i}" for i in range(12, 16)))
    return [
        "train", "--root-dir", str(folder), "--slide-table", str(tmp_path / "table.csv"),
        "--text-data-file", str(tmp_path / "texts.json"), "--model", "coca_tiny",
        "--train-split", str(tmp_path / "train.txt"), "--val-split", str(tmp_path / "val.txt"),
        "--batch-size", "6", "--epochs", "1", "--warmup", "1", "--workers", "1", "--device", "cpu",
        "--logs", str(tmp_path / "logs"), "--name", "run",
    ]  # fmt: skip


def test_training_on_slides(words, tmp_path, capsys):
    assert main(words) == 0
    assert "split train: 12 specimens" in capsys.readouterr().err
    assert list((tmp_path / "logs/run/checkpoints").glob("*.pt"))


def test_a_mixed_cohort_ends_before_the_first_step(words, tmp_path, capsys):
    with h5py.File(tmp_path / "slides/5.h5", "a") as file:
        file["features"].attrs["encoder"] = "conch"
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "15 have uni" in message and "1 have conch (such as s4)" in message
