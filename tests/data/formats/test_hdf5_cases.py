from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from slidevlm.data.formats import rows as rows_module
from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases, slides_of_keys
from slidevlm.errors import DataError


def custom(path: Path, features: np.ndarray, name: str = "a", **options: object) -> Hdf5Cases:
    """One specimen with features written as given."""
    with h5py.File(path, "a") as file:
        file.create_dataset(f"patients/p/{name}/uni/features", data=features, **options)
        file[f"patients/p/{name}/report"] = "text"
    return Hdf5Cases(path, "uni", "report")


def test_round_trip(write):
    store = Hdf5Cases(write([5, 3]), "uni", "report")
    assert [(c.patient, c.specimen) for c in store.cases] == [("p0", "s0"), ("p1", "s1")]
    assert store.length(store.cases[0]) == 5
    bag = store.read(store.cases[0], None)
    assert bag.features.shape == (5, 6)
    assert bag.features.dtype == torch.float16 and bag.features[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert bag.unit == "um" and bag.slides.tolist() == [0, 0, 0, 1, 1]
    assert bag.positions[:, 0].tolist() == [0, 10, 20, 30, 40]
    assert bag.centres[:, 0].tolist() == [10, 10, 10, 35, 35]
    assert bag.relative_positions()[:, 0].tolist() == [-10, 0, 10, -5, 5]
    assert store.text(store.cases[1]) == "Report of specimen 1."


def test_rows_keep_features_positions_slides_and_centres_together(write):
    store = Hdf5Cases(write([50]), "uni", "report")
    rows = np.array([0, 3, 4, 24, 25, 49])
    whole, part = store.read(store.cases[0], None), store.read(store.cases[0], rows)
    for field in ("features", "positions", "slides", "centres"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[rows])


@pytest.mark.parametrize("options", [{}, {"chunks": (7, 6)}, {"chunks": (7, 6), "compression": 4}])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f2", ">f4"])
def test_types_and_storage(tmp_path, options, dtype):
    values = np.random.default_rng(0).standard_normal((40, 6)).astype(dtype)
    store = custom(tmp_path / "a.h5", values, **options)
    rows = np.array([0, 1, 9, 21, 39])
    expected = torch.from_numpy(values.astype("f2" if dtype.endswith("2") else "f4"))
    assert torch.equal(store.read(store.cases[0], None).features, expected)
    assert torch.equal(store.read(store.cases[0], rows).features, expected[rows])


@pytest.mark.parametrize("form", ["uint16", "V2"])
@pytest.mark.parametrize("options", [{}, {"chunks": (4, 3)}])
def test_bfloat16_bits(tmp_path, form, options):
    truth = torch.randn(9, 3).bfloat16()
    bits = truth.view(torch.int16).numpy().view(form)
    store = custom(tmp_path / "a.h5", bits, **options)
    assert torch.equal(store.read(store.cases[0], None).features, truth)
    assert torch.equal(store.read(store.cases[0], np.array([2, 7])).features, truth[[2, 7]])


def test_a_custom_16_bit_float_type_is_converted(tmp_path):
    path = tmp_path / "a.h5"
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    with h5py.File(path, "w") as file:
        group = file.create_group("patients/p/a/uni")
        space = h5py.h5s.create_simple((3, 4))
        dataset = h5py.h5d.create(group.id, b"features", kind, space)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(12, dtype="f4").reshape(3, 4))
    store = Hdf5Cases(path, "uni")
    assert store.read(store.cases[0], np.array([2])).features.tolist() == [[8, 9, 10, 11]]


@pytest.mark.parametrize("options", [{}, {"chunks": True}])
@pytest.mark.parametrize("shape", [(1, 12, 3), (4, 3, 3), (12, 1, 3), (1, 1, 3)])
def test_three_dimensions_are_flattened(tmp_path, shape, options):
    values = np.random.default_rng(0).standard_normal(shape).astype("f4")
    store = custom(tmp_path / "a.h5", values, **options)
    flat = torch.from_numpy(values.reshape(-1, 3))
    case = store.cases[0]
    assert store.length(case) == len(flat)
    assert torch.equal(store.read(case, None).features, flat)
    for rows in (np.arange(len(flat)), np.arange(len(flat))[::5], np.array([len(flat) - 1])):
        assert torch.equal(store.read(case, rows).features, flat[rows])


