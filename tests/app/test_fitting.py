"""What the arguments of training do to a run: optimizer, rates, averages, the best checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from short_runs import lines, run, weights

from slidevlm.app.notebook import evaluate
from slidevlm.config import Config, with_values
from slidevlm.data.synthetic import DemoCohort
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models import zoo
from slidevlm.train import checkpoint as ckpt

SETTINGS = {"warmup": 0, "lr": 1e-2}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- optimizer and rates ----------------------------------------------------------------------


def test_groups_of_parameters_are_told(settings: dict[str, Any], capsys) -> None:
    plain = run(settings, epochs=1, name="plain")
    told = (plain / "parameter_groups.txt").read_text()
    assert re.findall(r"rate x (\S+), decay (\S+),", told) == [("1", "0.2"), ("1", "0")]
    assert "parameter groups" not in capsys.readouterr().err
    falling = run(settings, epochs=1, name="falling", layer_decay=0.5, debug=True)
    told = (falling / "parameter_groups.txt").read_text()
    assert {"1", "0.5", "0.25"} < set(re.findall(r"rate x (\S+),", told))
    shown = capsys.readouterr().err
    assert "parameter groups" in shown and all(line in shown for line in told.splitlines())
    assert not same(weights(plain, 1), weights(falling, 1))


def test_another_optimizer_trains_and_goes_on_exactly(settings: dict[str, Any]) -> None:
    """With groups of their own rates, and the rate of the log the schedule's."""
    chosen = {"opt": "radam", "layer_decay": 0.7}
    whole = run(settings, name="whole", **chosen)
    assert not same(weights(whole), weights(run(settings, name="adamw")))
    half = run(settings, save_every_n_steps=1, **chosen)
    for name in ("epoch_2.pt", "step_4.pt", "step_3.pt"):
        (half / "checkpoints" / name).unlink(missing_ok=True)
    run(settings, resume="latest", **chosen)
    assert same(weights(half), weights(whole))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup": 0}, [1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1.0]),
        ({"warmup": 8}, [0.125, 0.25, 0.375, 0.5]),
        ({"warmup": 2, "skip_scheduler": True}, [0.5, 1.0, 1.0, 1.0]),
        (  # a cool-down over twice the training begins half way down
            {"lr_scheduler": "const-cooldown", "epochs_cooldown": 4},
            [0.5, 0.375, 0.25, 0.125],
        ),
        (
            {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1, "lr_cooldown_end": 5e-3},
            [1.0, 1.0, 1.0, 0.75],
        ),
        (
            {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1, "lr_cooldown_power": 2.0},
            [1.0, 1.0, 1.0, 0.25],
        ),
        ({"lr_scheduler": "const"}, [1.0, 1.0, 1.0, 1.0]),
        ({"epochs": 1, "batch_size": 16}, [1.0]),
    ],
)
def test_rates_of_a_run_are_the_schedules(
    settings: dict[str, Any], options: dict[str, Any], expected: list[float]
) -> None:
    folder = run(settings, **options)
    rates = [line["learning_rate"] / 1e-2 for line in lines(folder)]
    assert rates == pytest.approx(expected)


