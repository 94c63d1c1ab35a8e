"""Short trainings without end in one process: memory, open files, processes and threads stay flat.

A minute or two by default; `make hard` takes two hours ($SLIDEVLM_SOAK_SECONDS). Every way that
holds something beyond a step takes its turn: loader processes, generated reports, averages of the
weights, copies elsewhere, evaluation of a run, its page, a model in use, and runs that end with an
error.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slidevlm
from slidevlm import testing
from slidevlm.cli import main
from slidevlm.errors import SlideVLMError

SECONDS = float(os.environ.get("SLIDEVLM_SOAK_SECONDS", "75"))
MOST_GROWTH_MB = 8.0  # of the median between the two halves, and
MOST_GROWTH_A_ROUND_MB = 0.25  # of the line through all rounds after the first, which fill caches
LEAST_ROUNDS = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300 + 3 * SECONDS),
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="processes of Linux"),
]


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    megabytes: float
    files: int
    children: tuple[str, ...]
    threads: tuple[str, ...]
    handlers: int  # of the package's log


def children() -> tuple[str, ...]:
    """Commands of the processes that this one started and that still are there."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [pid for file in found for pid in file.read_text().split()]
    commands = []
    for pid in pids:
        try:
            commands.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended meanwhile
            continue
    # Python's own server of semaphores, started once for all loaders.
    return tuple(sorted(c for c in commands if "resource_tracker" not in c))


def held() -> Held:
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # what the allocator keeps for later is no leak
        libc.malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return Held(
        int(resident.split()[1]) / 1024,
        len(os.listdir("/proc/self/fd")),
        children(),
        tuple(sorted(t.name.split("-")[0] for t in threading.enumerate())),
        len(logging.getLogger("slidevlm").handlers),
    )


def one_round(settings: dict[str, Any], folder: Path, number: int) -> None:
    """Every way once; what was written is removed again."""
    labels = Path(settings["train_split"]).parent
    ways: list[dict[str, Any]] = [
        {"workers": 1},
        {"siglip": True, "accum_freq": 2, "batch_size": 2, "ema": 0.9, "workers": 1},
        {
            "save_captions": True,
            "caption_val_max_seq_len": 4,
            "val_split": (str(labels / "val.txt"),),
            "zsc_class_prompt_mapping": (str(labels / "diagnosis_prompts.json"),),
            "zsc_specimen_class_mapping": (str(labels / "diagnosis.json"),),
            "eval_metric_bootstraps": 20,
            "save_every_n_steps": 1,
            "delete_previous_checkpoint": True,
        },
        {
            "report_to": "tensorboard",
            "remote_sync": (folder / "copies").as_uri(),
            "remote_sync_protocol": "fsspec",
            "log_memory": True,
        },
    ]
    for way in ways:
        slidevlm.train({**settings, **way, "name": "run", "seed": number})
        run = folder / "logs/run"
        if "save_captions" in way:
            slidevlm.evaluate(run, workers=1)
            asked = [str(run), settings["hdf5_filename"], "--device", "cpu", "--workers", "1"]
            asked += ["--output", str(folder / "vectors.npz")]
            assert main(["embed", *asked]) == 0
            (folder / "vectors.npz").unlink()
            assert main(["report", str(run)]) == 0
        shutil.rmtree(run)
    shutil.rmtree(folder / "copies")
    for wrong in ({"train_split": "nowhere"}, {"hdf5_feature_attribute": "nothing"},
                  {"batch_size": 1000}, {"resume": str(labels / "train.txt")}):  # fmt: skip
        with pytest.raises(SlideVLMError):
            slidevlm.train({**settings, **wrong, "name": "wrong"})


def grown(values: list[float]) -> tuple[float, float]:
    """From the median of the first half to that of the second; and a round, by a straight line."""
    half = len(values) // 2
    between = statistics.median(values[-half:]) - statistics.median(values[:half])
    return between, float(np.polyfit(np.arange(len(values)), values, 1)[0])


def soak(turn: Callable[[int], None], seconds: float) -> list[Held]:
    """What is held after each round, the first two left out: they fill caches."""
    for number in range(2):
        turn(number)
    found, until = [held()], time.monotonic() + seconds
    while time.monotonic() < until or len(found) < LEAST_ROUNDS:
        turn(2 + len(found))
        found.append(held())
    return found


def leaks(found: list[Held], before: Sequence[str] = ()) -> list[str]:
    """What has grown, and processes that are there and were not `before`."""
    between, a_round = grown([h.megabytes for h in found])
    told = []
    if between > MOST_GROWTH_MB and a_round > MOST_GROWTH_A_ROUND_MB:
        told.append(f"memory grows by {a_round:.2f} MB a round, {between:.1f} MB between halves")
    for name in ("files", "children", "threads", "handlers"):
        first, last = getattr(found[0], name), getattr(found[-1], name)
        if first != last:
            told.append(f"{name}: {first} became {last}")
    if left := Counter(found[-1].children) - Counter(before):
        told.append(f"still there: {sorted(left)}")
    return told


def test_nothing_is_held_after_a_training(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    settings = {**testing.settings(tmp_path), "epochs": 2}
    del settings["test_split"]
    before = children()  # of other tests in this process: wandb's service, a server of forks
    found = soak(lambda number: one_round(settings, tmp_path, number), SECONDS)
    between, a_round = grown([h.megabytes for h in found])
    print(
        f"{len(found)} rounds: {found[0].megabytes:.0f} to {found[-1].megabytes:.0f} MB, "
        f"{between:+.1f} MB between halves, {a_round:+.3f} MB a round; {found[-1]}"
    )
    assert leaks(found, before) == []


@pytest.mark.parametrize("what", ["memory", "files", "threads", "children"])
def test_a_leak_would_be_found(what: str, tmp_path: Path) -> None:
    kept: list[Any] = []
    done = threading.Event()

    def leaky(number: int) -> None:
        if what == "memory":
            kept.append(np.ones(4_000_000 // 8 + number))
        elif what == "files":
            kept.append((tmp_path / "x").open("w"))
        elif what == "threads":
            kept.append(threading.Thread(target=done.wait))
            kept[-1].start()
        else:
            kept.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)))
            kept[-1].start()

    try:
        assert any(told.startswith((what, "still there")) for told in leaks(soak(leaky, 0.0)))
    finally:
        done.set()
        for one in kept:
            if what == "files":
                one.close()
            elif what == "children":
                one.kill()
                one.join()
