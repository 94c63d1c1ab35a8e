"""Whole runs on a small real cohort: training, evaluation, resuming, bad input.

Runs are processes where exit codes, kills or several ranks matter, and calls elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tokenizers
import torch

from slidevlm.app import train
from slidevlm.app.notebook import evaluate
from slidevlm.cli import main
from slidevlm.config import Config, with_values
from slidevlm.data.formats.hdf5_cases import CaseWriter
from slidevlm.data.sampling import EvalBatches
from slidevlm.data.synthetic import DemoCohort
from slidevlm.errors import CheckpointError, ConfigError, DataError, SlideVLMError
from slidevlm.flags import arguments
from slidevlm.train import checkpoint as ckpt

FLAGS = {a.name: a.flag for a in arguments()}
SPECIMENS = 60
# Three steps an epoch.
SETTINGS = {
    "val_split": "val",
    "batch_size": 12,
    "image_features_cutoff": 40,
    "warmup": 2,
    "lr": 3e-3,
}


def config_of(settings: dict[str, Any], **more: Any) -> Config:
    return with_values(Config(), {**settings, **more})


def words_of(settings: dict[str, Any], **more: Any) -> list[str]:
    """The same as a command line."""
    words: list[str] = []
    for name, value in {**settings, **more}.items():
        if value is True:
            words.append(FLAGS[name])
        elif value is not None and value is not False:
            assert not isinstance(value, dict), "written as words by the tests that need it"
            values = value if isinstance(value, tuple) else (value,)
            words += [FLAGS[name], *map(str, values)]
    return words


def lines(settings: dict[str, Any], kind: str = "train") -> list[dict[str, Any]]:
    path = Path(settings["logs"]) / settings["name"] / "metrics.jsonl"
    return [x for x in map(json.loads, path.read_text().splitlines()) if x["kind"] == kind]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return ckpt.load(path)[0].weights


def final(settings: dict[str, Any], name: str = "run") -> dict[str, torch.Tensor]:
    return weights(Path(settings["logs"]) / name / "checkpoints" / f"epoch_{settings['epochs']}.pt")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- a run and what it leaves ---------------------------------------------------------------


def test_a_run_leaves_everything(settings: dict[str, Any], cohort: DemoCohort) -> None:
    metrics = train(
        config_of(
            settings,
            test_split=str(cohort.split("test")),
            zsc_class_prompt_mapping=(
                str(cohort.prompts("diagnosis")),
                str(cohort.prompts("margin")),
            ),
            zsc_specimen_class_mapping=(
                str(cohort.labels("diagnosis")),
                str(cohort.labels("margin")),
            ),
            save_captions=True,
            caption_val_frequency=2,
            caption_val_max_seq_len=5,
            report_to="tensorboard",
        )
    )
    folder = Path(settings["logs"]) / "run"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "out.log", "environment.json", "model.json"}
    assert names >= {"tokenizer.json", "test.json", "test.md", "captions_test.json", "tensorboard"}
    assert "captions_epoch_2.json" in names and "captions_epoch_1.json" not in names
    for name in ("test/image_to_text/R@10", "test/loss/caption", "test/captions/bleu_4"):
        assert name in metrics
    assert 0 <= metrics["test/zero_shot/margin/average_precision"] <= 1
    assert len(lines(settings)) == 6 and len(lines(settings, "evaluation")) == 2
    assert lines(settings)[-1]["loss"] < lines(settings)[0]["loss"], "it learns"
    for value in ("learning_rate", "gradient_norm", "samples_per_second", "tiles_per_second"):
        assert lines(settings)[0][value] > 0
    written = json.loads((folder / "captions_test.json").read_text())
    members = cohort.split("test").read_text().split()
    assert [w["id"] for w in written] == members
    tokenizer = ckpt.load(folder / "checkpoints/epoch_2.pt")[0].tokenizer
    assert tokenizer == (folder / "tokenizer.json").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    losses = [e.value for e in events.Scalars("train/loss")]
    assert losses == pytest.approx([x["loss"] for x in lines(settings)])
    again = evaluate(folder).metrics
    for name in again:
        assert again[name] == pytest.approx(metrics.get(name, again[name]), nan_ok=True), name
    assert again["test/image_to_text/MRR"] == metrics["test/image_to_text/MRR"]


def test_the_saved_configuration_trains_the_same_model(settings: dict[str, Any]) -> None:
    train(config_of(settings))
    saved = Path(settings["logs"]) / "run" / "config.yaml"
    assert main(["train", "--config", str(saved), "--name", "again"]) == 0
    assert same(final(settings), final(settings, "again"))


def test_another_seed_is_another_run(settings: dict[str, Any]) -> None:
    train(config_of(settings, epochs=1))
    train(config_of(settings, epochs=1, seed=1, name="other"))
    assert not same(final(settings | {"epochs": 1}), final(settings | {"epochs": 1}, "other"))


def test_workers_and_logs_change_nothing(settings: dict[str, Any]) -> None:
    train(config_of(settings))
    train(config_of(settings, workers=2, name="workers", log_every_n_steps=4))
    assert same(final(settings), final(settings, "workers"))
    assert [x["step"] for x in lines(settings)] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in lines(settings | {"name": "workers"})] == [4, 6], "the last one, too"


def test_logs_none_writes_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    metrics = train(config_of(settings, logs="None", epochs=1))
    assert metrics["val/loss/caption"] > 0
    assert list((tmp_path / "here").iterdir()) == []
    assert not Path(settings["logs"]).exists()


def test_clip_siglip_accumulation_and_bf16_train(settings: dict[str, Any]) -> None:
    clip = json.loads((Path(ckpt.__file__).parents[1] / "models/zoo/coca_tiny.json").read_text())
    del clip["decoder"]
    clip["family"] = "clip"
    path = Path(settings["logs"]).parent / "clip_tiny.json"
    path.write_text(json.dumps(clip))
    metrics = train(
        config_of(
            settings, model=str(path), siglip=True, accum_freq=3, batch_size=4, precision="amp_bf16"
        )
    )
    assert "val/loss/caption" not in metrics and metrics["val/loss/contrastive"] > 0
    with pytest.raises(ConfigError, match="--save-captions.*no decoder"):
        train(config_of(settings, model=str(path), save_captions=True, name="other"))


def test_frequencies_and_the_grace_period(settings: dict[str, Any]) -> None:
    train(config_of(settings, epochs=5, val_frequency=2, eval_grace_period=2, save_frequency=2))
    assert [x["epoch"] for x in lines(settings, "evaluation")] == [4, 5]
    names = {p.name for p in (Path(settings["logs"]) / "run/checkpoints").iterdir()}
    assert names == {"epoch_2.pt", "epoch_4.pt", "epoch_5.pt"}


def test_which_checkpoints_are_kept(settings: dict[str, Any]) -> None:
    train(
        config_of(
            settings,
            epochs=3,
            save_frequency=1,
            save_most_recent=True,
            delete_previous_checkpoint=True,
            save_every_n_steps=2,
        )
    )
    names = {p.name for p in (Path(settings["logs"]) / "run/checkpoints").iterdir()}
    assert names == {"epoch_3.pt", "epoch_latest.pt"}
    train(config_of(settings, save_frequency=0, name="last only"))
    names = {p.name for p in (Path(settings["logs"]) / "last only/checkpoints").iterdir()}
    assert names == {"epoch_2.pt"}
    train(config_of(settings, save_every_n_steps=2, name="within"))
    names = {p.name for p in (Path(settings["logs"]) / "within/checkpoints").iterdir()}
    assert names == {"step_2.pt", "step_4.pt", "epoch_2.pt"}


def test_num_samples_takes_the_first_of_the_split(settings: dict[str, Any]) -> None:
    train(config_of(settings, num_samples=12, epochs=3))
    assert len(lines(settings)) == 3, "one batch of twelve an epoch"


def test_pretrained_starts_from_weights_and_from_step_zero(settings: dict[str, Any]) -> None:
    train(config_of(settings))
    run = Path(settings["logs"]) / "run"
    for source in (run, run / "checkpoints/epoch_2.pt"):
        name = source.name
        train(config_of(settings, pretrained=str(source), lr=0.0, name=f"from {name}"))
        assert same(final(settings), final(settings, f"from {name}"))


# --- resuming -------------------------------------------------------------------------------


def test_resuming_within_an_epoch_gives_the_same_weights(settings: dict[str, Any]) -> None:
    settings |= {"epochs": 3, "precision": "amp", "model": dropout_model(settings)}
    train(config_of(settings, save_every_n_steps=1, save_frequency=1))
    folder = Path(settings["logs"]) / "run" / "checkpoints"
    for step in (1, 4, 6, 8):
        name = f"from {step}"
        source = folder / (f"step_{step}.pt" if step % 3 else f"epoch_{step // 3}.pt")
        train(config_of(settings, resume=str(source), name=name))
        assert same(final(settings), final(settings, name)), step
        # A training from the beginning would have the same weights, too.
        done = [x["step"] for x in lines(settings | {"name": name})]
        assert done == list(range(step + 1, 10))
    told = lines(settings)
    train(config_of(settings, resume="latest"))
    assert lines(settings) == told, "nothing is done again: a second time would have other speeds"


def test_asked_to_end_while_it_evaluates_a_run_does_so_and_then_makes_up_for_it(
    settings: dict[str, Any], cohort: DemoCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the batch in progress, in any epoch; at the end all is as if nothing had happened."""
    settings |= {"batch_size": 3, "model": dropout_model(settings), "save_frequency": 2}
    settings |= {
        "ema": 0.9,
        "save_best": "val/loss/caption",
        "test_split": str(cohort.split("test")),
    }
    train(config_of(settings, name="undisturbed"))
    evaluations: list[list[int]] = []

    class Struck(EvalBatches):
        def __iter__(self) -> Iterator[list[int]]:
            evaluations.append([])
            for number, batch in enumerate(super().__iter__()):
                evaluations[-1].append(number)
                if number == 1 and len(evaluations) in (1, 3):
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    monkeypatch.setattr("slidevlm.app.judging.EvalBatches", Struck)
    folder = Path(settings["logs"]) / "run"
    for epoch in (1, 2):
        train(config_of(settings, resume="latest"))
        assert evaluations[-1] == [0, 1], "it was left after the batch in progress"
        found = ckpt.newest(folder / "checkpoints")
        assert found is not None and found[2].progress.step == 13 * epoch
        assert len(lines(settings, "evaluation")) == epoch - 1
        assert not (folder / "test.json").exists()
    train(config_of(settings, resume="latest"))
    whole, test = [0, 1, 2], [0, 1, 2, 3, 4]
    assert evaluations == [[0, 1], whole, [0, 1], whole, test]
    assert (folder / "test.json").exists()
    other = settings | {"name": "undisturbed"}
    assert lines(settings, "evaluation") == lines(other, "evaluation")
    assert [x["loss"] for x in lines(settings)] == [x["loss"] for x in lines(other)]
    for name in ("epoch_2.pt", "best.pt"):
        mine, wanted = (
            ckpt.load(folder.parent / run / "checkpoints" / name) for run in ("run", "undisturbed")
        )
        assert same(mine[0].weights, wanted[0].weights)
        assert same(mine[0].averaged, wanted[0].averaged)
        assert (mine[1].metrics, mine[1].best) == (wanted[1].metrics, wanted[1].best)


