from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from slidevlm.data.dataset import BadSpecimens, BagDataset, BagLoader, collate, make_loader
from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.data.reports import report_id
from slidevlm.data.sampling import EvalBatches, TrainBatches
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.errors import DataError

REPORTS = [f"Report of specimen {i}." for i in range(20)]
TOKENIZER = Tokenizer.train(REPORTS, 300)


def dataset(path, cutoff=8, seed=0, training=True, max_tokens=64):
    store = Hdf5Cases(path, "uni", "report")
    reports = [store.text(case) for case in store.cases]
    return BagDataset(store, store.cases, reports, TOKENIZER, max_tokens, cutoff, seed, training)


def test_sample(write):
    sample = dataset(write([5]))[0]
    assert sample.bag.features[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert sample.bag.positions[:, 0].tolist() == [-10, 0, 10, -5, 5]
    assert TOKENIZER.decode(sample.tokens.tolist()) == REPORTS[0]


def test_the_cutoff_samples_rows_with_their_positions(write):
    data = dataset(write([100]), cutoff=10)
    sample, whole = data[0], dataset(write([100]), cutoff=100)[0]
    rows = sample.bag.features[:, 0].long()
    assert len(rows) == 10 and (rows.diff() > 0).all()
    for field in ("features", "positions", "slides"):
        assert torch.equal(getattr(sample.bag, field), getattr(whole.bag, field)[rows])


def test_sampling_depends_on_seed_epoch_and_specimen_in_training(write):
    path = write([100, 100])

    def rows(index, epoch, **options):
        return tuple(dataset(path, **options)[epoch, index].bag.features[:, 0].tolist())

    drawn = {rows(i, e, seed=s) for i in (0, 1) for e in (0, 1) for s in (0, 1)}
    assert len(drawn) == 8 and rows(0, 1) == rows(0, 1)
    fixed = {rows(0, e, seed=s, training=False) for e in (0, 1) for s in (0, 1)}
    assert len(fixed) == 1
    assert rows(1, 0, training=False) not in fixed


def test_collate(write):
    data = dataset(write([3, 1, 8]))
    data.reports = ("x", "Report of specimen 1.", "X ")
    batch = collate([data[i] for i in range(3)])
    assert batch.bags.lengths == (3, 1, 8) and batch.bags.features.shape == (12, 6)
    assert batch.bags.unit == "um"
    assert batch.bags.features.dtype == torch.float16 and batch.bags.positions.shape == (12, 2)
    assert batch.bags.slides.dtype == torch.int64
    assert batch.specimen_ids == ("s0", "s1", "s2") and batch.patient_ids == ("p0", "p1", "p2")
    assert batch.report_ids.tolist() == [report_id("x"), report_id(REPORTS[1]), report_id("x")]
    for row in range(3):
        length = len(data[row].tokens)
        assert batch.token_mask[row].tolist() == [i < length for i in range(batch.tokens.shape[1])]
        assert batch.tokens[row, length:].unique().tolist() in ([], [TOKENIZER.pad_id])
        assert batch.tokens[row, length - 1] == TOKENIZER.eos_id


def test_long_reports_are_cut_and_counted(write):
    data = dataset(write([3]), max_tokens=12)
    data.reports = ("word " * 10_000,)
    assert len(data[0].tokens) == 12 and data.truncated() == 1


def test_bags_that_cannot_be_in_one_batch(tmp_path):
    with CaseWriter(tmp_path / "a.h5", "uni", attributes={"unit": "um"}) as writer:
        writer.add("p0", "s0", np.ones((2, 3), "f2"), "a", np.zeros((2, 2)))
        writer.add("p1", "s1", np.ones((2, 3), "f2"), "b")
        writer.add("p2", "s2", np.ones((2, 4), "f2"), "c", np.zeros((2, 2)))
    data = dataset(tmp_path / "a.h5")
    with pytest.raises(DataError, match="'s0' .* and 's1' .*: unit of positions um and None"):
        collate([data[0], data[1]])
    with pytest.raises(DataError, match="'s0' .* and 's2' .*: feature width 3 and 4"):
        collate([data[0], data[2]])
    assert collate([data[1]]).bags.positions is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bf16"])
def test_features_that_are_not_finite(tmp_path, bad, dtype):
    features = np.ones((300, 700), "f4")
    features[[3, 299], 5] = bad
    features[299, 6] = bad
    features[0, 0] = 6e4
    if dtype == "bf16":
        features = torch.from_numpy(features).bfloat16().view(torch.int16).numpy().view("u2")
    else:
        features = features.astype(dtype)
    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        writer.add("p0", "s0", features, "a")
    with pytest.raises(DataError, match=r"a\.h5: specimen 's0' has 2 of 300 tiles .* NaN or inf"):
        dataset(tmp_path / "a.h5", cutoff=1000)[0]


def test_finite_features_whose_sum_is_not(tmp_path):
    features = np.full((4, 8), 3e38, "f4")
    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        writer.add("p0", "s0", features, "a")
    assert torch.equal(dataset(tmp_path / "a.h5")[0].bag.features, torch.from_numpy(features))


def test_the_loader_keeps_no_batch_while_it_reads_the_next(write):
    data = dataset(write([5, 5]))
    batches = iter(make_loader(data, EvalBatches(2, 1), 0))
    features = weakref.ref(next(batches).bags.features)
    read, alive = data.store.read, []

    def look(*arguments):
        alive.append(features() is not None)
        return read(*arguments)

    data.store.read = look
    next(batches)
    assert alive == [False]


def test_no_tiles_and_one_tile(write):
    data = dataset(write([0, 1]))
    with pytest.raises(DataError, match=r"cohort\.h5: specimen 's0' has 0 tiles; remove it"):
        data[0]
    assert data[1].bag.features.shape == (1, 6)
    assert data[1].bag.positions.tolist() == [[0, 0]]


def contents(loader):
    return [
        (b.specimen_ids, b.bags.features, b.bags.positions, b.tokens, b.report_ids) for b in loader
    ]


def tiles_of(batches):
    """(specimen, its rows) of everything in `batches`: bags carry both in their features."""
    for names, features, *_ in batches:
        for name in names:
            yield name, features[features[:, 1] == int(name[1:]), 0].tolist()


def same(a, b):
    return len(a) == len(b) and all(
        x[0] == y[0] and all(torch.equal(p, q) for p, q in zip(x[1:], y[1:], strict=True))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_nothing_and_see_the_epoch(write, method):
    path = write([5 + 3 * i for i in range(12)])

    def loader(workers, start_method=None):
        data = dataset(path)
        assert data[0]  # opens the file before the workers start
        sampler = TrainBatches(len(data), 3, seed=0)
        return sampler, make_loader(data, sampler, workers, start_method=start_method)

    (here, direct), (there, parallel) = loader(0), loader(2, method)
    epochs = []
    for epoch in (0, 1):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        epochs.append(contents(direct))
        assert same(epochs[-1], contents(parallel))
    # The same specimen has other tiles in the next epoch, in workers that lived on.
    tiles = [{key: tuple(rows) for key, rows in tiles_of(epoch)} for epoch in epochs]
    assert tiles[0]["s11"] != tiles[1]["s11"]


def test_a_worker_sends_one_memory(write):
    """Each costs the training process time; a single bag has one of its own, and is not copied."""
    path = write([5, 8, 300, 7])
    data = dataset(path)
    for size in (2, 1):
        for workers in (0, 1):
            for batch in make_loader(data, EvalBatches(4, size), workers):
                tensors = [batch.tokens, batch.token_mask, batch.report_ids, batch.bags.positions]
                tensors = [batch.bags.features, *(t for t in tensors if t is not None)]
                memories = {tensor.untyped_storage().data_ptr() for tensor in tensors}
                sent = 1 if size > 1 else 2
                assert len(memories) == (sent if workers else len(tensors))
                assert batch.tokens.data_ptr() % 64 == 0 or not workers
                assert all(tensor.is_contiguous() for tensor in tensors)


def test_more_workers_than_cores_are_told_once_in_a_line(write, monkeypatch, messages):
    monkeypatch.setattr("slidevlm.data.dataset.usable_cores", lambda: 2)
    monkeypatch.setattr(BagLoader, "_cores_told", False)
    data = dataset(write([4] * 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own
        make_loader(data, EvalBatches(3, 1), 2)
        assert messages.text == ""
        for _ in range(2):
            loader = make_loader(data, EvalBatches(3, 1), 5000)
            loader.check_worker_number_rationality()
    assert messages.text.count("--workers 5000 for 2 cores") == 1


def test_one_batch_is_received_ahead_and_a_loop_left_early_begins_anew(write, monkeypatch):
    loader = make_loader(dataset(write([4] * 12)), EvalBatches(12, 1), 1)
    received: SimpleQueue[str] = SimpleQueue()
    fetch = _MultiProcessingDataLoaderIter._next_data

    def noted(self):
        loaded = fetch(self)
        received.put(loaded.batch.specimen_ids[0])
        return loaded

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", noted)
    batches = iter(loader)
    assert next(batches).specimen_ids == ("s0",)
    assert [received.get(timeout=60) for _ in range(2)] == ["s0", "s1"], "by itself"
    batches.close()
    again = [batch.specimen_ids[0] for batch in loader]
    assert again == [f"s{i}" for i in range(12)], "what was received ahead is not lost"
    assert [received.get(timeout=60) for _ in again] == again, "and no more than one was"
    assert loader._receiver is not None
    assert not loader._receiver.is_alive(), "what it holds is not let go while the process ends"


def test_a_loop_left_before_the_end_is_told_lets_its_workers_go(write):
    """The end is then received and never taken; nothing may hang on to it."""
    before = set(multiprocessing.active_children())
    gc.collect()
    gc.disable()
    try:
        loader = make_loader(dataset(write([4, 4])), EvalBatches(2, 2), 1)
        batches = iter(loader)
        next(batches)
        assert set(multiprocessing.active_children()) - before
        batches.close()
        assert loader._receiver is not None
        loader._receiver.join()
        del loader, batches
        assert not set(multiprocessing.active_children()) - before
    finally:
        gc.enable()


def test_a_process_that_ends_within_a_loop_ends_its_workers(write):
    """SIGTERM, by which multiprocessing ends what is left, a worker outlives for a while."""
    program = """
        import sys
        from tests.data import test_dataset as t
        t.make_loader.__globals__["_GRACE_SECONDS"] = 100_000
        batches = iter(t.make_loader(t.dataset(sys.argv[1]), t.EvalBatches(4, 1), 1))
        print(next(batches).specimen_ids)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(write([4] * 4))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.stdout == "('s0',)\n" and not done.returncode, done.stderr


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (1, "spawn")])
def test_errors_of_workers_arrive_as_they_are(write, workers, method):
    path = write([4, 4, 4, 4])
    with h5py.File(path, "a") as file:
        file["patients/p2/s2/uni/features"][1, 1] = np.nan
    data = dataset(path)
    loader = make_loader(data, EvalBatches(4, 2), workers, start_method=method)
    batches = iter(loader)
    assert next(batches).specimen_ids == ("s0", "s1")
    # No `pytest.raises`: it keeps the frames, and with them the workers, until they are collected
    # in an order in which torch waits 5 seconds for each.
    message = ""
    try:
        next(batches)
    except DataError as error:
        message = str(error)
    assert message.startswith(f"{path}: specimen 's2' has 1 of 4 tiles read with NaN")
    assert "Traceback" not in message


# --- bad specimens may be dropped -----------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_specimens_are_dropped_from_their_batches(write, workers, caplog):
    path = write([4, 0, 4, 4, 4, 0, 0])
    with h5py.File(path, "a") as file:
        file["patients/p2/s2/uni/features"][1, 1] = np.nan
    data, bad = dataset(path), BadSpecimens()
    loader = make_loader(data, EvalBatches(7, 2), workers, bad=bad)
    for _ in range(2):
        batches = list(loader)
        names = [batch.specimen_ids for batch in batches]
        assert names == [("s0",), ("s3",), ("s4",), ()], "an empty batch keeps its place"
        # What is left of a batch is what it would be without the bad one.
        for batch, index in zip(batches, (0, 3, 4), strict=False):
            alone = collate([data[index]])
            assert torch.equal(batch.bags.features, alone.bags.features)
            assert torch.equal(batch.tokens, alone.tokens) and batch.bags.lengths == (4,)
    empty = batches[-1].to("cpu")
    assert len(empty) == 0 and empty.bags.lengths == ()
    assert set(bad.messages) == {"s1", "s2", "s5", "s6"}
    assert all(m.startswith(f"{path}: specimen {n!r} has ") for n, m in bad.messages.items())
    assert caplog.text.count("dropped a bad specimen") == 4, "one warning each"


def test_specimens_that_do_not_fit_together_stop_the_run_all_the_same(tmp_path):
    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        writer.add("p0", "s0", np.ones((2, 3), "f2"), "a")
        writer.add("p1", "s1", np.ones((2, 4), "f2"), "b")
    loader = make_loader(dataset(tmp_path / "a.h5"), EvalBatches(2, 2), 0, bad=BadSpecimens())
    with pytest.raises(DataError, match="cannot be in one batch: feature width 3 and 4"):
        list(loader)


# --- what is read, by whom, and in what type --------------------------------------------------


class Counting(Hdf5Cases):
    """Remembers how many rows it was asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = {}

    def read(self, case, rows):
        self.asked[case.specimen] = self.length(case) if rows is None else len(rows)
        return super().read(case, rows)


def test_never_more_rows_than_the_cutoff_are_asked_for(write):
    lengths = [3, 7, 8, 9, 500]
    store = Counting(write(lengths), "uni", "report")
    for training in (True, False):
        data = BagDataset(store, store.cases, REPORTS[:5], TOKENIZER, 64, 8, 0, training)
        (batch,) = make_loader(data, EvalBatches(5, 5), 0)
        assert batch.bags.lengths == (3, 7, 8, 8, 8) and len(batch.bags.features) == 34
        assert store.asked == {f"s{i}": min(n, 8) for i, n in enumerate(lengths)}
        # The rows own their memory: a view would keep the whole bag alive behind them.
        bag = data[4].bag
        assert bag.features.untyped_storage().nbytes() == 8 * 6 * 2
    assert data.lengths().tolist() == [3, 7, 8, 8, 8]


def test_a_length_that_cannot_be_known_is_zero(write):
    path = write([4, 4])
    with h5py.File(path, "a") as file:
        del file["patients/p1/s1/uni/features"]
        file["patients/p1/s1/uni/features"] = h5py.ExternalLink("elsewhere.h5", "/x")
    assert dataset(path).lengths().tolist() == [4, 0]


@pytest.mark.parametrize("dtype", ["f2", "f4", "bf16"])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_type_of_the_file_stays(tmp_path, dtype, workers):
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        for i in range(2):
            if dtype == "bf16":
                values = features.bfloat16().view(torch.int16).numpy().view("u2")
            else:
                values = features.numpy().astype(dtype)
            writer.add(f"p{i}", f"s{i}", values, "a")
    (batch,) = make_loader(dataset(tmp_path / "a.h5"), EvalBatches(2, 2), workers)
    expected = {"f2": torch.float16, "f4": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert batch.bags.features.dtype == batch.to("cpu").bags.features.dtype == expected
    assert torch.equal(batch.bags.features, features.to(expected).repeat(2, 1))


class Handles(BagDataset):
    """Tells, in the place of the report's number, what its process has open; and who it is."""

    def __getitem__(self, key):
        sample = super().__getitem__(key)
        links = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(entry))
        number = links.count(str(self.store.path)) * 10**9 + os.getpid()
        return replace(sample, report_id=number)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_live_on_with_one_handle_each(write, method):
    path = write([4] * 12)
    store = Hdf5Cases(path, "uni", "report")
    store.read(store.cases[0], None)  # a handle that a fork would inherit
    data = Handles(store, store.cases, REPORTS[:12], TOKENIZER, 64, 8, 0, True)
    here = data[0].report_id // 10**9
    batches = TrainBatches(12, 2, 0)
    loader = make_loader(data, batches, 2, start_method=method)
    seen = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        numbers = torch.cat([batch.report_ids for batch in loader])
        seen.append({int(n) % 10**9 for n in numbers})
        # As many as this process has after one read: the file, once for HDF5 and once for rows.
        assert {int(n) // 10**9 for n in numbers} == {here} and 1 <= here <= 2
    assert seen[0] == seen[1] and len(seen[0]) == 2 and os.getpid() not in seen[0]


def test_real_data(shared):
    folder = shared / "data/tcga"
    store = Hdf5Cases(folder / "tcga.h5", "hipt_4096", "diagnosis")
    cases = store.cases[:16]
    reports = [store.text(case) for case in cases]
    data = BagDataset(store, cases, reports, TOKENIZER, 32, 20, 0, True)
    batch = next(iter(make_loader(data, TrainBatches(16, 8, 0), 0)))
    assert max(batch.bags.lengths) <= 20 and batch.bags.features.shape[1] == 192
    assert batch.tokens.shape[1] <= 32
