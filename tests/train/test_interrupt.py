"""A signal is noted; a second Ctrl-C ends at once; afterwards all is as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slidevlm.train.interrupt import Interrupts


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted_and_told(name: str, messages: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(getattr(signal, name))
    with Interrupts() as asked:
        assert asked.name is None
        os.kill(os.getpid(), getattr(signal, name))
        assert asked.name == name
    assert f"{name}: saving after this step" in messages.text
    assert signal.getsignal(getattr(signal, name)) == before


def test_the_second_ctrl_c_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first of its kind
        assert asked.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


WRITING = """
import sys
from slidevlm.run import configure_logging
from slidevlm.train.interrupt import Interrupts

configure_logging(debug=False, main=True)
with Interrupts() as asked:
    print("ready", flush=True)
    for _ in range(2000):
        print("x" * 1000, file=sys.stderr, flush=True)
    print(asked.name, flush=True)
"""


def test_a_signal_that_comes_while_the_log_is_written_to_is_noted() -> None:
    """Of a terminal or a launcher that reads slowly. Python writes to a stream once at a time."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=buffered,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # until the pipe is full
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    found, told = process.communicate(timeout=60)
    assert process.returncode == 0, told[-2000:]
    assert (
        found == "SIGTERM\n" and "SIGTERM: saving after this step or batch, then ending\n" in told
    )


TOLD = """
import sys, time
import torch
from slidevlm import dist
from slidevlm.train.interrupt import Interrupts

dist.start("gloo", torch.device("cpu"), sys.argv[1])
rank = dist.rank()
with Interrupts() as asked:
    assert not asked.came()
    dist.barrier()
    print("ready", flush=True)
    if rank == 0:
        while not asked.came():
            time.sleep(0.01)
    dist.barrier()
    print(asked.name, asked.came(), flush=True)
dist.stop()
"""


def test_a_signal_to_one_process_is_heard_of_by_the_others(tmp_path: Path) -> None:
    """While the one that has it waits for them."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOLD, f"file://{tmp_path}/meeting"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    processes[1].send_signal(signal.SIGUSR1)
    found = [process.communicate(timeout=60)[0] for process in processes]
    assert found == ["None True\n", "SIGUSR1 True\n"]


OF_A_CHILD = """
import logging, os, signal, time
from slidevlm.train.interrupt import Interrupts

logging.basicConfig()
with Interrupts() as asked:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.5)
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(asked.came())
"""


def test_a_signal_to_a_forked_process_is_not_the_run_s() -> None:
    """A loader ends its readers by signals."""
    done = subprocess.run(
        [sys.executable, "-c", OF_A_CHILD], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n" and "saving" not in done.stderr


def test_another_thread_leaves_signals_alone() -> None:
    found = []

    def work() -> None:
        with Interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_signal_that_comes_again_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with Interrupts():
        for name in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(name)
    told = [message.split(":")[0] for message in caplog.messages]
    assert told == ["SIGUSR1", "SIGTERM"]