def dropout_model(settings: dict[str, Any], rate: float = 0.2) -> str:
    model = json.loads((Path(ckpt.__file__).parents[1] / "models/zoo/coca_tiny.json").read_text())
    for part in ("slide", "text", "decoder"):
        model[part]["dropout"] = rate
    model["slide"]["moments_dropout"] = rate
    path = Path(settings["logs"]).parent / "dropout.json"
    path.write_text(json.dumps(model))
    return str(path)


@pytest.mark.slow
def test_killed_at_random_and_resumed_gives_the_same_weights(settings: dict[str, Any]) -> None:
    settings |= {"epochs": 4, "save_every_n_steps": 2, "model": dropout_model(settings)}
    command = [sys.executable, "-m", "slidevlm", "train"]
    # A process like those that are killed: sums depend on the number of threads.
    subprocess.run([*command, *words_of(settings, name="undisturbed")], check=True)
    command += words_of(settings, resume="latest")
    rng = np.random.default_rng(0)
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            # The first seconds go by importing torch; after that every moment is as likely.
            process.wait(timeout=rng.uniform(2.0, 5.0) if kills < 4 else 120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, process.stderr.read()
        if kills >= 3 or attempt > 8:
            break
    assert kills >= 1, "the run was never killed"
    assert same(final(settings, "undisturbed"), final(settings))
    steps = [x["step"] for x in lines(settings)]
    assert steps == list(range(1, 13)), "each step is told once, also those done twice"


def test_a_damaged_checkpoint_is_named_and_latest_falls_back(
    settings: dict[str, Any], caplog
) -> None:
    train(config_of(settings, save_frequency=1))
    folder = Path(settings["logs"]) / "run" / "checkpoints"
    expected = final(settings)
    last = folder / "epoch_2.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 0xFF
    last.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"epoch_2\.pt is damaged.*use an older one"):
        train(config_of(settings, resume=str(last), name="x"))
    train(config_of(settings, resume="latest"))
    assert same(final(settings), expected)


