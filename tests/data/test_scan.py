"""Reading whole specimens in blocks, by any number of processes."""

from __future__ import annotations

import os

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