def test_resumed_without_its_model_a_run_has_the_defaults_of_that_model(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """beta2 and eps of a model with vit in its name, which is then only in the checkpoint."""
    model = tmp_path / "vit_tiny.json"
    model.write_text(json.dumps(zoo.load("coca_tiny").to_dict()))
    whole = run(settings, model=str(model), save_frequency=1)
    unnamed = {name: value for name, value in settings.items() if name != "model"}
    again = run(unnamed, resume=str(whole / "checkpoints/epoch_1.pt"), name="again")
    assert same(weights(again), weights(whole))
    groups = ckpt.load(again / "checkpoints/epoch_2.pt")[1].optimizer["param_groups"]
    assert {(g["betas"], g["eps"]) for g in groups} == {((0.9, 0.98), 1e-6)}
    assert f"\nmodel: {model}\n" in (again / "config.yaml").read_text()
    given = run(unnamed, resume=str(whole / "checkpoints/epoch_1.pt"), name="given", beta2=0.9)
    groups = ckpt.load(given / "checkpoints/epoch_2.pt")[1].optimizer["param_groups"]
    assert {(g["betas"], g["eps"]) for g in groups} == {((0.9, 0.9), 1e-6)}


def test_resumed_a_run_says_that_pretrained_weights_are_not_read(
    settings: dict[str, Any], messages
) -> None:
    run(settings, epochs=1)
    run(settings, epochs=1, resume="latest", pretrained="nowhere")
    assert "--pretrained nowhere is not read: the checkpoint has the weights" in messages.text


def test_moving_positions_that_the_model_does_not_read_is_told(
    settings: dict[str, Any], tmp_path: Path, messages
) -> None:
    settings |= {"epochs": 1, "num_samples": 8, "aug_cfg": {"transform_type": "random_flip"}}
    run(settings, name="read")
    assert "without effect" not in messages.text
    model = tmp_path / "blind.json"
    content = zoo.load("coca_tiny").to_dict()
    content["slide"] = {"type": "mean", "width": 32}
    model.write_text(json.dumps(content))
    run(settings, model=str(model))
    assert "--aug-cfg random_flip: without effect; the slide encoder of model" in messages.text


# --- averages -----------------------------------------------------------------------------------


def test_an_average_is_kept_evaluated_used_and_resumed_exactly(
    settings: dict[str, Any], cohort: DemoCohort, capsys
) -> None:
    validated = {"val_split": (str(cohort.split("val")),), "test_split": str(cohort.split("test"))}
    plain = run(settings, name="plain", **validated)
    whole = run(settings, name="whole", ema=0.9, **validated)
    assert same(weights(plain), weights(whole)), "training itself is as without"
    saved = ckpt.load(whole / "checkpoints/epoch_2.pt")[0]
    assert saved.averaged and not same(saved.for_use().weights, saved.weights)
    half = run(settings, ema=0.9, save_every_n_steps=1, **validated)
    for name in ("epoch_2.pt", "step_4.pt"):
        (half / "checkpoints" / name).unlink(missing_ok=True)
    run(settings, resume="latest", ema=0.9, **validated)
    resumed = ckpt.load(half / "checkpoints/epoch_2.pt")[0]
    assert same(resumed.weights, saved.weights) and same(resumed.averaged, saved.averaged)
    # The validation of the run, its test split, and a later evaluation are all of the average.
    name = "val/loss/caption"
    in_run = [x[name] for x in lines(whole, "evaluation")]
    assert in_run != [x[name] for x in lines(plain, "evaluation")]
    capsys.readouterr()
    tested = evaluate(whole).metrics
    assert tested[name] == pytest.approx(in_run[-1], rel=1e-6)
    assert "their average (--ema)" in capsys.readouterr().err
    written = json.loads((whole / "test.json").read_text())
    assert json.dumps(written) != json.dumps(json.loads((plain / "test.json").read_text()))
    raw = evaluate(whole, with_values(Config(), {"pretrained": f"raw:{whole}"})).metrics
    assert raw[name] == pytest.approx([x[name] for x in lines(plain, "evaluation")][-1], rel=1e-6)
    with pytest.raises(CheckpointError, match="resume with --ema DECAY, too"):
        run(settings, resume="latest", epochs=3, **validated)


# --- the best checkpoint --------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept(settings: dict[str, Any], cohort: DemoCohort) -> None:
    validated = {"val_split": (str(cohort.split("val")),), "save_frequency": 0}
    folder = run(settings, epochs=4, lr=0.05, save_best="val/loss/contrastive", **validated)
    values = [x["val/loss/contrastive"] for x in lines(folder, "evaluation")]
    _, training = ckpt.load(folder / "checkpoints/best.pt")
    assert training.best == {"val/loss/contrastive": min(values)}
    assert training.progress.epoch == values.index(min(values)) + 1
    assert {f.name for f in (folder / "checkpoints").iterdir()} == {"best.pt", "epoch_4.pt"}
    # Another direction, and a run that goes on remembers.
    worst = {**validated, "name": "worst", "save_best": "val/loss/contrastive:max"}
    run(settings, epochs=2, lr=0.05, **worst)
    folder = run(settings, epochs=4, lr=0.05, resume="latest", **worst)
    values = [x["val/loss/contrastive"] for x in lines(folder, "evaluation")]
    _, training = ckpt.load(folder / "checkpoints/best.pt")
    assert training.best == {"val/loss/contrastive": max(values)}


def test_the_best_checkpoint_where_bad_specimens_are_dropped(
    settings: dict[str, Any], cohort: DemoCohort, tmp_path: Path, capsys
) -> None:
    """Evaluations are of the specimens left, and it is their values that are compared."""
    damaged = tmp_path / "damaged.h5"
    shutil.copy(cohort.hdf5, damaged)
    with h5py.File(damaged, "a") as file:
        for split in ("train", "val"):
            specimen = cohort.split(split).read_text().split()[0]
            found: list[str] = []
            file.visit(lambda name, s=specimen, f=found: f.append(name) if s in name else None)
            bags = [n for n in found if isinstance(file[n], h5py.Dataset) and file[n].ndim == 2]
            for name in (n for n in bags if file[n].dtype.kind == "f"):
                file[name][0, 0] = np.nan
    more = {
        "hdf5_filename": str(damaged),
        "val_split": (str(cohort.split("val")),),
        "save_best": "val/loss/contrastive",
        "skip_bad_specimens": True,
        "image_features_cutoff": 100000,
        "epochs": 3,
        "lr": 0.05,
    }
    folder = run(settings, **more)
    assert "bad specimens were dropped" in capsys.readouterr().err
    values = [x["val/loss/contrastive"] for x in lines(folder, "evaluation")]
    _, training = ckpt.load(folder / "checkpoints/best.pt")
    assert training.best == {"val/loss/contrastive": min(values)}
    assert training.progress.epoch == values.index(min(values)) + 1


def test_the_metrics_to_choose_from_are_known_before_training(
    settings: dict[str, Any], cohort: DemoCohort
) -> None:
    """And are those that an evaluation has."""
    more = {
        "val_split": (str(cohort.split("val")),),
        "save_captions": True,
        "caption_val_max_seq_len": 3,
        "zsc_class_prompt_mapping": (str(cohort.prompts("diagnosis")),),
        "zsc_specimen_class_mapping": (str(cohort.labels("diagnosis")),),
        "epochs": 1,
        "eval_metric_bootstraps": 3,
    }
    with pytest.raises(ConfigError, match="no evaluation of this run has that metric") as caught:
        run(settings, save_best="val/loss", **more)
    assert not (Path(settings["logs"]) / "run").exists(), "nothing was trained"
    listed = {line.strip() for line in str(caught.value).splitlines()[1:]}
    (told,) = lines(run(settings, save_best="val/captions/bleu_4", **more), "evaluation")
    assert listed == {name for name in told if "/" in name and not name.endswith(("/lo", "/hi"))}
