"""The files of an evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slidevlm.app.outputs import Outputs
from slidevlm.batch import Predictions
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.stored import Stored
from slidevlm.run import Run


def predictions(specimen: str) -> Predictions:
    row = np.ones((1, 2), np.float32)
    return Predictions((specimen,), ("p",), ("a report",), np.zeros(1, np.int64), row, row)


def test_embeddings_of_splits_that_differ_after_a_dot(tmp_path: Path) -> None:
    splits = {"val.site_a": predictions("s1"), "val.site_b": predictions("s2")}
    with Run(tmp_path) as run:
        stored = Stored(splits, {}, (), np.zeros((0, 2), np.float32), {})
        Outputs(run, "", Bootstrap()).embeddings(stored)
    for name, split in splits.items():
        with np.load(tmp_path / "embeddings" / f"{name}.npz") as file:
            assert file["specimen_ids"].tolist() == list(split.specimen_ids)
    expected = {f"{name}{ending}" for name in splits for ending in ("", ".npz")}
    assert {p.name for p in (tmp_path / "embeddings").iterdir()} == expected
