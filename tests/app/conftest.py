"""What tests of whole runs share: a small cohort and the arguments of a short training on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slidevlm.data.synthetic import DemoCohort, synthesize


@pytest.fixture(scope="module")
def cohort(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    """Synthetic specimens, as many as the module's SPECIMENS says."""
    number = getattr(request.module, "SPECIMENS", 30)
    return synthesize(tmp_path_factory.mktemp("demo") / "cohort", specimens=number, seed=1)


@pytest.fixture
def settings(request: pytest.FixtureRequest, cohort: DemoCohort, tmp_path: Path) -> dict[str, Any]:
    """Two epochs of `cohort`, with what the module's SETTINGS says otherwise.

    There is a validation split where SETTINGS has `val_split`, of whatever value.
    """
    values: dict[str, Any] = {
        "hdf5_filename": str(cohort.hdf5),
        "hdf5_feature_attribute": "demo",
        "hdf5_text_attribute": "report",
        "train_split": str(cohort.split("train")),
        "model": "coca_tiny",
        "batch_size": 8,
        "image_features_cutoff": 20,
        "workers": 0,
        "epochs": 2,
        "precision": "fp32",
        "device": "cpu",
        "log_every_n_steps": 1,
        "logs": str(tmp_path / "logs"),
        "name": "run",
        **getattr(request.module, "SETTINGS", {}),
    }
    if "val_split" in values:
        values["val_split"] = (str(cohort.split("val")),)
    return values
