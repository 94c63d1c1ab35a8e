"""What is settled before torch is there: which of several processes this one is, where they meet
(from torchrun, Slurm or a URL), how its threads wait for each other, and what memory it keeps.
"""

from __future__ import annotations

import ctypes
import re
import socket
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from slidevlm.errors import ConfigError

# Below the ports that systems give out by themselves.
_FIRST_PORT, _PORTS = 15_000, 15_000

# Turns of the loop in which a thread waits before it sleeps; some 50 microseconds.
_SPINS = 10_000

# mallopt(3): what it sets, and to how many bytes: where glibc on 64 bits arrives by itself at most.
_TRIM_THRESHOLD, _KEPT_BYTES = -1, 1 << 26
_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1 << 25


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait for each other give their core away after some 50 microseconds.

    The OpenMP of torch's wheels (libgomp) spins for milliseconds. Where anything else wants a core,
    such as the processes that read bags, the thread that is waited for then has none: steps take
    2 to 15 times as long (`benchmarks/spinning.py`). It reads the environment once, when torch is
    imported. What the user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = str(_SPINS)


def keep_memory(environment: Mapping[str, str]) -> None:
    """Let the process keep memory that it has freed, for the next tensors.

    Until something large has been freed, glibc gives what is free at the end of its heap back to
    the system. The next bag then has new pages, 4 kB each, which cost a sixth of its time
    (docs/performance.md). Now it keeps 64 MB there, and has tensors of up to 32 MB in the heap, as
    it does by itself after it has freed one of these. What the user has set stays.
    """
    mine = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    if mine & environment.keys():
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


@dataclass(frozen=True)
class Place:
    """One of several processes."""

    rank: int
    world_size: int
    local_rank: int
    url: str  # env://, tcp://host:port or file://path, as torch.distributed takes it
    started_by: str  # torchrun (or variables like its own), Slurm


def place_of(environment: Mapping[str, str], url: str = "env://") -> Place | None:
    """The place that the environment names; None for a process of its own.

    Rank and number of processes come from RANK and WORLD_SIZE (torchrun), else from Slurm's
    SLURM_PROCID and SLURM_NTASKS (srun). With env:// they meet at MASTER_ADDR and MASTER_PORT, or
    under Slurm at the first node and a port made of the job's number.

    Raises:
        ConfigError: variables that are lacking or no numbers, a URL of another kind, or a Slurm job
            of several tasks in which srun has not started this process.
    """
    if not re.fullmatch(r"env://|tcp://[^/]+:\d+|file:///.+", url):
        raise ConfigError(
            f"--dist-url {url!r} is not env://, tcp://HOST:PORT or file:///ABSOLUTE/PATH"
        )
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _of_torchrun(environment, url)
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        if not {"SLURM_STEP_ID", "SLURM_STEPID"} & environment.keys():  # srun alone sets them
            raise ConfigError(
                f"this is a Slurm job of {environment['SLURM_NTASKS']} tasks, and srun has not "
                "started this process: put srun before the command, or SLURM_NTASKS=1 for a "
                "process by itself"
            )
        return _of_slurm(environment, url)
    if url != "env://":
        raise ConfigError(
            f"--dist-url {url} says where processes meet, but not which of them this is: set RANK "
            "and WORLD_SIZE, or start with torchrun or srun"
        )
    return None


def _of_torchrun(environment: Mapping[str, str], url: str) -> Place:
    if url == "env://":
        lacking = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in environment]
        if lacking:
            raise ConfigError(
                f"RANK and WORLD_SIZE are set, {' and '.join(lacking)} not; start with torchrun, "
                "give --dist-url, or unset RANK and WORLD_SIZE for one process"
            )
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    return _checked(Place(rank, size, _number(environment, "LOCAL_RANK", 0), url, "torchrun"))


def _of_slurm(environment: Mapping[str, str], url: str) -> Place:
    if url == "env://":
        host = environment.get("MASTER_ADDR")
        if host is None:
            names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
            nodes = next((environment[n] for n in names if n in environment), None)
            if nodes is None:
                raise ConfigError(
                    "SLURM_PROCID is set, SLURM_JOB_NODELIST not; start with srun, or set "
                    "MASTER_ADDR to the first node"
                )
            host = first_node(nodes)
        port = environment.get("MASTER_PORT") or slurm_port(
            _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
        )
        url = f"tcp://{host}:{port}"
    return _checked(
        Place(
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_NTASKS"),
            _number(environment, "SLURM_LOCALID", 0),
            url,
            "Slurm",
        )
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise ConfigError(f"{name} is {text!r} in the environment, and must be a whole number")
    return int(text)


def _checked(place: Place) -> Place:
    if not place.rank < place.world_size:
        raise ConfigError(
            f"rank {place.rank} of {place.world_size} processes ({place.started_by}): ranks are "
            "counted from 0"
        )
    return place


def first_node(nodes: str) -> str:
    """The first host of a list in Slurm's form.

    >>> first_node("gpu[003-007,12],login1")
    'gpu003'
    >>> first_node("rack[1-2]node[5,7]")
    'rack1node5'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ConfigError(f"SLURM_JOB_NODELIST {nodes!r} names no node")
    return re.sub(r"\[([^\]]*)\]", lambda m: re.split("[-,]", m.group(1))[0], first.group())


def slurm_port(job: int, step: int) -> int:
    """A port that is the same for all tasks of a step, and another one for other steps."""
    return _FIRST_PORT + (job + 97 * step) % _PORTS


def check_meeting_file(url: str, older_than_seconds: float, now: float) -> None:
    """ConfigError where a file:// meeting place was left behind by an earlier run."""
    if not url.startswith("file://"):
        return
    path = Path(url.removeprefix("file://"))
    if not path.parent.is_dir():
        raise ConfigError(f"--dist-url {url}: there is no folder {path.parent}")
    if path.exists() and now - path.stat().st_mtime > older_than_seconds:
        raise ConfigError(
            f"--dist-url {url}: an earlier run has left the file; delete it, or "
            "name a new one for every run"
        )


def check_agent_store(environment: Mapping[str, str], url: str, seconds: float) -> None:
    """ConfigError where torchrun's store has no listener for so long.

    It had one before torchrun started this process: torchrun was killed, and to wait would be vain.
    """
    if url != "env://" or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
        except OSError as error:
            if time.monotonic() > until:
                raise ConfigError(
                    f"torchrun, which keeps the store at {host}:{port} where its processes meet, "
                    f"is gone ({error}); start anew"
                ) from error
            time.sleep(0.2)
        else:
            return
