"""A run that is asked to end saves, says how to go on, and does; alone and on two processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from slidevlm.data.synthetic import DemoCohort
from slidevlm.flags import arguments
from slidevlm.train import checkpoint as ckpt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals of Unix"),
]
EPOCHS = 12
FLAGS = {a.name: a.flag for a in arguments()}
SPECIMENS = 60


def command(
    cohort: DemoCohort,
    logs: Path,
    name: str,
    processes: int = 1,
    launcher: tuple[str, ...] = (),
    **more: Any,
) -> list[str]:
    settings = {
        "hdf5_filename": cohort.hdf5,
        "hdf5_feature_attribute": "demo",
        "hdf5_text_attribute": "report",
        "train_split": cohort.split("train"),
        "test_split": cohort.split("val"),
        "model": "coca_tiny",
        "batch_size": 12 // processes,
        "image_features_cutoff": 20,
        "workers": 1,
        "epochs": EPOCHS,
        "save_frequency": EPOCHS,
        "precision": "fp32",
        "device": "cpu",
        "dist_backend": "gloo",
        "log_every_n_steps": 1,
        "logs": logs,
        "name": name,
        **more,
    }
    words = [word for key, value in settings.items() for word in (FLAGS[key], str(value))]
    if processes == 1:
        return [sys.executable, "-m", "slidevlm", "train", *words]
    launcher = launcher or ("--standalone", f"--nproc-per-node={processes}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher]
    return [*torchrun, "-m", "--", "slidevlm", "train", *words]


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    metrics = run / "metrics.jsonl"
    until = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until, "training has not begun"
        time.sleep(0.02)


def final(run: Path) -> dict[str, torch.Tensor]:
    return ckpt.load(run / "checkpoints" / f"epoch_{EPOCHS}.pt")[0].weights


def go_on(words: list[str]) -> None:
    done = subprocess.run(
        [*words, "--resume", "latest"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(
    cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    logs = tmp_path_factory.mktemp("logs")
    process = start(command(cohort, logs, "undisturbed"))
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return final(logs / "undisturbed")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_ends_with_0(cohort, undisturbed, tmp_path, name):
    words = command(cohort, tmp_path, "run")
    process = start(words)
    wait_for_steps(process, tmp_path / "run", 4)
    # As a terminal and Slurm do: to every process of the run, its workers too.
    os.killpg(process.pid, getattr(signal, name))
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert f"{name}: saving after this step" in told
    assert "--name run --resume latest" in told
    assert "Traceback" not in told
    saved = list((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert len(saved) == 1 and saved[0].name.startswith("step_")
    assert not (tmp_path / "run" / "test.json").exists(), "the test split waits for the end"
    go_on(words)
    assert (tmp_path / "run" / "test.json").exists()
    assert same(final(tmp_path / "run"), undisturbed)


@pytest.fixture(scope="module")
def undisturbed_two(
    cohort: DemoCohort, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """One torchrun, two processes."""
    logs = tmp_path_factory.mktemp("logs")
    process = start(command(cohort, logs, "whole", 2))
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return final(logs / "whole")


def test_two_processes_end_together_and_go_on(cohort, undisturbed_two, tmp_path):
    logs = tmp_path
    words = command(cohort, logs, "run", 2)
    process = start(words)
    wait_for_steps(process, logs / "run", 4)
    process.terminate()  # torchrun hands it to its processes
    _, told = process.communicate(timeout=60)
    assert "--name run --resume latest" in told
    (saved,) = (logs / "run" / "checkpoints").glob("*.pt")
    assert saved.name.startswith("step_")
    go_on(words)
    assert same(final(logs / "run"), undisturbed_two)


def test_two_nodes_are_one(cohort, undisturbed_two, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=nodes")
    launcher = ("--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1", *meet)
    words = command(cohort, tmp_path, "run", 2, launcher)
    nodes = [start(words) for _ in range(2)]
    for node in nodes:
        _, told = node.communicate(timeout=240)
        assert node.returncode == 0, told
    assert same(final(tmp_path / "run"), undisturbed_two)


def rank_of(agent: subprocess.Popen[str], rank: int) -> int:
    """The number of a process that torchrun has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    (pid,) = (
        int(c) for c in children if wanted in Path(f"/proc/{c}/environ").read_bytes().split(b"\0")
    )
    return pid


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes of Linux")
@pytest.mark.parametrize("killed", [0, 1])
def test_torchrun_starts_anew_where_a_process_was_killed(cohort, undisturbed_two, tmp_path, killed):
    launcher = ("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    words = command(cohort, tmp_path, "run", 2, launcher, save_every_n_steps=2)
    process = start([*words, "--resume", "latest"])
    wait_for_steps(process, tmp_path / "run", 7)
    os.kill(rank_of(process, killed), signal.SIGKILL)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "resum" in told and f"rank {killed} (process" in told
    assert same(final(tmp_path / "run"), undisturbed_two)


def test_two_processes_log_their_memory_and_node(cohort, tmp_path):
    words = command(cohort, tmp_path, "run", 2, epochs=1)
    done = subprocess.run(
        [*words, "--log-memory", "--log-local"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in told if x["kind"] == "train"]
    assert len(steps) == 3 and all(50 < x["memory_mb"] < 5000 for x in steps)
    # One node: its first process alone has a file.
    logs = {f.name for f in (tmp_path / "run").glob("out*.log")}
    assert logs == {"out.log", "out-0.log"}
    assert "step 3/3" in (tmp_path / "run" / "out-0.log").read_text()