def test_latest_without_a_checkpoint_starts_at_the_beginning(settings: dict[str, Any]) -> None:
    """What a process told that was killed before its first checkpoint is told anew."""
    folder = Path(settings["logs"]) / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 9.0}\n{"kind": "t')
    train(config_of(settings, resume="latest"))
    assert [x["step"] for x in lines(settings)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_keeps_its_metrics_and_an_evaluation_its_settings(
    settings: dict[str, Any], messages: pytest.LogCaptureFixture
) -> None:
    metrics = train(config_of(settings, save_every_n_steps=2))
    folder = Path(settings["logs"]) / "run"
    assert "nothing is left to train" not in messages.text
    again = train(config_of(settings, resume="latest"))
    assert again == pytest.approx(metrics, nan_ok=True) and again
    done = settings["epochs"]
    told = f"has {done} epochs behind it and --epochs is {done}: nothing is left to train"
    assert told in messages.text
    told, saved = lines(settings), (folder / "config.yaml").read_text()
    step = str(folder / "checkpoints/step_2.pt")
    train(config_of(settings, resume=step, test=True, train_split=None))
    assert lines(settings) == told, "evaluating an early checkpoint forgets nothing"
    assert (folder / "config.yaml").read_text() == saved
    assert "test: true" in (folder / "evaluation.yaml").read_text()


def test_what_would_drift_is_refused(settings: dict[str, Any]) -> None:
    train(config_of(settings, save_every_n_steps=2))
    step = str(Path(settings["logs"]) / "run/checkpoints/step_2.pt")
    with pytest.raises(CheckpointError, match="global_batch 12 -> 6"):
        train(config_of(settings, resume=step, batch_size=6, name="x"))
    with pytest.raises(CheckpointError, match="seed 0 -> 1"):
        train(config_of(settings, resume=step, seed=1, name="y"))
    with pytest.raises(CheckpointError, match="without --siglip"):
        train(config_of(settings, resume=step, siglip=True, name="z"))
    with pytest.raises(CheckpointError, match="is not the checkpoint's model: .*slide"):
        train(config_of(settings, resume=step, model="coca_stage_1", name="w"))


def test_other_specimens_and_other_reports_do_not_go_on_within_an_epoch(
    settings: dict[str, Any], tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    train(config_of(settings, epochs=1, save_every_n_steps=2))
    saved = Path(settings["logs"]) / "run/checkpoints"
    names = Path(settings["train_split"]).read_text().replace(",", "\n").split()
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*names[1:], names[0]]))
    step = {"resume": str(saved / "step_2.pt"), "name": "x"}
    with pytest.raises(CheckpointError, match=r"\(other names, other reports\)"):
        train(config_of(settings, **step, train_split=str(other)))
    reports = tmp_path / "reports.json"
    reports.write_text(json.dumps([{"id": name, "report": "tumour"} for name in names]))
    with pytest.raises(CheckpointError, match=r"\(other reports\)"):
        train(config_of(settings, **step, text_data_file=str(reports), val_split=()))
    whole = {"resume": str(saved / "epoch_1.pt"), "name": "y", "train_split": str(other)}
    train(config_of(settings, **whole))
    assert "is not that of the checkpoint (other names" in messages.text


