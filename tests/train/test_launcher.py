"""Without its launcher a process ends; without torchrun nothing is watched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slidevlm.cli import main
from slidevlm.train.launcher import LauncherWatch, note_launcher

WORKER = """
import sys, time
from slidevlm.train.launcher import LauncherWatch
with LauncherWatch(poll_seconds=0.05):
    print("watching", flush=True)
    time.sleep(60)
"""
# What importing torch is: it lasts until the launcher has gone.
SLOW_WORKER = """
import os, time
from slidevlm.train.launcher import LauncherWatch, note_launcher
note_launcher()
launcher = os.getppid()
print("noted", flush=True)
while os.getppid() == launcher:
    time.sleep(0.01)
with LauncherWatch(poll_seconds=0.05):
    time.sleep(60)
"""
# Starts the worker, tells its number, and waits: what torchrun does.
AGENT = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""


def lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes of Linux")
@pytest.mark.parametrize("program", [WORKER, SLOW_WORKER])
@pytest.mark.parametrize(("variables", "ends"), [({"TORCHELASTIC_RUN_ID": "x"}, True), ({}, False)])
def test_a_process_ends_with_its_launcher(
    variables: dict[str, str], ends: bool, program: str
) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, program],
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | variables,
    )
    assert agent.stdout is not None
    worker = int(agent.stdout.readline())
    assert lives(worker)
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    until = time.monotonic() + (20 if ends else 1)
    while lives(worker) and time.monotonic() < until:
        time.sleep(0.02)
    assert lives(worker) is not ends
    if not ends:
        os.kill(worker, signal.SIGKILL)


def test_the_note_is_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It outlives exec, and is no word about a child, which inherits the environment."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("SLIDEVLM_LAUNCHER", f"{os.getpid()} 17")
    note_launcher()
    assert LauncherWatch()._parent == 17
    monkeypatch.setenv("SLIDEVLM_LAUNCHER", f"{os.getppid()} 17")
    assert LauncherWatch()._parent == os.getppid()
    assert main(["--version"]) == 0, "the command line notes it before all else"
    assert os.environ["SLIDEVLM_LAUNCHER"] == f"{os.getpid()} {os.getppid()}"


def test_alone_no_thread_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = threading.active_count()
    with LauncherWatch():
        assert threading.active_count() == before


def test_afterwards_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with LauncherWatch(poll_seconds=0.01):
        (watcher,) = [t for t in threading.enumerate() if t.name == "launcher watch"]
    watcher.join(timeout=10)
    assert not watcher.is_alive()
