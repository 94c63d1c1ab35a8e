"""The default name of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from slidevlm.app.folders import default_name
from slidevlm.config import Config, with_values

TIME = r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d"
SETTINGS = {"lr": 5e-4, "batch_size": 8, "workers": 2, "precision": "fp32"}
RUN = "2026_11_30-11_19_48-model_coca_tiny-lr_0.0005-b_8-j_2-p_fp32"


def model_in_name(values: Mapping[str, object]) -> str:
    name = default_name(with_values(Config(), {**SETTINGS, **values}))
    found = re.fullmatch(rf"{TIME}-model_(.*)-lr_0\.0005-b_8-j_2-p_fp32", name)
    assert found is not None, name
    return found[1]


@pytest.mark.parametrize(
    ("values", "model"),
    [
        ({}, "coca_stage_1"),
        ({"model": "coca_tiny"}, "coca_tiny"),
        ({"model": "models/mine.v2.json"}, "mine.v2"),
        ({"model": "coca_stage_1", "pretrained": "logs/first"}, "coca_stage_1"),
        ({"pretrained": "logs/first"}, "first"),
        ({"pretrained": "raw:logs/first/"}, "first"),
        ({"pretrained": "logs/first/checkpoints/epoch_3.pt"}, "first"),
        ({"pretrained": "weights/mine.v2.safetensors"}, "mine.v2"),
        ({"pretrained": "hf-hub:owner/name.v2"}, "name.v2"),
        ({"pretrained": "a_tag"}, "a_tag"),
        ({"pretrained": "."}, "here"),
        ({"pretrained": f"logs/{RUN}"}, RUN[:40]),
    ],
)
def test_the_model_is_that_of_the_weights_where_none_is_named(
    values: Mapping[str, object], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/weights").mkdir(parents=True)
    (tmp_path / "here/weights/mine.v2.safetensors").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert model_in_name(values) == model


def test_names_of_runs_from_runs_do_not_grow(tmp_path: Path) -> None:
    names = [default_name(with_values(Config(), SETTINGS))]
    for _ in range(5):
        names.append(
            default_name(with_values(Config(), {**SETTINGS, "pretrained": f"logs/{names[-1]}"}))
        )
    assert len(names[-1]) == len(names[1]) < 110