def test_resuming_with_another_number_of_threads_warns(settings: dict[str, Any], messages) -> None:
    train(config_of(settings, save_frequency=1))
    source = Path(settings["logs"]) / "run/checkpoints/epoch_1.pt"
    threads = torch.get_num_threads()
    assert ckpt.load(source)[1].threads == threads
    train(config_of(settings, resume=str(source), name="same"))
    assert "threads" not in messages.text
    model, training = ckpt.load(source)
    ckpt.save(source, model, replace(training, threads=threads + 1))
    train(config_of(settings, resume=str(source), name="other"))
    assert f"saved with {threads + 1} threads, going on with {threads}" in messages.text
    assert "only to rounding" in messages.text and f"OMP_NUM_THREADS={threads + 1}" in messages.text


def test_settings_of_the_optimizer_given_on_resume_win(settings: dict[str, Any]) -> None:
    train(config_of(settings, save_frequency=1))
    source = Path(settings["logs"]) / "run/checkpoints/epoch_1.pt"
    train(config_of(settings, resume=str(source), name="other", wd=0.75, beta2=0.5, eps=1e-3))
    saved = ckpt.load(Path(settings["logs"]) / "other/checkpoints/epoch_2.pt")[1].optimizer
    assert [g["weight_decay"] for g in saved["param_groups"]] == [0.75, 0.0]
    assert {(g["betas"], g["eps"]) for g in saved["param_groups"]} == {((0.9, 0.5), 1e-3)}


# --- several processes ----------------------------------------------------------------------


