"""Reading whole specimens in blocks, by any number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from slidevlm.data import scan as scanning
from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.digest import Digest
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.parallel import each
from slidevlm.data.scan import blocks, scan
from slidevlm.errors import DataError


def test_blocks_are_the_whole_specimen_and_bounded(write, monkeypatch):
    store = Hdf5Cases(write([3000], width=64), "uni")
    monkeypatch.setattr(scanning, "_BLOCK_BYTES", 64 * 2 * 500)
    found = list(blocks(store, store.cases[0], 3000))
    assert [first for first, _ in found] == [0, 256, 756, 1256, 1756, 2256, 2756]
    whole = store.read(store.cases[0], None)
    for name in ("features", "positions", "slides"):
        parts = torch.cat([getattr(bag, name) for _, bag in found])
        assert torch.equal(parts, getattr(whole, name))


def test_digests_do_not_depend_on_blocks_but_on_everything_else():
    values = torch.randn(50, 4).half()

    def digest(*parts: torch.Tensor) -> str:
        one = Digest()
        for part in parts:
            one.update(part)
        return one.hexdigest()

    whole = digest(values)
    assert whole == digest(values[:7], values[7:7], values[7:]) and len(whole) == 32
    changed = values.clone()
    changed[49, 3] += 1
    others = [digest(x) for x in (changed, values[:49], values.view(100, 2), values.bfloat16())]
    assert len({whole, *others}) == 5
    assert digest(values[:0]) != digest(values[:0, :2])


def test_slides_bad_rows_and_facts(write, monkeypatch):
    path = write([1000])
    with h5py.File(path, "a") as file:
        features = file["patients/p0/s0/uni/features"]
        for row, value in ((3, np.nan), (700, np.inf), (701, -np.inf)):
            features[row, 2] = value
    monkeypatch.setattr(scanning, "_BLOCK_BYTES", 1)
    store = Hdf5Cases(path, "uni")
    found = scan(store, store.cases[0])
    assert (found.length, found.width, found.dtype, found.bad_rows) == (1000, 6, "float16", 3)
    assert (found.facts.unit, found.has_positions, found.problem) == ("um", True, None)
    truth = []
    bag = store.read(store.cases[0], None)
    for slide in (0, 1):
        one = Digest()
        one.update(bag.features[bag.slides == slide])
        truth.append(one.hexdigest())
    assert list(found.slides) == truth


def test_large_finite_features_are_finite(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["patients/p/a/uni/features"] = np.full((300, 8), 3e38, np.float32)
    store = Hdf5Cases(tmp_path / "a.h5", "uni")
    assert scan(store, store.cases[0]).bad_rows == 0


def test_what_cannot_be_read_is_a_problem_not_an_error(write):
    path = write([5])
    with h5py.File(path, "a") as file:
        del file["patients/p0/s0/uni/positions"]
        file["patients/p0/s0/uni/positions"] = np.full((5, 2), np.nan)
    store = Hdf5Cases(path, "uni")
    assert "5 of 5 rows" in scan(store, store.cases[0]).problem

    def broken(case, rows):
        raise ZeroDivisionError("from a library")

    store.read = broken
    assert scan(store, store.cases[0]).problem.endswith("ZeroDivisionError: from a library")


def _pid(store: CaseStore, case: Case) -> tuple[int, int]:
    return os.getpid(), store.length(case)


def _die(store: CaseStore, case: Case) -> None:
    os._exit(1)


def _fail(store: CaseStore, case: Case) -> None:
    raise DataError(f"about {case.specimen}")


@pytest.mark.parametrize("workers", [0, 2])
def test_each_case_once(write, workers):
    store = Hdf5Cases(write(range(1, 31)), "uni")
    found = {case.specimen: result for case, result in each(_pid, store, store.cases, workers)}
    assert {name: length for name, (_, length) in found.items()} == {
        f"s{i}": i + 1 for i in range(30)
    }
    pids = {pid for pid, _ in found.values()}
    assert pids == {os.getpid()} if workers == 0 else os.getpid() not in pids


def test_errors_and_deaths_of_workers(write):
    store = Hdf5Cases(write([1, 1, 1]), "uni")
    with pytest.raises(DataError, match=r"about s\d"):
        list(each(_fail, store, store.cases, 1))
    with pytest.raises(
        DataError, match=r"a reading process died at one of these specimens: s0, s1, s2"
    ):
        list(each(_die, store, store.cases, 1))


_WAITING_WORKERS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from waiting import wait_for_ever
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.parallel import each
if __name__ == "__main__":
    store = Hdf5Cases(Path({path!r}), "uni")
    list(each(wait_for_ever, store, store.cases, 2))
"""
_WAIT_FOR_EVER = """
import os, time
def wait_for_ever(store, case):
    open({here!r} + "/pid" + str(os.getpid()), "w").close()
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_workers_end_with_a_killed_parent(write, tmp_path):
    here, path = str(tmp_path), str(write([1, 1, 1]))
    (tmp_path / "waiting.py").write_text(_WAIT_FOR_EVER.format(here=here))
    (tmp_path / "main.py").write_text(_WAITING_WORKERS.format(here=here, path=path))
    process = subprocess.Popen([sys.executable, str(tmp_path / "main.py")])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    workers = [int(file.name[3:]) for file in tmp_path.glob("pid*")]
    assert len(workers) == 2 and all(map(_runs, workers))
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    """Whether a process exists and is more than an entry that no one has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
