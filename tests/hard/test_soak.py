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
# A leak grows in a line for ever, an allocator's fragments ever less. So the second half of the
# rounds counts, there a round's growth and the whole: 0.05 MB a round are found after 100.
MOST_A_ROUND_MB = 0.03
MOST_MB = 2.5
CERTAIN = 3.0  # standard errors of the line's slope
LEAST_ROUNDS = 6
ENDS = 3  # rounds at the beginning and the end whose handles are compared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200 + 3 * SECONDS),
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


def resident() -> float:
    """Memory of this process's own in MB; pages of files and libraries are the system's."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # what the allocator keeps for later is no leak
        libc.malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    own = [line.split()[1] for line in lines if line.startswith(("RssAnon", "RssShmem"))]
    return sum(map(int, own)) / 1024


def held() -> Held:
    return Held(
        resident(),
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


def growth(megabytes: Sequence[float]) -> tuple[float, float]:
    """A round's growth in the second half of the rounds, by a straight line, and its error."""
    later = np.asarray(megabytes[len(megabytes) // 2 :])
    rounds = np.arange(len(later)) - (len(later) - 1) / 2
    squares = float(np.sum(rounds**2))
    slope = float(np.sum(rounds * later)) / squares
    rest = later - later.mean() - slope * rounds
    return slope, float(np.sqrt(np.sum(rest**2) / (len(later) - 2) / squares))


def soak(turn: Callable[[int], None], seconds: float) -> list[Held]:
    """What is held after each round, the first two left out: they fill caches."""
    for number in range(2):
        turn(number)
    found, until = [held()], time.monotonic() + seconds
    while time.monotonic() < until or len(found) < LEAST_ROUNDS:
        turn(2 + len(found))
        found.append(held())
    return found


def leaks(found: Sequence[Held], before: Sequence[str] = ()) -> list[str]:
    """What has grown, and processes that are there and were not `before`."""
    a_round, error = growth([h.megabytes for h in found])
    whole = a_round * (len(found) - len(found) // 2)
    told = []
    if a_round - CERTAIN * error > 0 and a_round > MOST_A_ROUND_MB and whole > MOST_MB:
        told.append(
            f"memory grows by {a_round:.3f} \u00b1 {error:.3f} MB a round, {whole:.1f} MB in all"
        )
    for name in ("files", "children", "threads", "handlers"):
        counts = [
            value if isinstance(value := getattr(h, name), int) else len(value) for h in found
        ]
        if min(counts[-ENDS:]) > max(counts[:ENDS]):
            first, last = getattr(found[0], name), getattr(found[-1], name)
            told.append(f"{name}: {first} became {last}")
    left = [Counter(h.children) - Counter(before) for h in found[-ENDS:]]
    if all(left):
        told.append(f"still there: {sorted(left[-1])}")
    return told


def test_nothing_is_held_after_a_training(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    settings = {**testing.settings(tmp_path), "epochs": 2}
    del settings["test_split"]
    before = children()  # of other tests in this process: wandb's service, a server of forks
    found = soak(lambda number: one_round(settings, tmp_path, number), SECONDS)
    megabytes = [h.megabytes for h in found]
    a_round, error = growth(megabytes)
    marks = [megabytes[i * (len(found) - 1) // 10] for i in range(11)]
    print(
        f"{len(found)} rounds: {' '.join(f'{m:.1f}' for m in marks)} MB; in the second half "
        f"{a_round:+.4f} \u00b1 {error:.4f} MB a round; {found[-1]}"
    )
    assert leaks(found, before) == []


@pytest.mark.parametrize("what", ["files", "threads", "children"])
def test_a_handle_left_would_be_found(what: str, tmp_path: Path) -> None:
    kept: list[Any] = []
    done = threading.Event()

    def leaky(number: int) -> None:
        if what == "files":
            kept.append((tmp_path / "x").open("w"))
        elif what == "threads":
            kept.append(threading.Thread(target=done.wait))
            kept[-1].start()
        else:
            kept.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)))
            kept[-1].start()

    before = children()  # of other tests in this process
    try:
        told = leaks(soak(leaky, 0.0), before)
        assert any(line.startswith(what) for line in told)
        assert any(line.startswith("still there") for line in told) == (what == "children")
    finally:
        done.set()
        for one in kept:
            if what == "files":
                one.close()
            elif what == "children":
                one.kill()
                one.join()


def test_a_process_left_once_would_be_found() -> None:
    one = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    one.start()
    try:
        assert any(told.startswith("still there") for told in leaks([held()] * LEAST_ROUNDS))
    finally:
        one.kill()
        one.join()


@pytest.mark.parametrize(("kilobytes", "rounds"), [(50, 120), (1000, LEAST_ROUNDS)])
def test_memory_left_would_be_found(kilobytes: int, rounds: int) -> None:
    kept = []
    megabytes = []
    gc.collect()
    gc.freeze()  # what other tests made need not be looked through every time
    try:
        for number in range(rounds):
            kept.append(np.full(kilobytes * 1000 // 8, float(number)))
            megabytes.append(resident())
    finally:
        gc.unfreeze()
    assert leaks(of_memory(megabytes)), megabytes
    assert not leaks(of_memory(megabytes[-1:] * rounds))


def of_memory(megabytes: Sequence[float]) -> list[Held]:
    return [Held(m, 3, (), ("MainThread",), 1) for m in megabytes]


def test_fragments_are_no_leak_and_hide_none() -> None:
    random = np.random.default_rng(0)
    rounds = np.arange(400)
    levels_off = 300 + 3 * (1 - np.exp(-rounds / 60)) + random.normal(0, 0.3, len(rounds))
    assert leaks(of_memory(levels_off.tolist())) == []
    assert leaks(of_memory((levels_off + 0.05 * rounds).tolist()))
    assert leaks(of_memory((levels_off + 0.05 * rounds)[:120].tolist()))