def torchrun(settings: dict[str, Any], processes: int, **more: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # "--": without it torchrun takes our --logs for an abbreviation of its --logs-specs.
    command += [f"--nproc-per-node={processes}", "-m", "--", "slidevlm", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command + words_of(settings, **more),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
    )


def exactly(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what makes several processes differ from one: dropout, which each draws by itself,
    and rounding, which differs with the number of threads and of specimens in a batch. It decides
    the singular vectors of reports that are all alike, and where a gradient is almost 0 Adam with
    its usual eps makes a whole step of it."""
    path = Path(dropout_model(settings, 0.0))
    model = json.loads(path.read_text())
    model["text"]["prior_rank"] = 0
    path.write_text(json.dumps(model))
    return {"model": str(path), "eps": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accum_freq", "bucket"), [(1, "balance"), (3, "balance"), (1, "length"), (1, "off")]
)
def test_two_processes_equal_one(settings: dict[str, Any], accum_freq: int, bucket: str) -> None:
    # Of the bags some are longer than the cut-off.
    settings |= {**exactly(settings), "bucket": bucket, "image_features_cutoff": 150}
    train(config_of(settings, batch_size=12))
    result = torchrun(
        settings,
        2,
        batch_size=6 // accum_freq,
        accum_freq=accum_freq,
        name="two",
        dist_backend="gloo",
    )
    assert result.returncode == 0, result.stderr
    one, two = final(settings), final(settings, "two")
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    other = lines(settings | {"name": "two"})
    for a, b in zip(lines(settings), other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    alone, both = lines(settings, "evaluation"), lines(settings | {"name": "two"}, "evaluation")
    for a, b in zip(alone, both, strict=True):
        assert a == pytest.approx(b, abs=2e-4, nan_ok=True)


@pytest.mark.slow
def test_going_on_within_an_epoch_with_another_number_of_processes(
    settings: dict[str, Any],
) -> None:
    """The same global batch order: one process, then two, then one with two batches a step."""
    settings |= {**exactly(settings), "image_features_cutoff": 150, "val_split": None}
    train(config_of(settings, name="whole"))
    folder = Path(settings["logs"]) / "run" / "checkpoints"

    def only(step: int) -> None:
        for path in [p for p in folder.iterdir() if p.name != f"step_{step}.pt"]:
            path.unlink()

    train(config_of(settings, save_every_n_steps=1))
    only(2)
    result = torchrun(
        settings, 2, batch_size=6, resume="latest", save_every_n_steps=1, dist_backend="gloo"
    )
    assert result.returncode == 0, result.stderr
    assert "step_2.pt" in result.stderr and "step 3/6" in result.stderr
    only(5)
    train(config_of(settings, batch_size=6, accum_freq=2, resume="latest"))
    assert [x["step"] for x in lines(settings)] == [1, 2, 3, 4, 5, 6]
    whole = lines(settings | {"name": "whole"})
    for a, b in zip(lines(settings), whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    expected, found = final(settings, "whole"), final(settings)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_existing_run_ends_every_rank(settings: dict[str, Any]) -> None:
    (Path(settings["logs"]) / "run").mkdir(parents=True)
    result = torchrun(settings, 2, batch_size=6)
    assert result.returncode != 0
    # Each rank has met the error itself; of one of them the line is that it has failed too.
    lines = [x for x in result.stderr.splitlines() if x.startswith("slidevlm: ") and "exists" in x]
    assert len(lines) >= 2, result.stderr
    assert any(x.startswith("slidevlm: error: run 'run' exists") for x in lines)
    assert "exitcode  : 2 " in result.stderr


# --- augmentation, buckets, tokenizers of a folder ------------------------------------------

AUGMENTATION = {
    "transform_type": "random_flip,random_rotate90,tile_dropout,feature_noise",
    "probability": 0.7,
    "drop_fraction": 0.3,
}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes of Linux")
def test_a_launcher_killed_before_the_processes_have_met(settings: dict[str, Any]) -> None:
    """They wait where nobody is, which they would do for ten minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "0",
        "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    program = (
        "import os, sys; from slidevlm.cli import main; from slidevlm.train import launcher;"
        "launcher.note_launcher(); print(os.getpid(), flush=True); sys.exit(main(sys.argv[1:]))"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.call([{sys.executable!r}, '-c',"
         f" {program!r}, *sys.argv[1:]])", "train", *words_of(settings), "--dist-backend", "gloo"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables},
    )  # fmt: skip
    assert agent.stdout is not None and agent.stderr is not None
    worker = int(agent.stdout.readline())
    agent.kill()
    try:  # its standard error is open as long as it lives
        _, told = agent.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert "torchrun is gone; ending, go on with --resume latest" in told


def test_augmentation_changes_training_alone_and_resumes_exactly(settings: dict[str, Any]) -> None:
    train(config_of(settings))
    metrics = train(
        config_of(settings, aug_cfg=AUGMENTATION, save_every_n_steps=1, name="augmented")
    )
    assert not same(final(settings), final(settings, "augmented"))
    folder = Path(settings["logs"]) / "augmented"
    more = {"resume": str(folder / "checkpoints/step_4.pt"), "workers": 1, "name": "resumed"}
    train(config_of(settings, aug_cfg=AUGMENTATION, **more))
    assert same(final(settings, "augmented"), final(settings, "resumed"))
    plain = train(config_of(settings, pretrained=str(folder), test=True, name="plain"))
    assert plain["val/loss/contrastive"] == metrics["val/loss/contrastive"], "in training alone"


def test_augmentation_that_needs_positions(settings: dict[str, Any], tmp_path: Path) -> None:
    more = small_cohort(tmp_path, lambda i, f: f, positions=False)
    names = "tile_dropout,random_rotate90"
    with pytest.raises(ConfigError, match="random_rotate90 moves positions, and this data has non"):
        train(config_of(settings, **more, aug_cfg={"transform_type": names}, name="refused"))
    train(config_of(settings, **more, aug_cfg={"transform_type": "tile_dropout"}, epochs=1))


def test_steps_of_similar_bags_resume_exactly(settings: dict[str, Any]) -> None:
    settings |= {"bucket": "length", "image_features_cutoff": 150}
    train(config_of(settings, save_every_n_steps=1))
    step = str(Path(settings["logs"]) / "run/checkpoints/step_4.pt")
    train(config_of(settings, resume=step, name="resumed"))
    assert same(final(settings), final(settings, "resumed"))
    with pytest.raises(CheckpointError, match=r"similar_lengths \d+ -> \d+"):
        train(config_of(settings, resume=step, image_features_cutoff=140, name="x"))


def test_a_tokenizer_of_a_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "tumour", "no", "the", ".", "mar", "##gin"]
    model = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    source = tmp_path / "words"
    source.mkdir()
    backend.save(str(source / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    content = json.loads((Path(ckpt.__file__).parents[1] / "models/zoo/coca_tiny.json").read_text())
    content["text"]["tokenizer"] = str(source)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(content))
    metrics = train(config_of(settings, model=str(path), epochs=1))
    folder = Path(settings["logs"]) / "run"
    saved = ckpt.load(folder / "checkpoints/epoch_1.pt")[0]
    assert saved.vocab_size == len(words) == len(saved.weights["text.tokens.weight"])
    assert saved.tokenizer == (folder / "tokenizer.json").read_text()
    shutil.rmtree(source)
    assert evaluate(folder).metrics["val/loss/caption"] == metrics["val/loss/caption"]
    with pytest.raises(ConfigError, match=r"no folder .*words .*wanted are tokenizer\.json"):
        train(config_of(settings, model=str(path), name="other"))


# --- bad specimens may be dropped -----------------------------------------------------------


def spoiled_cohort(folder: Path) -> dict[str, Any]:
    """Of 24 + 6 specimens, s5, s11 and s17 are bad, and s26 of the validation split."""

    def spoil(i: int, features: np.ndarray) -> np.ndarray:
        if i in (5, 26):
            features[3, 2] = np.nan
        return features[:0] if i == 11 else features

    more = small_cohort(folder, spoil)
    with h5py.File(folder / "c.h5", "a") as file:
        del file["patients/p17/s17/uni/features"]
        file["patients/p17/s17/uni/features"] = h5py.ExternalLink("elsewhere.h5", "/x")
    return more


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_specimens_are_dropped_and_listed(settings, capsys, tmp_path, workers) -> None:
    more = {**spoiled_cohort(tmp_path), "batch_size": 8, "workers": workers}
    message = failing(settings, capsys, **more)
    assert "c.h5" in message and any(name in message for name in ("'s5'", "'s11'", "s17"))
    assert not (Path(settings["logs"]) / "run/bad_specimens.txt").exists()
    words = words_of(settings, **more, name="dropped", save_captions=True, val_gen_top_k=1)
    assert main(["train", *words, "--skip-bad-specimens"]) == 0
    folder = Path(settings["logs"]) / "dropped"
    listed = (folder / "bad_specimens.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in listed] == ["s11", "s17", "s26", "s5"]
    assert all(str(tmp_path / "c.h5") in line for line in listed)
    assert "0 tiles" in listed[0] and "link" in listed[1] and "NaN" in listed[3]
    log = (folder / "out.log").read_text()
    assert log.count("dropped a bad specimen") == 4, "one warning each, in two epochs"
    assert "4 bad specimens were dropped" in log
    captions = json.loads((folder / "captions_epoch_2.json").read_text())
    assert [c["id"] for c in captions] == ["s24", "s25", "s27", "s28", "s29"]
    steps = lines(settings | {"name": "dropped"})
    assert len(steps) == 6 and all(np.isfinite(s["loss"]) for s in steps)


def test_where_every_specimen_is_bad(settings, tmp_path) -> None:
    def spoil(i: int, features: np.ndarray) -> np.ndarray:
        return features * (np.nan if i >= 24 else 1)

    more = small_cohort(tmp_path, spoil)
    with pytest.raises(DataError, match="none of the split's 6 specimens could be used"):
        train(config_of(settings, **more, batch_size=8, skip_bad_specimens=True))


@pytest.mark.slow
def test_ranks_that_lose_specimens_equal_one_process(settings, tmp_path) -> None:
    """Two specimens a step: where one is bad, one of the ranks has nothing at all."""
    settings |= {**spoiled_cohort(tmp_path), "skip_bad_specimens": True, "workers": 1}
    settings |= exactly(settings)
    train(config_of(settings, batch_size=2))
    result = torchrun(settings, 2, batch_size=1, name="two", dist_backend="gloo")
    assert result.returncode == 0, result.stderr
    one, two = final(settings), final(settings, "two")
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    logs = Path(settings["logs"])
    listed = [(logs / run / "bad_specimens.txt").read_text() for run in ("run", "two")]
    assert listed[0] == listed[1] and len(listed[0].splitlines()) == 4
    alone, both = lines(settings, "evaluation"), lines(settings | {"name": "two"}, "evaluation")
    for a, b in zip(alone, both, strict=True):
        assert a == pytest.approx(b, abs=2e-4, nan_ok=True)


# --- bad input: what, where, what to do; exit code 2 ----------------------------------------


def failing(settings: dict[str, Any], capsys: pytest.CaptureFixture[str], **more: Any) -> str:
    """Run the command in this process; it must fail with exit code 2. Returns the message."""
    assert main(["train", *words_of(settings, **more)]) == 2
    message = capsys.readouterr().err
    assert "slidevlm: error: " in message
    return message


def small_cohort(
    folder: Path, change: Callable[[int, np.ndarray], np.ndarray], *, positions: bool = True
) -> dict[str, Any]:
    """30 specimens whose features `change` may spoil; settings that name them."""
    rng = np.random.default_rng(0)
    with CaseWriter(folder / "c.h5", "uni", "report", {"unit": "um"}) as writer:
        for i in range(30):
            features = change(i, rng.normal(size=(9, 8)).astype(np.float32))
            place = rng.uniform(0, 1e4, (len(features), 2)).astype(np.float32)
            text = f"Report number {i} of 30."
            writer.add(f"p{i}", f"s{i}", features, text, place if positions else None)
    (folder / "train.txt").write_text(",".join(f"s{i}" for i in range(24)))
    (folder / "val.txt").write_text("\n".join(f"s{i}" for i in range(24, 30)))
    return {
        "hdf5_filename": str(folder / "c.h5"),
        "hdf5_feature_attribute": "uni",
        "train_split": str(folder / "train.txt"),
        "val_split": (str(folder / "val.txt"),),
    }


def test_wrong_attributes(settings, capsys) -> None:
    message = failing(settings, capsys, hdf5_feature_attribute="uni")
    assert "'uni'" in message and "demo" in message and "cohort.h5" in message
    message = failing(settings, capsys, hdf5_text_attribute="diagnosis", name="b")
    assert "'diagnosis'" in message and "report" in message


def test_missing_file(settings, capsys) -> None:
    message = failing(settings, capsys, hdf5_filename="nowhere.h5", train_split="no.txt")
    assert "--hdf5_filename: no file or folder 'nowhere.h5'" in message
    assert "--train-split: no file or folder 'no.txt'" in message


def test_unreadable_hdf5(settings, capsys, tmp_path) -> None:
    (tmp_path / "bad.h5").write_bytes(b"not an HDF5 file" * 100)
    message = failing(settings, capsys, hdf5_filename=str(tmp_path / "bad.h5"))
    assert "bad.h5" in message and "HDF5" in message
    whole = Path(settings["hdf5_filename"]).read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    message = failing(settings, capsys, hdf5_filename=str(tmp_path / "cut.h5"), name="b")
    assert "cut.h5" in message


def test_empty_and_foreign_splits(settings, capsys, tmp_path) -> None:
    (tmp_path / "empty.txt").write_text(" \n,\n")
    message = failing(settings, capsys, train_split=str(tmp_path / "empty.txt"))
    assert "empty.txt" in message
    (tmp_path / "foreign.txt").write_text("x1, x2")
    message = failing(settings, capsys, train_split=str(tmp_path / "foreign.txt"), name="b")
    assert "foreign.txt" in message and "x1" in message


def test_patient_in_two_splits(settings, capsys, cohort, tmp_path) -> None:
    first = cohort.split("train").read_text().split()[0]
    (tmp_path / "val2.txt").write_text(cohort.split("val").read_text() + first)
    message = failing(settings, capsys, val_split=(str(tmp_path / "val2.txt"),))
    assert first.rsplit("-", 1)[0] in message and "--allow-patient-overlap" in message
    words = words_of(settings, val_split=(str(tmp_path / "val2.txt"),), epochs=1, name="allowed")
    assert main(["train", *words, "--allow-patient-overlap"]) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("workers", [0, 1])
def test_features_that_are_not_finite(settings, capsys, tmp_path, value, workers) -> None:
    def spoil(i: int, features: np.ndarray) -> np.ndarray:
        if i == 5:
            features[3, 2] = value
        return features

    more = small_cohort(tmp_path, spoil)
    message = failing(settings, capsys, **more, batch_size=8, workers=workers)
    assert "'s5'" in message and "c.h5" in message and "Traceback" not in message


def test_no_tiles_and_one_tile(settings, capsys, tmp_path) -> None:
    (tmp_path / "zero").mkdir()
    more = small_cohort(tmp_path / "zero", lambda i, f: f[:0] if i == 5 else f)
    message = failing(settings, capsys, **more, batch_size=8)
    assert "'s5'" in message and "0 tiles" in message
    (tmp_path / "one").mkdir()
    more = small_cohort(tmp_path / "one", lambda i, f: f[:1] if i % 2 else f)
    assert main(["train", *words_of(settings, **more, batch_size=8, name="one")]) == 0


def test_a_report_of_50000_characters_trains(settings, tmp_path) -> None:
    more = small_cohort(tmp_path, lambda i, f: f)
    texts = {f"s{i}": "carcinoma in situ, " * 2632 if i == 3 else f"Report {i}." for i in range(30)}
    assert len(texts["s3"]) > 50_000
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    words = words_of(settings, **more, batch_size=8, text_data_file=str(tmp_path / "texts.json"))
    assert main(["train", *words]) == 0
    assert "1 of 24 reports" in (Path(settings["logs"]) / "run/out.log").read_text()


def test_unknown_model(settings, capsys) -> None:
    message = failing(settings, capsys, model="coca_stage1")
    assert "unknown model 'coca_stage1'; did you mean coca_stage_1" in message


def test_one_message_lists_what_is_wrong_with_arguments_model_and_device(settings, capsys) -> None:
    more = {"model": "coca_stage1", "precision": "fp16", "epochs": 0}
    message = failing(settings, capsys, **more, hdf5_filename="nowhere.h5")
    assert "4 problems with the arguments" in message
    for part in ("--epochs must be", "nowhere.h5", "mean coca_stage_1", "fp16 does not run"):
        assert part in message
    with pytest.raises(ConfigError, match="--model has a character of code 0"):
        train(config_of(settings, model="a\0.json", device="c\0pu"))


def test_existing_run(settings, capsys) -> None:
    (Path(settings["logs"]) / "run").mkdir(parents=True)
    message = failing(settings, capsys)
    assert (
        "run 'run' exists in" in message and "choose another --name or --resume latest" in message
    )


def test_an_error_before_the_first_step_leaves_no_run_folder(settings, capsys) -> None:
    failing(settings, capsys, batch_size=64)
    assert not (Path(settings["logs"]) / "run").exists()
    assert main(["train", *words_of(settings, epochs=1)]) == 0, "the same name is free again"
    before = {p.name for p in (Path(settings["logs"]) / "run").iterdir()}
    failing(settings, capsys, resume="latest", batch_size=64)
    assert {p.name for p in (Path(settings["logs"]) / "run").iterdir()} == before
    # Nor does a run that was to go on from elsewhere, or from a name that was mistyped.
    source = str(Path(settings["logs"]) / "run/checkpoints/epoch_1.pt")
    for number, more in enumerate(
        ({"resume": "latest", "test": True}, {"resume": source, "batch_size": 64})
    ):
        failing(settings, capsys, **more, name=f"other {number}")
        assert not (Path(settings["logs"]) / f"other {number}").exists()


def test_too_large_a_batch(settings, capsys) -> None:
    message = failing(settings, capsys, batch_size=64)
    assert "39" in message and "64" in message and "--batch-size" in message


def test_other_features_than_the_model_was_trained_on(settings, tmp_path) -> None:
    train(config_of(settings, epochs=1))
    more = small_cohort(tmp_path, lambda i, f: f)
    run = str(Path(settings["logs"]) / "run")
    with pytest.raises(DataError, match="tiles of width 64, this data's are 8 wide"):
        train(config_of(settings, **more, pretrained=run, name="x", test=True))


def test_cuda_on_purpose_where_there_is_none(settings) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(ConfigError, match="no CUDA device here; use --device cpu"):
        train(config_of(settings, device="cuda"))
    del settings["device"]
    train(config_of(settings, epochs=1))  # the default goes to the CPU, with a warning


def test_errors_are_the_users(settings) -> None:
    """Everything above is a SlideVLMError, which the command line prints without a traceback."""
    for kind in (ConfigError, DataError, CheckpointError):
        assert issubclass(kind, SlideVLMError) and issubclass(kind, ValueError)


def test_external_links_are_not_followed(settings, capsys, tmp_path) -> None:
    more = small_cohort(tmp_path, lambda i, f: f)
    with h5py.File(tmp_path / "c.h5", "a") as file:
        del file["patients/p5/s5/uni/features"]
        file["patients/p5/s5/uni/features"] = h5py.ExternalLink(settings["hdf5_filename"], "/x")
    message = failing(settings, capsys, **more, batch_size=8)
    assert "s5" in message and "link" in message


def test_time_of_the_name(settings) -> None:
    del settings["name"]
    train(config_of(settings, epochs=1))
    (name,) = [p.name for p in Path(settings["logs"]).iterdir()]
    assert name.startswith(time.strftime("%Y_%m_%d-"))
    assert name.endswith("-model_coca_tiny-lr_0.003-b_12-j_0-p_fp32")
