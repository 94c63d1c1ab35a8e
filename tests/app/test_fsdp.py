"""A run with --fsdp on two processes is the run without it; either goes on where the other was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm.app import train
from slidevlm.app.devices import check_exchange
from slidevlm.config import Config, with_values
from slidevlm.data.synthetic import DemoCohort, synthesize
from slidevlm.errors import ConfigError
from slidevlm.flags import arguments
from slidevlm.train import checkpoint as ckpt

FLAGS = {a.name: a.flag for a in arguments()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return synthesize(tmp_path_factory.mktemp("demo") / "cohort", specimens=30, seed=1)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def settings(cohort: DemoCohort, logs: Path) -> dict[str, Any]:
    """Two steps an epoch of a global batch of 8, two epochs, everything that reads weights."""
    return {
        "hdf5_filename": cohort.hdf5,
        "hdf5_feature_attribute": "demo",
        "hdf5_text_attribute": "report",
        "train_split": cohort.split("train"),
        "val_split": cohort.split("val"),
        "test_split": cohort.split("test"),
        "zsc_class_prompt_mapping": cohort.hdf5.parent / "diagnosis_prompts.json",
        "zsc_specimen_class_mapping": cohort.hdf5.parent / "diagnosis.json",
        "model": "coca_tiny",
        "batch_size": 4,
        "image_features_cutoff": 20,
        "workers": 0,
        "epochs": 2,
        "warmup": 0,
        "lr": 1e-2,
        "eps": 1e-3,
        "precision": "fp32",
        "device": "cpu",
        "dist_backend": "gloo",
        "log_every_n_steps": 1,
        "save_every_n_steps": 1,
        "save_best": "val/loss/caption",
        "ema": 0.9,
        "logs": logs,
    }


def torchrun(settings: dict[str, Any], *flags: str, **more: Any) -> str:
    words = [w for k, v in {**settings, **more}.items() for w in (FLAGS[k], str(v))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, "-m", "--", "slidevlm", "train", *words, *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def plain(settings: dict[str, Any]) -> Path:
    torchrun(settings, "--save-captions", name="plain")
    return settings["logs"] / "plain"


@pytest.fixture(scope="module")
def cut(settings: dict[str, Any]) -> Path:
    told = torchrun(settings, "--save-captions", "--fsdp", name="cut")
    assert "--fsdp: 0.05 million numbers on this process" in told
    assert "FSDP2-wrapped" not in told and "Traceback" not in told
    return settings["logs"] / "cut"


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    told = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in told if line["kind"] == kind]


def saved(folder: Path, file: str = "epoch_2.pt") -> tuple[dict[str, torch.Tensor], Any]:
    """All tensors by name, and the rest of the optimizer's state."""
    model, training = ckpt.load(folder / "checkpoints" / file)
    groups = training.optimizer["param_groups"]
    found = {**model.weights, **{f"mean {n}": t for n, t in model.averaged.items()}}
    for group in groups:
        for number, name in zip(group["params"], group["names"], strict=True):
            for key, value in training.optimizer["state"][number].items():
                found[f"{key} {name}"] = value
    return found, [{k: v for k, v in g.items() if k != "params"} for g in groups]


def same(a: Path, b: Path, atol: float, file: str = "epoch_2.pt") -> None:
    (one, groups), (other, others) = saved(a, file), saved(b, file)
    assert one.keys() == other.keys() and groups == others
    for name in one:
        assert one[name].shape == other[name].shape and one[name].dtype == other[name].dtype
        difference = (one[name] - other[name]).abs().max().item()
        assert difference <= atol, (name, difference)


@pytest.mark.slow
def test_the_run_is_that_without(plain: Path, cut: Path) -> None:
    """Weights, averages, moments, losses, evaluations, reports: with two addends to rounding."""
    for file in ("step_1.pt", "step_3.pt", "epoch_2.pt", "best.pt"):
        same(plain, cut, 1e-6, file)
    for kind in ("train", "evaluation"):
        for a, b in zip(lines(plain, kind), lines(cut, kind), strict=True):
            timeless = {k for k in a if "second" not in k and k != "time"}
            assert {k: a[k] for k in timeless} == pytest.approx(
                {k: b[k] for k in timeless}, abs=1e-5, nan_ok=True
            )
    for file in ("captions_test.json", "captions_epoch_2.json", "parameter_groups.txt"):
        assert (plain / file).read_text() == (cut / file).read_text(), file
    # The hash of all weights, of which no process has more than half.
    told = [json.loads((f / "test.json").read_text())["about"] for f in (plain, cut)]
    assert told[0]["data_hash"] == told[1]["data_hash"] and told[1]["model_hash"]
    assert (cut / "checkpoints/epoch_2.pt").stat().st_size == pytest.approx(
        (plain / "checkpoints/epoch_2.pt").stat().st_size, rel=0.01
    )


def begun(logs: Path, of: Path, name: str) -> Path:
    """A run that ended after three of four steps."""
    folder = logs / name
    shutil.copytree(of, folder)
    for file in (folder / "checkpoints").iterdir():
        if file.name != "step_3.pt":
            file.unlink()
    return folder


@pytest.mark.slow
def test_going_on_is_exact(settings: dict[str, Any], logs: Path, cut: Path) -> None:
    folder = begun(logs, cut, "again")
    told = torchrun(settings, "--save-captions", "--fsdp", name="again", resume="latest")
    assert "step_3.pt" in told
    same(folder, cut, 0.0)
    for a, b in zip(lines(folder, "train"), lines(cut, "train"), strict=True):
        assert a["loss"] == b["loss"]


@pytest.mark.slow
def test_going_on_without_it_in_one_process_and_with_it_from_there(
    settings: dict[str, Any], logs: Path, plain: Path, cut: Path, capsys
) -> None:
    values = {k: v if isinstance(v, (int, float)) else str(v) for k, v in settings.items()}
    one = {
        **values,
        "val_split": (str(settings["val_split"]),),
        "zsc_class_prompt_mapping": (str(settings["zsc_class_prompt_mapping"]),),
        "zsc_specimen_class_mapping": (str(settings["zsc_specimen_class_mapping"]),),
        "batch_size": 8,
        "resume": "latest",
    }
    alone = begun(logs, cut, "alone")
    train(with_values(Config(), {**one, "fsdp": True, "name": "alone"}))
    assert "--fsdp does nothing: this is one process" in capsys.readouterr().err
    # One process draws its dropout otherwise than two: what is compared goes on from the other run.
    beside = begun(logs, plain, "beside")
    train(with_values(Config(), {**one, "name": "beside"}))
    same(alone, beside, 1e-6)
    folder = begun(logs, plain, "after plain")
    torchrun(settings, "--fsdp", name="after plain", resume="latest")
    same(folder, plain, 1e-6)


def test_cuda_needs_nccl() -> None:
    config = with_values(Config(), {"fsdp": True, "dist_backend": "gloo"})
    with pytest.raises(ConfigError, match="--fsdp on CUDA needs --dist-backend nccl"):
        check_exchange(config, torch.device("cuda:0"))
    check_exchange(config, torch.device("cpu"))
    check_exchange(with_values(Config(), {"fsdp": True}), torch.device("cuda:0"))
