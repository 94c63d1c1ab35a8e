"""A run whose model starts from canonical correlations: it knows something, and resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm.app import train
from slidevlm.config import Config, with_values
from slidevlm.errors import DataError
from slidevlm.models import zoo
from slidevlm.train import checkpoint as ckpt


def model_file(folder: Path) -> str:
    content = zoo.load("coca_tiny").to_dict()
    content["text"]["prior_rank"] = 0
    content["alignment"] = {"rank": 8, "random_features": 16}
    path = folder / "aligned.json"
    path.write_text(json.dumps(content))
    return str(path)


def run(settings: dict[str, Any], **more: Any) -> Path:
    values = {**settings, **more}
    train(with_values(Config(), values))
    return Path(values["logs"]) / values["name"]


def weights(folder: Path, file: str) -> dict[str, torch.Tensor]:
    return ckpt.load(folder / "checkpoints" / file)[0].weights


def test_a_run_starts_aligned_and_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"model": model_file(tmp_path), "warmup": 0, "lr": 1e-2}
    whole = weights(run(settings, name="whole", epochs=2, **chosen), "epoch_2.pt")
    assert whole["alignment.directions"].abs().sum() > 0
    assert whole["alignment.image_gate"].item() != 0  # from 0, so it has learnt
    run(settings, name="parts", epochs=2, save_every_n_steps=1, **chosen)
    folder = Path(settings["logs"]) / "parts" / "checkpoints"
    within = sorted(folder.glob("*step*"))
    assert within, sorted(p.name for p in folder.iterdir())
    again = run(settings, name="again", epochs=2, resume=str(within[0]), **chosen)
    found = weights(again, "epoch_2.pt")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_reports_without_words_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    from slidevlm.app import aligning

    chosen = {"model": model_file(tmp_path), "name": "none"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligning, "_features", lambda *_: None)
        with pytest.raises(DataError, match="the model's alignment needs two at least"):
            run(settings, **chosen)
