"""--copy-codebase with real processes: what runs is the copy, whatever becomes of the original."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import slidevlm
from slidevlm.app import codebase, train
from slidevlm.app.runs import with_run_settings
from slidevlm.config import Config, validate, with_values
from slidevlm.data.synthetic import DemoCohort
from slidevlm.errors import ConfigError
from slidevlm.flags import arguments

FLAGS = {a.name: a.flag for a in arguments()}
PACKAGE = Path(slidevlm.__file__).parent
SPECIMENS = 60
SETTINGS = {"batch_size": 4, "num_samples": 16, "workers": 1}


def words(values: dict[str, Any]) -> list[str]:
    return [w for key, value in values.items() for w in (FLAGS[key], str(value))]


class Installation:
    """A copy of the package outside the repository, that a test may spoil."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "installed"
        shutil.copytree(
            PACKAGE, self.source / "slidevlm", ignore=shutil.ignore_patterns("__pycache__")
        )

    def start(self, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
        launcher = ["-m", "slidevlm"]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={processes}", "-m", "--", "slidevlm"]
        return subprocess.Popen(
            [sys.executable, *launcher, "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # `python -m` would import what lies in the working folder before all else.
            cwd=self.source,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.source)},
        )

    def spoil(self) -> None:
        for file in (self.source / "slidevlm").rglob("*.py"):
            file.write_text("raise RuntimeError('the original was imported')\n")


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)


def ran(run: Path) -> dict[str, Any]:
    return json.loads((run / "environment.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_copy_runs_whatever_becomes_of_the_original(
    settings: dict[str, Any], cohort: DemoCohort, tmp_path: Path, processes: int
) -> None:
    installation = Installation(tmp_path)
    run = tmp_path / "logs" / "run"
    given = words(settings | {"save_frequency": 1})
    process = installation.start(*given, "--copy-codebase", "--json", processes=processes)
    # Until the copy is whole the original is needed; then it never is again.
    wait_for(run / "environment.json", process)
    installation.spoil()
    code, out, err = finish(process)
    assert code == 0, err
    assert Path(json.loads(out)["folder"]) == run
    assert ran(run)["code"] == str(run / "code" / "slidevlm")
    assert ran(run)["command"][:2] == [str(run / "code"), "train"]
    assert f"running the copy of the package in {run / 'code'}" in err
    metrics = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in metrics if x["kind"] == "train"] == list(
        range(1, 2 * 16 // 4 // processes + 1)
    )
    copied = {p.relative_to(run / "code") for p in (run / "code").rglob("*") if p.is_file()}
    original = {p.relative_to(PACKAGE.parent) for p in PACKAGE.rglob("*") if p.is_file()}
    wanted = {p for p in original if "__pycache__" not in p.parts}
    assert copied == {Path("__main__.py"), *wanted}, "all of the package, and no bytecode"
    if processes == 1:
        # The copy alone can still do everything.
        again = subprocess.run(
            [
                *(sys.executable, str(run / "code"), "evaluate", str(run)),
                *("--val-split", str(cohort.split("val"))),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert again.returncode == 0, again.stderr
        (evaluation,) = run.glob("evaluation-*")
        assert ran(evaluation)["code"] == str(run / "code" / "slidevlm")
        assert not list(evaluation.glob("code*"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "tcp", "slurm"])
def test_processes_that_no_torchrun_started_run_the_copy(
    settings: dict[str, Any], tmp_path: Path, way: str
) -> None:
    """They meet twice: before there is a copy, and as the copy, at an address of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = {"file": f"file://{tmp_path}/meet", "tcp": f"tcp://127.0.0.1:{port}"}.get(way)
    given = words(settings | {"epochs": 1, "dist_backend": "gloo"})
    given += ["--copy-codebase", *([] if url is None else ["--dist-url", url])]
    started = []
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        if way == "slurm":  # as srun sets them
            place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2"}
            place |= {"SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0"}
            place |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "slidevlm", "train", *given],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **place},
            )
        )
    try:
        for process in started:
            code, _, err = finish(process)
            assert code == 0, err
    finally:
        for process in started:
            process.kill()
    run = tmp_path / "logs" / "run"
    assert ran(run)["code"] == str(run / "code" / "slidevlm")
    metrics = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in metrics if x["kind"] == "train"] == [1, 2], "two processes"


@pytest.mark.slow
def test_a_resumed_run_runs_the_present_code(settings: dict[str, Any], tmp_path: Path) -> None:
    installation = Installation(tmp_path)
    values = settings | {"save_frequency": 1, "epochs": 1}
    run = tmp_path / "logs" / "run"
    code, _, err = finish(installation.start(*words(values), "--copy-codebase"))
    assert code == 0, err
    code, _, err = finish(installation.start(*words(values), "--copy-codebase"))
    assert code == 2 and "run 'run' exists" in err and (run / "code").is_dir()
    changed = installation.source / "slidevlm" / "dist.py"
    changed.write_text(changed.read_text() + "\nCHANGED = True\n")
    values |= {"epochs": 2, "resume": "latest"}
    code, _, err = finish(installation.start(*words(values), "--copy-codebase"))
    assert code == 0, err
    (second,) = run.glob("code-*")
    assert ran(run)["code"] == str(second / "slidevlm")
    assert "CHANGED" in (second / "slidevlm" / "dist.py").read_text()
    assert "CHANGED" not in (run / "code" / "slidevlm" / "dist.py").read_text()
    assert (run / "checkpoints" / "epoch_2.pt").exists()


@pytest.mark.slow
def test_a_mistake_found_by_the_copy_leaves_no_run(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    values = settings | {"hdf5_feature_attribute": "lacking"}
    del values["name"]  # the copy is told the name that its forerunner chose
    code, _, err = finish(Installation(tmp_path).start(*words(values), "--copy-codebase"))
    assert code == 2 and "lacking" in err and "running the copy" in err, err
    assert "model_coca_tiny-lr_0.0005" in err
    assert not list((tmp_path / "logs").iterdir())


def test_python_is_told_to_use_the_command(settings: dict[str, Any], tmp_path: Path) -> None:
    config = with_values(Config(), settings | {"copy_codebase": True})
    with pytest.raises(ConfigError, match="only with the command `slidevlm train`"):
        train(config)
    assert not (tmp_path / "logs").exists()


def test_without_a_run_folder_there_is_no_place_for_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = with_values(Config(), settings | {"logs": "None", "copy_codebase": True})
    with pytest.raises(ConfigError, match="--copy-codebase copies into the run folder"):
        validate(config)


def test_an_evaluation_of_the_run_does_not_copy(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("copy-codebase: true\nseed: 3\n")
    (tmp_path / "checkpoints").mkdir()
    for given in ({}, {"probe": True}):
        config = with_run_settings(tmp_path, with_values(Config(), given))
        assert not config.logging.copy_codebase and config.evaluation.seed == 3


def test_a_package_from_elsewhere_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_values(Config(), {"copy_codebase": True})
    monkeypatch.setenv(codebase.CODE, str(tmp_path))
    with pytest.raises(ConfigError, match=f"not from the copy in {tmp_path}"):
        codebase.is_copy(config)
    monkeypatch.setenv(codebase.CODE, str(PACKAGE.parent))
    monkeypatch.setenv(codebase.MEETING, "tcp://host:1")
    assert codebase.is_copy(config) and codebase.meeting(config) == "tcp://host:1"
    assert codebase.meeting(Config()) == "env://", "without the argument nothing of it holds"