def test_positions_of_tiles_are_repeated_for_their_sub_tiles(tmp_path):
    path = tmp_path / "a.h5"
    custom(path, np.ones((2, 3, 4), "f2"))
    with h5py.File(path, "a") as file:
        group = file["patients/p/a/uni"]
        group["positions"] = np.array([[0, 1, 7], [10, 11, 7]])
        group["positions"].attrs["unit"] = "px"
        group["tile_keys"] = np.array([[5, 1, 0, 0], [5, 2, 0, 0]])
    store = Hdf5Cases(path, "uni")
    bag = store.read(store.cases[0], np.array([2, 3]))
    assert bag.positions.tolist() == [[0, 1], [10, 11]]
    assert bag.slides.tolist() == [0, 1] and bag.unit == "px"


def test_only_the_sampled_rows_are_read(write, monkeypatch):
    width = 1024  # rows of 2 KiB
    store = Hdf5Cases(write([4000], width=width), "uni")
    read = []
    original = rows_module.read_bytes

    def count(descriptor, target, offset):
        read.append(len(target))
        original(descriptor, target, offset)

    monkeypatch.setattr(rows_module, "read_bytes", count)
    rows = np.arange(0, 4000, 100)
    store.read(store.cases[0], rows)
    assert sum(read) == len(rows) * width * 2


