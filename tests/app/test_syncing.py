"""--remote-sync of whole runs: copies, an empty machine that goes on, two processes, secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm.app import train
from slidevlm.app.notebook import evaluate
from slidevlm.config import Config, with_values
from slidevlm.errors import ConfigError
from slidevlm.flags import arguments
from slidevlm.remote import Remote
from slidevlm.train import checkpoint as ckpt

FLAGS = {a.name: a.flag for a in arguments()}
SETTINGS = {"save_every_n_steps": 1}


def run(settings: dict[str, Any], **more: Any) -> Path:
    values = {**settings, **more}
    train(with_values(Config(), values))
    return Path(values["logs"]) / values["name"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return ckpt.load(folder / "checkpoints/epoch_2.pt")[0].weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("service", ["s3", "file"])
def test_an_empty_machine_goes_on_from_the_copy(
    service: str, settings: dict[str, Any], tmp_path: Path, request, capsys
) -> None:
    url = request.getfixturevalue("s3") if service == "s3" else f"file://{tmp_path}/copies"
    protocol = {"s3": "s3", "file": "fsspec"}[service]
    settings |= {"remote_sync": url, "remote_sync_protocol": protocol}
    whole = run(settings, name="whole")
    shutil.copytree(whole, tmp_path / "kept")
    told = capsys.readouterr().err
    assert f"copying the run folder to {url}/whole" in told
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "none of it")
    texts = [f.read_text(errors="replace") for f in whole.rglob("*") if f.is_file()]
    assert secret not in told and not any(secret in text for text in texts)
    # All of the run is there, as it was at its end.
    elsewhere = {"logs": str(tmp_path / "another machine"), "resume": "latest", "name": "whole"}
    again = run(settings, epochs=3, **elsewhere)
    for name in ("out.log", "metrics.jsonl"):
        kept = (tmp_path / "kept" / name).read_text()
        assert kept and (again / name).read_text().startswith(kept), name
    assert "got checkpoints/epoch_2.pt from" in capsys.readouterr().err
    # And what the other machine did has reached the copy, for a third one, which evaluates nothing
    # anew: it only finds that all epochs are done.
    third = run(settings, epochs=3, **{**elsewhere, "logs": str(tmp_path / "third")})
    found = ckpt.newest(third / "checkpoints")
    assert found is not None and found[2].progress.epoch == 3


def test_within_an_epoch_and_past_a_damaged_copy(
    settings: dict[str, Any], tmp_path: Path, capsys
) -> None:
    settings |= {"remote_sync": f"file://{tmp_path}/copies", "remote_sync_protocol": "fsspec"}
    expected = weights(run(settings))
    copies = tmp_path / "copies/run/checkpoints"
    for name in ("epoch_2.pt", "step_4.pt"):
        (copies / name).unlink(missing_ok=True)
    names = [f.name for f in copies.iterdir()]
    (copies / "step_9.pt").write_bytes((copies / names[0]).read_bytes()[:1000])
    shutil.rmtree(settings["logs"])
    capsys.readouterr()
    assert same(weights(run(settings, resume="latest")), expected)
    told = capsys.readouterr().err
    assert "skipping a checkpoint" in told and "got checkpoints/step_3.pt from" in told
    assert "step 3/4" not in told, "only what was left is done"


def test_what_cannot_be_copied_to_stops_the_run_at_once(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    settings |= {"remote_sync": f"file://{tmp_path}/file/x", "remote_sync_protocol": "fsspec"}
    with pytest.raises(ConfigError, match="--remote-sync file://"):
        run(settings)
    assert not (Path(settings["logs"]) / "run").exists()


def test_a_copy_that_cannot_be_fetched_is_told_without_keys(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(remote: Remote) -> None:
        raise OSError("a key was refused: xSECRETx")

    monkeypatch.setenv("AWS_SESSION_TOKEN", "xSECRETx")
    monkeypatch.setattr(Remote, "record", record)
    settings |= {"remote_sync": f"file://{tmp_path}/copies", "remote_sync_protocol": "fsspec"}
    with pytest.raises(ConfigError, match="refused: <AWS_SESSION_TOKEN>"):
        run(settings, resume="latest")


def test_an_evaluation_of_a_run_copies_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"remote_sync": f"file://{tmp_path}/copies", "remote_sync_protocol": "fsspec"}
    folder = run(settings, test_split=settings["train_split"], allow_patient_overlap=True)
    evaluate(folder)
    assert [f.name for f in (tmp_path / "copies").iterdir()] == ["run"]
    assert not list((tmp_path / "copies").rglob("evaluation*"))


@pytest.mark.slow
def test_of_two_processes_the_first_copies_and_an_error_ends_both(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def two(**more: Any) -> subprocess.CompletedProcess[str]:
        values = {**settings, "batch_size": 4, "dist_backend": "gloo", **more}
        words = [w for k, v in values.items() for w in (FLAGS[k], str(v))]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        return subprocess.run(
            [sys.executable, *launcher, "-m", "--", "slidevlm", "train", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    (tmp_path / "file").write_text("")
    refused = {"remote_sync": f"file://{tmp_path}/file/x", "remote_sync_protocol": "fsspec"}
    done = two(name="refused", **refused)
    assert done.returncode != 0 and "--remote-sync file://" in done.stderr
    fine = {"remote_sync": f"file://{tmp_path}/copies", "remote_sync_protocol": "fsspec"}
    done = two(**fine)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("copying the run folder to") == 1
    assert (tmp_path / "copies/run/checkpoints/epoch_2.pt").exists()
