"""Which process this is, from torchrun's, Slurm's and given values."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slidevlm.errors import ConfigError
from slidevlm.launch import (
    Place,
    check_agent_store,
    check_meeting_file,
    first_node,
    place_of,
    share_cores,
    slurm_port,
)

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[017-018,031]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_threads_give_their_core_away_unless_the_user_says_otherwise() -> None:
    environment: dict[str, str] = {"PATH": "/bin"}
    share_cores(environment)
    assert environment == {"PATH": "/bin", "GOMP_SPINCOUNT": "10000"}
    for mine in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment = dict(mine)
        share_cores(environment)
        assert environment == mine


@pytest.mark.parametrize(("mine", "expected"), [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_the_openmp_of_torch_has_read_it(mine: dict[str, str], expected: str) -> None:
    code = "from slidevlm.cli import main; main(['--version']); import torch"
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **mine, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("torch has another OpenMP here")
    assert f"GOMP_SPINCOUNT = '{expected}'" in told


_FAULTS = """
import resource
import numpy as np
from slidevlm.cli import main
main(["--version"])
def bag():
    return [np.ones(1 << 19) for _ in range(4)]  # of 4 MB each
for _ in range(3):
    bag()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bag()
print("\\n", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    """Pages that the process touches for the first time, in ten bags of 16 MB after three."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[always]" in huge.read_text():
        pytest.skip("pages of 2 MB, of which there are few")
    own = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and "MALLOC" not in k}

    def faults(**mine: str) -> int:
        told = subprocess.run(
            [sys.executable, "-c", _FAULTS],
            env={**own, **mine},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(told.stdout.split()[-1])

    assert faults() < 100
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 1_000


def test_alone() -> None:
    assert place_of({}) is None
    assert place_of({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) is None, "salloc, without srun"
    assert place_of({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None


def test_a_batch_script_without_srun_does_not_wait_for_tasks_that_never_come() -> None:
    batch = {**SLURM, "SLURM_PROCID": "0"}
    del batch["SLURM_STEP_ID"]
    with pytest.raises(ConfigError, match=r"of 8 tasks, and srun has not .*: put srun before"):
        place_of(batch)
    assert place_of({**batch, "SLURM_NTASKS": "1"}) is None, "what the message proposes"
    assert place_of({**batch, "SLURM_STEPID": "0"}) is not None, "the older name"


def test_torchrun_and_slurm() -> None:
    assert place_of(TORCHRUN) == Place(3, 4, 1, "env://", "torchrun")
    assert place_of(SLURM) == Place(5, 8, 1, "tcp://gpu017:19711", "Slurm")
    assert place_of({**SLURM, **TORCHRUN}).started_by == "torchrun", "torchrun within a job"
    assert place_of({**SLURM, "SLURM_STEP_NODELIST": "b2"}).url == "tcp://b2:19711"
    given = {**SLURM, "MASTER_ADDR": "h", "MASTER_PORT": "99"}
    assert place_of(given).url == "tcp://h:99"
    assert place_of(SLURM, "file:///x/y").url == "file:///x/y"
    assert place_of({"RANK": "0", "WORLD_SIZE": "2"}, "tcp://h:5").url == "tcp://h:5"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[3,5-9]", "n3"), ("a[08-11]b,c", "a08b")],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_ports_differ_by_job_and_step_and_stay_in_range() -> None:
    ports = {slurm_port(job, step) for job in (1, 2, 3) for step in (0, 1)}
    assert len(ports) == 6
    assert all(15_000 <= slurm_port(j, s) < 30_000 for j in (0, 10**7) for s in (0, 2**32 - 2))


@pytest.mark.parametrize(
    ("environment", "url", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "env://", "MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "tcp://h:1", "rank 2 of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "tcp://h:1", "RANK is 'x'"),
        ({}, "tcp://h:1", "set RANK and WORLD_SIZE"),
        (TORCHRUN, "http://h", "is not env://"),
        (TORCHRUN, "tcp://h", "is not env://"),
        (TORCHRUN, "file://here", "is not env://"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
            "env://",
            "SLURM_JOB_NODELIST not",
        ),
    ],
)
def test_what_is_lacking_or_wrong(environment: dict[str, str], url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_of(environment, url)


def test_a_file_left_behind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "meet"
    check_meeting_file(f"file://{file}", 600, 1e12)
    file.write_text("")
    check_meeting_file(f"file://{file}", 600, file.stat().st_mtime + 5)
    with pytest.raises(ConfigError, match="an earlier run has left"):
        check_meeting_file(f"file://{file}", 600, file.stat().st_mtime + 601)
    with pytest.raises(ConfigError, match="no folder"):
        check_meeting_file(f"file://{tmp_path}/none/meet", 600, 0)


WORKER = """
import json, sys, torch
from slidevlm import dist
dist.start("gloo", torch.device("cpu"), sys.argv[1])
found = dist.gather_objects((dist.rank(), dist.local_rank()))
dist.stop()
print(json.dumps([found, dist.is_main_of_environment()]))
"""


def test_torchruns_store_is_there_before_its_processes() -> None:
    variables = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with socket.socket() as store:
        store.bind(("127.0.0.1", 0))
        variables["MASTER_PORT"] = str(store.getsockname()[1])
        with pytest.raises(ConfigError, match="torchrun, which keeps the store .* is gone"):
            check_agent_store(variables, "env://", 0.3)
        check_agent_store(variables, "tcp://elsewhere:1", 0.3)
        check_agent_store(variables | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, "env://", 0.3)
        store.listen()
        check_agent_store(variables, "env://", 0.3)


@pytest.mark.parametrize("way", ["slurm", "file", "tcp"])
def test_real_processes_meet(way: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = {"slurm": "env://", "file": f"file://{tmp_path}/meet", "tcp": f"tcp://127.0.0.1:{port}"}
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    clean = {k: v for k, v in os.environ.items() if k not in names and "SLURM" not in k}
    processes = []
    for rank in (0, 1):
        mine = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        if way == "slurm":
            mine = {
                "SLURM_PROCID": str(rank),
                "SLURM_NTASKS": "2",
                "SLURM_LOCALID": str(rank),
                "SLURM_JOB_NODELIST": "localhost",
                "SLURM_JOB_ID": str(port),
                "SLURM_STEP_ID": "0",
            }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, url[way]],
                env={**clean, **mine},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out) == [[[0, 0], [1, 1]], rank == 0]
