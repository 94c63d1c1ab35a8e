"""One of several processes fails, hangs or is killed: all end, and its message comes last."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slidevlm.errors import ConfigError
from slidevlm.train.ranks import IDLE_VARIABLE, LIMIT_VARIABLE, RankWatch, limit_of

# The others do what a process within an NCCL collective does: they wait, and heed no SIGTERM.
WORKER = """
import multiprocessing, os, pathlib, signal, sys, time
import torch
from slidevlm import dist
from slidevlm.train import ranks
from slidevlm.train.ranks import RankWatch

folder, deed, bad = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
url = sys.argv[4] if len(sys.argv) > 4 else "env://"
dist.start("gloo", torch.device("cpu"), url)
rank = dist.rank()
long = 3 * float(os.environ["SLIDEVLM_HANG_SECONDS"])


def compute():
    until = time.monotonic() + long
    while time.monotonic() < until:
        sum(range(10000))


def read_slowly():
    with open("/dev/zero", "rb", buffering=0) as file:
        for _ in range(int(long)):
            time.sleep(1)
            file.read(10)


if deed == "both":  # no watching thread ends a rank that is about to raise
    ranks._TICK_SECONDS = ranks._ANSWER_SECONDS = 60.0
try:
    with RankWatch():
        signal.signal(signal.SIGTERM, lambda *_: None)
        time.sleep(1)  # signs were given
        dist.barrier()
        (folder / f"met{rank}").touch()
        if deed == "end":
            time.sleep(rank)
        elif deed == "both":
            raise ValueError(f"the tiles of rank {rank} are bad")
        elif deed == "lose":
            if rank == bad:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.barrier()
        elif deed in ("compute", "read"):
            with dist.alone:
                if rank != bad:
                    pass
                elif deed == "compute":
                    compute()
                else:
                    child = multiprocessing.get_context("fork").Process(target=read_slowly)
                    child.start()
                    child.join()
            dist.barrier()
        elif deed == "hang":
            if rank == bad:
                with dist.alone:
                    time.sleep(600)
            dist.barrier()
        elif deed == "step":
            with dist.stepping:
                if rank == bad:
                    time.sleep(600)
                for wait in [dist.begin_sum(torch.ones(1)) for _ in range(rank + 1)]:
                    wait()
        elif deed == "slow step":
            with dist.stepping:
                if rank == bad:
                    compute()
                dist.barrier()
        elif deed == "slow device":  # all have begun the same
            with dist.stepping:
                dist.barrier()
                time.sleep(long)
            dist.barrier()
        elif rank != bad:
            time.sleep(600)
        elif deed == "raise":
            raise ValueError(f"the tiles of rank {rank} are bad")
        else:
            os.kill(os.getpid(), signal.SIGSTOP if deed == "stop" else signal.SIGKILL)
finally:
    (folder / f"left{rank}").touch()
    dist.stop()
"""
# A loaded machine may hold up a healthy process for seconds: only where one is stopped is the limit
# short. Ranks that do not look have none.
LIMITS = {"stop": "10", "both": "0"}
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes of Linux")


def environment(deed: str) -> dict[str, str]:
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    rest = {k: v for k, v in os.environ.items() if k not in gone}
    return {
        **rest,
        "OMP_NUM_THREADS": "1",
        LIMIT_VARIABLE: LIMITS.get(deed, "100"),
        IDLE_VARIABLE: "8",
    }


def wait_all(processes: list[subprocess.Popen[str]], folder: Path, world: int) -> None:
    until = time.monotonic() + 150  # a loaded machine takes its time to import torch
    while len(list(folder.glob("met*"))) < world and time.monotonic() < until:
        if all(p.poll() is not None for p in processes):
            return
        time.sleep(0.02)
    until = time.monotonic() + 60  # the bar
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(0.02)


def by_hand(tmp_path: Path, world: int, *words: str) -> tuple[list[int | None], str]:
    """Exit codes (None: it did not end) and what was printed; rank 0 keeps the store."""
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    told = tmp_path / "told"
    with told.open("w") as file:
        processes = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), *words],
                env={**environment(words[0]), **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=file,
                text=True,
            )
            for rank in range(world)
        ]
        wait_all(processes, tmp_path, world)
    codes = [p.poll() for p in processes]
    for process in processes:
        process.kill()
        process.wait()
    return codes, told.read_text()


def by_torchrun(tmp_path: Path, *words: str) -> tuple[int | None, str]:
    """The agent's exit code and what was printed."""
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", str(tmp_path / "worker.py"), str(tmp_path), *words]
    told = tmp_path / "told"
    with told.open("w") as file:
        agent = subprocess.Popen(
            command, env=environment(words[0]), stderr=file, text=True, start_new_session=True
        )
        wait_all([agent], tmp_path, 2)
    code = agent.poll()
    if code is None:
        os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
    return code, told.read_text()


def last_line(told: str) -> str:
    return told.strip().splitlines()[-1]


# --- quick ----------------------------------------------------------------------------------


def test_alone_nothing_is_watched() -> None:
    with RankWatch() as watch:
        assert watch._threads == []


def test_an_error_alone_goes_through() -> None:
    with pytest.raises(ValueError, match="mine"), RankWatch():
        raise ValueError("mine")


