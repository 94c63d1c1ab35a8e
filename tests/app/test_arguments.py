"""What arguments of training do to a whole run, where no other test begins at the argument.

docs/spec/effects.yaml names for every argument the tests that show its effect.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import lines, run, weights

from slidevlm import dist
from slidevlm.app import datasets, devices, fitting, judging, preparing, suite, syncing, trained
from slidevlm.app.cohorts import open_data
from slidevlm.app.runs import run_all
from slidevlm.app.suite import Suite
from slidevlm.config import Config, with_values
from slidevlm.data.synthetic import DemoCohort
from slidevlm.errors import ConfigError
from slidevlm.flags import arguments
from slidevlm.models import mode, zoo
from slidevlm.train import checkpoint as ckpt

FLAGS = {a.name: a.flag for a in arguments()}
SETTINGS = {"warmup": 0, "lr": 1e-2}


def model_with(settings: dict[str, Any], **parts: Any) -> str:
    """coca_tiny with other parts, in a file."""
    path = Path(settings["logs"]).parent / "model.json"
    path.write_text(json.dumps(zoo.load("coca_tiny").to_dict() | parts))
    return str(path)


def calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """What `module.name` is called with from now on; it does what it did."""
    real, found = getattr(module, name), []

    def spy(*values: Any, **named: Any) -> Any:
        found.append((values, named))
        return real(*values, **named)

    monkeypatch.setattr(module, name, spy)
    return found


# --- data ---------------------------------------------------------------------------------------


def test_where_reports_come_from(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of the file where there is one, also where the HDF5 file has them too."""
    inside = open_data(with_values(Config(), settings)).train
    assert inside is not None
    file = tmp_path / "reports.json"
    file.write_text(json.dumps({case.specimen: f"of {case.specimen}" for case in inside.cases}))
    more = {"text_data_file": str(file)}
    both = open_data(with_values(Config(), {**settings, **more})).train
    alone = {**settings, **more, "hdf5_text_attribute": None}
    assert both is not None
    assert list(both.reports) == [f"of {case.specimen}" for case in both.cases]
    assert both == open_data(with_values(Config(), alone)).train
    assert set(both.reports).isdisjoint(inside.reports)


def test_the_first_of_the_split_that_can_be_used(
    settings: dict[str, Any], cohort: DemoCohort, tmp_path: Path
) -> None:
    """What has no data or no report is not counted, and the list of it is in the run folder."""
    names = cohort.split("train").read_text().split()
    split, texts = tmp_path / "train.txt", tmp_path / "texts.json"
    lacking = [f"nowhere {i}" for i in range(12)]
    split.write_text("\n".join([names[5], *lacking, *names]))
    texts.write_text(json.dumps({name: "A report." for name in names if name != names[0]}))
    settings |= {"train_split": str(split), "text_data_file": str(texts), "num_samples": 9}
    train_split = open_data(with_values(Config(), settings)).train
    assert train_split is not None
    wanted = [names[5], *names[1:5], *names[6:10]]
    assert [case.specimen for case in train_split.cases] == wanted
    folder = run(settings, epochs=1)
    assert (folder / "missing_train.txt").read_text().splitlines() == lacking
    assert (folder / "without_report_train.txt").read_text() == f"{names[0]}\n"