@pytest.mark.parametrize("dtype", ["f2", "f4", "V2"])
def test_rows_in_any_density_from_contiguous_data(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(rows_module, "_RUN_BYTES", 64 * 100)  # runs are cut into pieces
    values = np.random.default_rng(0).standard_normal((4000, 32)).astype("f4")
    values = values.astype("f2").view("V2") if dtype == "V2" else values.astype(dtype)
    store = custom(tmp_path / "a.h5", values)
    bits = {"f2": torch.int16, "f4": torch.int32, "V2": torch.int16}[dtype]
    whole = torch.from_numpy(values.view(f"i{values.dtype.itemsize}"))
    for count in (1, 40, 1000, 3900, 4000):
        rows = np.sort(np.random.default_rng(count).choice(4000, count, replace=False))
        found = store.read(store.cases[0], rows).features
        assert torch.equal(found.view(bits), whole[rows])


def test_most_rows_are_read_without_holding_the_bag_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_RUN_BYTES", 2**16)
    values = np.ones((4000, 256), "f2")  # 2 MB
    store = custom(tmp_path / "a.h5", values)
    rows = np.delete(np.arange(4000), np.arange(0, 4000, 10))
    store.read(store.cases[0], rows[:9])  # what is made once is not counted
    tracemalloc.start()
    try:
        found = store.read(store.cases[0], rows).features
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < found.nbytes + 2**19


@pytest.mark.parametrize(
    ("keys", "slides"),
    [
        ([b"a/0", b"a/1", b"b/0", b"a/2"], [0, 0, 1, 0]),
        ([b"x/y/0", b"x/z/0"], [0, 1]),
        ([b"a/10", b"ab/1"], [0, 1]),
        ([b"(4, 0, 0, 0)", b"(4, 0, 1, 11)", b"(4, 12, 0, 2)"], [0, 0, 1]),
        ([b"(4, 0)", b"(4, 1)"], [0, 0]),
        ([b"a/0", b"b"], [0, 0]),
        ([b"", b""], [0, 0]),
    ],
)
def test_slides_of_tile_keys(keys, slides):
    assert slides_of_keys(np.array(keys, "S")).tolist() == slides
    assert slides_of_keys(np.array([k.decode() for k in keys], object)).tolist() == slides


def test_the_index_is_rebuilt_and_shared_names_are_told_apart(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for patient, specimen in (("p", "A"), ("q", "A"), ("q", "B")):
            file[f"patients/{patient}/{specimen}/uni/features"] = np.ones((2, 3), "f4")
        file["patients/p/age"] = 61
    names = [(c.patient, c.specimen) for c in Hdf5Cases(path, "uni").cases]
    assert names == [("p", "p/A"), ("q", "q/A"), ("q", "B")]


def test_twenty_thousand_specimens_index_quickly(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["patients/p0/s0/uni/features"] = np.ones((2, 3), "f4")
        paths = [f"/patients/p{i}/s{i}" for i in range(20_000)]
        file["case-index/case_paths"] = paths
        file["case-index/case_ids"] = [f"s{i}" for i in range(20_000)]
    start = time.process_time()
    store = Hdf5Cases(path, "uni")
    assert time.process_time() - start < 2
    assert store.has_features(store.cases[0]) and not store.has_features(store.cases[1])
    with pytest.raises(DataError, match=r"'s1' is in /case-index, but /patients/p1/s1 does not"):
        store.length(store.cases[1])


def test_wrong_attributes_list_the_right_ones(write):
    path = write([2])
    with pytest.raises(DataError, match=r"no feature attribute 'hipt'.*can be: uni"):
        Hdf5Cases(path, "hipt")
    for name in ("diagnosis", "uni", "uni/features"):  # not there, a group, numbers
        with pytest.raises(DataError, match=rf"no text attribute '{name}'.*can be: report$"):
            Hdf5Cases(path, "uni", name)


def test_missing_and_damaged_files(write, tmp_path):
    with pytest.raises(DataError, match=r"no HDF5 file .*nothing\.h5; check --hdf5_filename"):
        Hdf5Cases(tmp_path / "nothing.h5", "uni")
    path = write([100])
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"cohort\.h5 cannot be opened as HDF5 .* copy or write"):
        Hdf5Cases(path, "uni")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(DataError, match="cannot be opened as HDF5"):
        Hdf5Cases(tmp_path / "text.h5", "uni")


def test_a_damaged_specimen_names_file_and_specimen(tmp_path):
    path = tmp_path / "a.h5"
    store = custom(path, np.ones((100, 50), "f4"), chunks=(100, 50), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["patients/p/a/uni/features"].id.get_chunk_info(0)
    store.close()
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    with pytest.raises(DataError, match=r"a\.h5: specimen 'a' cannot be read"):
        store.read(store.cases[0], None)


def test_wrong_contents(tmp_path):
    path = tmp_path / "a.h5"
    store = custom(path, np.ones((2, 3), "i8"))
    with pytest.raises(DataError, match="has type int64; write float16"):
        store.read(store.cases[0], None)
    store = custom(tmp_path / "b.h5", np.ones(3, "f4"))
    with pytest.raises(DataError, match=r"features is one vector of 3 numbers, a slide embedding"):
        store.length(store.cases[0])
    with CaseWriter(tmp_path / "c.h5", "uni", attributes={"unit": "um"}) as writer:
        writer.add("p", "a", np.ones((2, 3), "f2"), None, np.array([[0, 0], [1, np.nan]]))
    store = Hdf5Cases(tmp_path / "c.h5", "uni")
    with pytest.raises(DataError, match="1 of 2 rows of .*positions are not finite"):
        store.read(store.cases[0], None)
    store.close()
    with h5py.File(tmp_path / "c.h5", "a") as file:
        file["patients/p/a/uni/tile_keys"] = [b"a/0"]
        del file["case-index/case_ids"]
        file["case-index/case_ids"] = [b"a", b"b"]
    with pytest.raises(DataError, match="2 case_ids and 1 case_paths"):
        Hdf5Cases(tmp_path / "c.h5", "uni")


def test_positions_without_unit_warn(tmp_path, caplog):
    path = tmp_path / "a.h5"
    custom(path, np.ones((2, 3), "f2"))
    with h5py.File(path, "a") as file:
        file["patients/p/a/uni/positions"] = np.zeros((2, 2))
    with caplog.at_level(logging.WARNING, "slidevlm.data"):
        store = Hdf5Cases(path, "uni")
    assert "level-0 pixels are assumed" in caplog.text
    assert store.read(store.cases[0], None).unit == "px"
    store.close()
    with h5py.File(path, "a") as file:
        file["patients/p/a/uni/positions"].attrs["unit"] = "mm"
    with pytest.raises(DataError, match="is 'mm'; make it 'um'"):
        store.read(store.cases[0], None)


def test_nothing_outside_the_file_is_read(write, tmp_path):
    outside = write([3], name="outside.h5")
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["patients/p/in/uni/features"] = np.ones((2, 3), "f2")
        file["patients/p/soft"] = h5py.SoftLink("/patients/p/in")
        file["patients/p/loop"] = h5py.SoftLink("/patients/p/loop")
        file["patients/p/out"] = h5py.ExternalLink(str(outside), "/patients/p0/s0")
        file["patients/p/soft_out"] = h5py.SoftLink("/patients/p/out")
        layout = h5py.VirtualLayout((3, 6), "f2")
        layout[:] = h5py.VirtualSource(str(outside), "/patients/p0/s0/uni/features", (3, 6))
        file.create_virtual_dataset("patients/p/virtual/uni/features", layout)
        file.create_dataset(
            "patients/p/stored/uni/features", (1, 2), "f2", external=[(str(outside), 0, 4)]
        )
        names = ["in", "soft", "loop", "out", "soft_out", "virtual", "stored"]
        file["case-index/case_ids"] = names
        file["case-index/case_paths"] = [f"/patients/p/{name}" for name in names]
    store = Hdf5Cases(path, "uni")
    cases = {case.specimen: case for case in store.cases}
    assert store.length(cases["soft"]) == 2
    for name in ("loop", "out", "soft_out"):
        with pytest.raises(DataError, match="link that leaves the file or never ends"):
            store.read(cases[name], None)
    for name in ("virtual", "stored"):
        with pytest.raises(DataError, match="keeps its data in another file"):
            store.read(cases[name], None)


def test_the_writer_leaves_nothing_after_an_error(tmp_path):
    path = tmp_path / "a.h5"
    path.write_text("old")
    with pytest.raises(KeyError), CaseWriter(path, "uni") as writer:
        writer.add("p", "a", np.ones((2, 3), "f2"), None)
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.h5"]
    with pytest.raises(DataError, match="cannot write"), CaseWriter(tmp_path / "no/a.h5", "uni"):
        pass


def test_the_writer_refuses_what_cannot_be_read(tmp_path):
    ones = np.ones((2, 3), "f2")
    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        writer.add("p", "a", ones, "text")
        with pytest.raises(DataError, match="added twice"):
            writer.add("p", "a", ones, "text")
        with pytest.raises(DataError, match="'a/b' cannot name an HDF5 group"):
            writer.add("p", "a/b", ones, "text")
        with pytest.raises(DataError, match="without a unit"):
            writer.add("p", "b", ones, "text", np.zeros((2, 2)))
        with pytest.raises(DataError, match="1 tile keys for 2 rows"):
            writer.add("p", "b", ones, "text", None, ["a/0"])


def _first_row(store: Hdf5Cases) -> list[float]:
    features: list[float] = store.read(store.cases[0], np.array([1])).features[0].tolist()
    return features


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_works_in_other_processes(write, method):
    store = Hdf5Cases(write([4]), "uni", "report")
    expected = _first_row(store)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_first_row, (store,)) == expected
    assert _first_row(pickle.loads(pickle.dumps(store))) == expected


def _in_child(store: Hdf5Cases, queue: multiprocessing.SimpleQueue) -> None:
    queue.put((store._file.open() is not None and store._file._handle.pid, _first_row(store)))


def test_a_fork_does_not_use_the_handle_it_inherits(write):
    store = Hdf5Cases(write([4]), "uni", "report")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(store, queue))
    child.start()
    pid, row = queue.get()
    child.join()
    assert pid == child.pid != os.getpid() and row == _first_row(store)


def test_real_data(shared):
    store = Hdf5Cases(shared / "data/tcga/tcga.h5", "hipt_4096", "diagnosis")
    assert len(store.cases) == 846
    with h5py.File(store.path) as file:
        for case in store.cases[::100]:
            features = file[case.location]["hipt_4096/features"][()]
            rows = np.arange(0, len(features), 3)
            bag = store.read(case, rows)
            assert np.array_equal(bag.features.numpy(), features[rows])
            assert bag.positions is None and len(bag.slides) == len(rows)
    slides = sum(int(store.read(case, None).slides.max()) + 1 for case in store.cases)
    assert slides == 920
    with pytest.raises(DataError, match=r"'uni'.*can be: hipt_4096"):
        Hdf5Cases(store.path, "uni")
    with pytest.raises(DataError, match=r"'text'.*can be: diagnosis, report"):
        Hdf5Cases(store.path, "hipt_4096", "text")