def test_the_limit_is_a_number() -> None:
    assert limit_of({}) == 30
    assert limit_of({LIMIT_VARIABLE: "2.5"}) == 2.5
    assert limit_of({LIMIT_VARIABLE: "0"}) == float("inf")
    for text in ("x", "-1", "nan"):
        with pytest.raises(ConfigError, match=LIMIT_VARIABLE):
            limit_of({LIMIT_VARIABLE: text})
    assert limit_of({LIMIT_VARIABLE: "3", IDLE_VARIABLE: "7"}, IDLE_VARIABLE, 40) == 7
    assert limit_of({LIMIT_VARIABLE: "3"}, IDLE_VARIABLE, 40) == 40
    with pytest.raises(ConfigError, match=IDLE_VARIABLE):
        limit_of({IDLE_VARIABLE: "soon"}, IDLE_VARIABLE, 40)


def test_what_one_raises_ends_all_and_is_told_last(tmp_path: Path) -> None:
    codes, told = by_hand(tmp_path, 3, "raise", "1")
    assert codes == [1, 1, 1], told
    assert last_line(told).endswith("ValueError: the tiles of rank 1 are bad")
    for rank in (0, 2):
        assert f"slidevlm: rank {rank} ends, because rank 1 has failed" in told
        assert not (tmp_path / f"left{rank}").exists(), "it waited on"


# --- slow -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_who_ends_earlier_is_no_failure(tmp_path: Path) -> None:
    codes, told = by_hand(tmp_path, 3, "end", "0")
    assert codes == [0, 0, 0], told
    assert "slidevlm:" not in told


@pytest.mark.slow
def test_all_raise_and_each_is_told(tmp_path: Path) -> None:
    codes, told = by_hand(tmp_path, 2, "both", "0")
    assert codes == [1, 1], told
    assert "rank 0 are bad" in told and "rank 1 are bad" in told
    assert told.count("has failed too") == 1
    assert "ValueError: the tiles of rank" in last_line(told)


@pytest.mark.slow
@linux
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_who_is_killed_takes_the_others_along(tmp_path: Path, bad: int) -> None:
    codes, told = by_hand(tmp_path, 3, "kill", str(bad))
    assert codes == [-9 if rank == bad else 1 for rank in range(3)], told
    wanted = "where the processes met is gone" if bad == 0 else f"rank {bad} (process"
    assert wanted in told


@pytest.mark.slow
@linux
@pytest.mark.parametrize("bad", [0, 1])
def test_who_is_stopped_takes_the_others_along(tmp_path: Path, bad: int) -> None:
    codes, told = by_hand(tmp_path, 3, "stop", str(bad))
    # Rank 0 keeps the store: the others can tell each other nothing more, and it stays stopped.
    assert codes == ([None, 1, 1] if bad == 0 else [1, -9, 1]), told
    assert ("gives no answer" if bad == 0 else "has given no sign for 10 s") in told


@pytest.mark.slow
def test_a_broken_collective_names_its_cause(tmp_path: Path) -> None:
    codes, told = by_hand(tmp_path, 2, "lose", "1")
    assert codes == [1, -9], told
    assert "was killed" in last_line(told) or "lost another process" in last_line(told)


@pytest.mark.slow
@linux
@pytest.mark.parametrize("bad", [0, 1])
def test_a_main_thread_that_hangs_ends_all_and_is_told_last(tmp_path: Path, bad: int) -> None:
    codes, told = by_hand(tmp_path, 2, "hang", str(bad))
    assert codes == [1, 1], told
    assert last_line(told).startswith(f"slidevlm: rank {bad} stands still: for ")
    assert "worker.py:" in last_line(told) and IDLE_VARIABLE in last_line(told)
    assert f"slidevlm: rank {1 - bad} ends, because rank {bad} has failed" in told


@pytest.mark.slow
@linux
@pytest.mark.parametrize("bad", [0, 2])
def test_who_hangs_in_a_step_is_told_from_those_that_wait_for_it(tmp_path: Path, bad: int) -> None:
    """All stand still; those that wait have begun 1, 2 or 3 collectives more."""
    codes, told = by_hand(tmp_path, 3, "step", str(bad))
    assert codes == [1, 1, 1], told
    assert last_line(told).startswith(f"slidevlm: rank {bad} stands still: for "), told
    assert told.count("stands still") == 1


@pytest.mark.slow
@linux
@pytest.mark.parametrize("deed", ["compute", "read", "slow step", "slow device"])
def test_who_works_or_waits_for_one_that_does_stands_not_still(tmp_path: Path, deed: str) -> None:
    codes, told = by_hand(tmp_path, 2, deed, "1")
    assert codes == [0, 0], told
    assert "slidevlm:" not in told


@pytest.mark.slow
def test_processes_that_met_at_a_file_are_watched_too(tmp_path: Path) -> None:
    codes, told = by_hand(tmp_path, 2, "raise", "1", f"file://{tmp_path}/meet")
    assert codes == [1, 1], told
    assert last_line(told).endswith("ValueError: the tiles of rank 1 are bad")


@pytest.mark.slow
@linux
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("deed", ["raise", "stop", "kill", "step"])
def test_torchrun_ends_in_time(tmp_path: Path, deed: str, bad: int) -> None:
    code, told = by_torchrun(tmp_path, deed, str(bad))
    assert code == 1, told
    assert not (tmp_path / f"left{1 - bad}").exists(), "it waited on"
    if deed == "raise":
        # torchrun's summary comes after the processes, with the message in it.
        ours = [i for i, line in enumerate(told.splitlines()) if "slidevlm: rank" in line]
        message = f"ValueError: the tiles of rank {bad} are bad"
        printed = [i for i, line in enumerate(told.splitlines()) if line.endswith(message)]
        assert printed[0] > max(ours)
        assert f"rank      : {bad} " in told
    elif deed == "step":
        assert f"slidevlm: rank {bad} stands still: for " in told
    else:
        what = "has given no sign" if deed == "stop" else "was killed"
        assert f"slidevlm: rank {bad} (process" in told and what in told