def test_workers_read_for_training_and_for_evaluation(
    settings: dict[str, Any], cohort: DemoCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they read is the same: test_runs.py."""
    made = [calls(monkeypatch, module, "make_loader") for module in (fitting, judging)]
    settings |= {"val_split": (str(cohort.split("val")),), "num_samples": 8, "epochs": 1}
    run(settings, workers=1)
    assert [[values[2] for values, _ in found] for found in made] == [[1], [1]]


def test_the_cut_off_is_that_of_training_and_of_evaluation(
    settings: dict[str, Any], cohort: DemoCohort
) -> None:
    settings |= {"val_split": (str(cohort.split("val")),), "num_samples": 8, "lr": 0.0, "epochs": 1}
    losses = []
    for cutoff in (7, 11):
        folder = run(settings, image_features_cutoff=cutoff, name=f"of {cutoff}")
        (line,) = lines(folder)
        assert line["tiles_per_second"] / line["samples_per_second"] == pytest.approx(cutoff)
        losses.append(lines(folder, "evaluation")[0]["val/loss/contrastive"])
    assert losses[0] != losses[1]


# --- the model ----------------------------------------------------------------------------------


def test_checkpointing_computes_blocks_again(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the weights are the same: test_preparing.py."""
    again = calls(monkeypatch, mode, "checkpoint")
    settings |= {"num_samples": 8, "epochs": 1}
    run(settings, name="plain")
    assert not again
    run(settings, grad_checkpointing=True)
    assert again


def test_locks_reach_the_model_with_their_numbers(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = calls(monkeypatch, preparing, "lock_image")
    text = calls(monkeypatch, preparing, "lock_text")
    more = {"lock_image": True, "lock_image_unlocked_groups": 2, "lock_text": True}
    start = run(settings, name="start", epochs=1)
    plain = run(settings, pretrained=str(start), epochs=1, lock_text=True, name="none unlocked")
    folder = run(
        settings, pretrained=str(start), epochs=1, **more, lock_text_unlocked_layers=1, name="one"
    )
    assert [(v[1:], n) for v, n in image] == [((2,), {"freeze_statistics": False})]
    assert [v[1] for v, _ in text] == [0, 1]
    before = weights(start, 1)

    def moved(run: Path) -> set[str]:
        return {n for n, v in weights(run, 1).items() if not torch.equal(v, before[n])}

    layers = {n for n in before if n.startswith("text.layers.") and "norm" not in n}
    assert layers and not layers & moved(plain)
    last = max(int(n.split(".")[2]) for n in layers)
    assert layers & moved(folder) == {n for n in layers if n.startswith(f"text.layers.{last}.")}


def test_statistics_of_batch_norm_stay_where_that_is_asked_for(settings: dict[str, Any]) -> None:
    settings |= {"model": model_with(settings, slide={"type": "abmil", "input_norm": "batch"})}
    start = run(settings, name="start", epochs=1)
    locked = {"pretrained": str(start), "epochs": 1, "lock_image": True}
    freely = run(settings, name="freely", **locked)
    kept = run(settings, name="kept", **locked, lock_image_freeze_bn_stats=True)
    before = weights(start, 1)
    names = [n for n in before if n.endswith(("running_mean", "running_var"))]
    assert len(names) == 2
    assert all(torch.equal(weights(kept, 1)[n], before[n]) for n in names)
    assert not any(torch.equal(weights(freely, 1)[n], before[n]) for n in names)


def test_synchronised_batch_norm_needs_batch_norm_and_cuda(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--use-bn-sync: the model has no BatchNorm"):
        run(settings, use_bn_sync=True)
    model = model_with(settings, slide={"type": "abmil", "input_norm": "batch"})
    with pytest.raises(ConfigError, match="--use-bn-sync: torch's SyncBatchNorm is for CUDA alone"):
        run(settings, use_bn_sync=True, model=model)
    assert not (Path(settings["logs"]) / "run").exists()


def test_a_compiled_run_is_the_plain_one(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Compiled by dynamo alone: what the code of inductor computes, test_compile.py tells."""
    real = torch.compile
    made: list[Any] = []

    def without_inductor(function: Any, **options: Any) -> Any:
        made.append(options)
        return real(function, dynamic=options["dynamic"], backend="eager")

    monkeypatch.setattr(torch, "compile", without_inductor)
    plain = run(settings, name="plain", epochs=1)
    assert not made
    compiled = run(settings, name="compiled", epochs=1, torchcompile=True)
    assert made and "--torchcompile: " in capsys.readouterr().err
    for a, b in zip(lines(plain), lines(compiled), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert weights(plain, 1).keys() == weights(compiled, 1).keys()


# --- optimizer and loss -------------------------------------------------------------------------


def test_a_step_moves_the_weights_by_the_norm_that_its_gradient_is_clipped_to(
    settings: dict[str, Any],
) -> None:
    plain = {"opt": "sgd", "beta1": 0.0, "wd": 0.0, "epochs": 1, "num_samples": 8}
    before = weights(run(settings, name="still", **plain | {"lr": 0.0}), 1)
    clipped = run(settings, name="clipped", **plain, lr=1.0, grad_clip_norm=1e-3)
    after = weights(clipped, 1)
    (line,) = lines(clipped)
    assert line["gradient_norm"] > 1e-2, "the norm before clipping is told"
    squares = sum((after[n] - v).double().square().sum().item() for n, v in before.items())
    assert squares**0.5 == pytest.approx(1e-3, rel=1e-2), "weights are rounded to float32"


def test_the_numbers_of_the_optimizer_reach_it(settings: dict[str, Any]) -> None:
    folder = run(settings, epochs=1, beta1=0.8, beta2=0.95, eps=1e-5, wd=0.03)
    groups = ckpt.load(folder / "checkpoints/epoch_1.pt")[1].optimizer["param_groups"]
    assert {(tuple(g["betas"]), g["eps"]) for g in groups} == {((0.8, 0.95), 1e-5)}
    assert {g["weight_decay"] for g in groups} == {0.03, 0.0}


def test_precision_is_that_of_autocast_and_of_weights(settings: dict[str, Any]) -> None:
    settings |= {"num_samples": 8, "epochs": 1}
    runs = {name: run(settings, precision=name, name=name) for name in ("fp32", "amp", "pure_bf16")}
    losses = {name: lines(folder)[0]["loss"] for name, folder in runs.items()}
    assert len(set(losses.values())) == 3
    assert losses["amp"] == pytest.approx(losses["fp32"], rel=0.02)
    types = {name: {w.dtype for w in weights(folder, 1).values()} for name, folder in runs.items()}
    assert types["fp32"] == types["amp"] == {torch.float32}
    assert torch.bfloat16 in types["pure_bf16"]


def test_weights_of_the_losses(settings: dict[str, Any]) -> None:
    folder = run(
        settings, epochs=1, coca_contrastive_loss_weight=0.25, coca_caption_loss_weight=3.0
    )
    for line in lines(folder):
        total = 0.25 * line["contrastive_loss"] + 3.0 * line["caption_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_identical_reports_are_negatives_only_where_they_are_kept_as_such(
    settings: dict[str, Any], cohort: DemoCohort, tmp_path: Path
) -> None:
    file = tmp_path / "reports.json"
    names = cohort.split("train").read_text().split()
    file.write_text(json.dumps({name: f"Report {i % 2}." for i, name in enumerate(names)}))
    settings |= {"text_data_file": str(file), "lr": 0.0, "epochs": 1, "batch_size": 16}
    masked, kept = (
        lines(run(settings, name=how, false_negatives=how))[0]["contrastive_loss"]
        for how in ("mask", "keep")
    )
    assert kept > masked + 0.1


def test_the_ways_to_gather_and_to_overlap_reach_the_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each way computes: tests/train/test_exact.py and test_overlap.py."""
    objectives = calls(monkeypatch, fitting, "Objective")
    steps = calls(monkeypatch, fitting, "Step")
    settings |= {"epochs": 1, "num_samples": 8}
    run(settings, name="plain")
    run(settings, name="ways", local_loss=True, gather_with_grad=True, ddp_static_graph=True)
    ways = [(named["local_loss"], named["gather_with_grad"]) for _, named in objectives]
    assert ways == [(False, False), (True, True)]
    assert [named["overlap"] for _, named in steps] == [False, True]


@pytest.mark.slow
def test_two_processes_that_meet_at_a_file_equal_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """With --dist-url, and each process computing its own rows and adding gradients up early."""
    part = zoo.load("coca_tiny").to_dict()
    # Dropout is drawn by each process; singular vectors depend on rounding.
    slide, text = part["slide"] | {"moments_dropout": 0.0}, part["text"] | {"prior_rank": 0}
    path = model_with(settings, slide=slide, text=text)
    settings |= {"model": path, "eps": 1e-3, "epochs": 1, "lr": 1e-3}
    one = weights(run(settings, name="one"), 1)
    values = {**settings, "name": "two", "batch_size": 4, "dist_backend": "gloo"}
    values["dist_url"] = f"file://{tmp_path}/meet"
    words = [word for key, value in values.items() for word in (FLAGS[key], str(value))]
    words += ["--local-loss", "--gather-with-grad", "--ddp-static-graph"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "slidevlm", "train", *words],
            env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    for process in started:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
    two = weights(Path(settings["logs"]) / "two", 1)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-5)


def test_every_process_has_the_first_device_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "local_rank", lambda: 3)
    assert devices.choose_device(Config()) == torch.device("cuda:3")
    first = with_values(Config(), {"no_set_device_rank": True})
    assert devices.choose_device(first) == torch.device("cuda:0")
    second = with_values(Config(), {"device": "cuda:1"})
    assert devices.choose_device(second) == torch.device("cuda:1"), "given with its number"
    assert chosen == [torch.device("cuda", i) for i in (3, 0, 1)]
    kept = devices.with_device(second, torch.device("cuda:1"))
    assert kept.optim.device == "cuda:1", "for the next run by this one's config.yaml"
    with pytest.raises(ConfigError, match="no cuda:7; torch sees 4"):
        devices.choose_device(with_values(Config(), {"device": "cuda:7"}))


def test_the_backend_reaches_the_start_of_the_processes(settings: dict[str, Any]) -> None:
    """Of one process, too, which exchanges nothing; without CUDA the two that are known are one."""
    with pytest.raises(ConfigError, match="--dist-backend 'mpi' is not one of nccl, gloo"):
        run(settings, dist_backend="mpi")
    assert not (Path(settings["logs"]) / "run").exists()


# --- logging and checkpoints --------------------------------------------------------------------


def test_debug_finds_where_a_gradient_went_wrong(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    watched = calls(monkeypatch, fitting, "Step")
    monkeypatch.setattr(
        fitting,
        "run_loop",
        _then(fitting.run_loop, lambda: seen.append(torch.is_anomaly_enabled())),
    )
    run(settings, epochs=1, num_samples=8, name="plain")
    run(settings, epochs=1, num_samples=8, debug=True)
    assert seen == [False, True] and len(watched) == 2
    assert not torch.is_anomaly_enabled(), "of the run alone"


def _then(real: Callable[..., Any], first: Callable[[], Any]) -> Callable[..., Any]:
    def both(*values: Any, **named: Any) -> Any:
        first()
        return real(*values, **named)

    return both


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="without the extra wandb")
def test_wandb_has_the_notes_and_the_project(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    # Both are also among the arguments that the run is told, so the file alone would prove nothing.
    begun = calls(monkeypatch, importlib.import_module("wandb"), "init")
    folder = run(
        settings,
        epochs=1,
        report_to="wandb",
        wandb_notes="a note of this run",
        wandb_project_name="a-project",
    )
    told = [(named["project"], named["notes"]) for _, named in begun]
    assert told == [("a-project", "a note of this run")]
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 30  # its own process writes it
    while b"a-project" not in file.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"a note of this run" in file.read_bytes() and b"a-project" in file.read_bytes()
    # What is secret of the environment is in no file of the run.
    for written in (f for f in folder.rglob("*") if f.is_file()):
        assert b"k" * 40 not in written.read_bytes(), written


def test_seconds_between_copies(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calls(monkeypatch, syncing, "Syncing")
    more = {"remote_sync": f"file://{tmp_path}/there", "remote_sync_protocol": "fsspec"}
    run(settings, epochs=1, **more, remote_sync_frequency=7)
    assert [values[1] for values, _ in made] == [7]


# --- all of it ----------------------------------------------------------------------------------


def test_the_seed_reaches_all_that_is_random(
    settings: dict[str, Any], cohort: DemoCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on its own: a run with another seed differs as soon as one of them does."""
    orders = calls(monkeypatch, fitting, "TrainBatches")
    rows = calls(monkeypatch, datasets, "BagDataset")
    general = calls(monkeypatch, fitting, "seed_everything")
    built: list[int] = []
    monkeypatch.setattr(
        trained,
        "build_model",
        _then(trained.build_model, lambda: built.append(torch.initial_seed())),
    )
    resampled = calls(monkeypatch, suite, "Bootstrap")
    written = calls(monkeypatch, judging, "Decoding")
    captions = {"save_captions": True, "caption_val_max_seq_len": 2}
    val = {"val_split": (str(cohort.split("val")),)}
    run(settings, epochs=1, seed=7, num_samples=8, **val, **captions)
    assert [values[2] for values, _ in orders] == [7]
    assert {named["seed"] for _, named in rows} == {7}
    assert [values[0] for values, _ in general] == [8], "of the first process"
    assert built == [7], "of the first weights"
    assert {values[2] for values, _ in resampled} == {7}
    assert {named["seed"] for _, named in written} == {7}


# --- evaluation ---------------------------------------------------------------------------------


def test_what_is_resampled_and_how_prompts_are_put_together(
    settings: dict[str, Any], cohort: DemoCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = calls(monkeypatch, suite, "embed_prompts")
    settings |= {
        "epochs": 1,
        "test_split": str(cohort.split("test")),
        "zsc_class_prompt_mapping": (str(cohort.prompts("diagnosis")),),
        "zsc_specimen_class_mapping": (str(cohort.labels("diagnosis")),),
        "eval_metric_bootstraps": 20,
        "eval_metric_ci": 0.8,
    }
    run(settings)
    assert [values[2] for values, _ in prompts] == ["mean"]
    config = with_values(Config(), {**settings, "name": "other", "bootstrap_unit": "specimen"})
    outcome = run_all(with_values(config, {"zsc_ensemble": "probabilities"}))
    assert [values[2] for values, _ in prompts][-1] == "probabilities"
    about = outcome.about["bootstrap"]
    assert (about["unit"], about["resamples"], about["confidence"]) == ("specimen", 20, 0.8)
    drawn = Suite(config).bootstrap
    # What is told of it is made of the arguments, so it would prove nothing.
    assert (drawn.unit, drawn.resamples, drawn.confidence) == ("specimen", 20, 0.8)
    score = next(s for s in outcome.scores if s.lo is not None and s.hi is not None)
    assert score.lo <= score.hi
