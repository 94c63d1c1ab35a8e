"""Conversion: content kept, kills survived, what cannot be kept refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from slidevlm.data.convert import Filled, convert
from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.data.formats.hdf5_target import CaseTarget, Layout
from slidevlm.data.scan import scan
from slidevlm.errors import ConfigError, DataError

FLOAT16 = Layout("uni", "float16", None)


def run(source: Path, target: Path, layout: Layout = FLOAT16, workers: int = 0, **more: object):
    store = Hdf5Cases(source, "uni", "report")
    return convert(store, target, layout, store.texts, workers=workers, **more)


def write_large(path: Path, specimens: int, rows: int, width: int) -> Path:
    with CaseWriter(path, "uni", attributes={"unit": "um"}) as writer:
        for number in range(specimens):
            values = np.random.default_rng(number).standard_normal((rows, width), dtype=np.float32)
            keys = [f"s{row % 2}/{row}" for row in range(rows)]
            writer.add(
                f"p{number}", f"s{number}", values, f"report {number}", np.ones((rows, 2)), keys
            )
    return path


def same(a: Path, b: Path) -> None:
    """All of two converted files, by h5py alone."""

    def content(file: h5py.File) -> dict[str, object]:
        found: dict[str, object] = {}

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            found[name] = dict(item.attrs)
            if isinstance(item, h5py.Dataset):
                values = np.asarray(item[()]).tolist()
                found[name] = (dict(item.attrs), item.dtype, item.shape, values)

        file.visititems(visit)
        return found

    with h5py.File(a) as first, h5py.File(b) as second:
        assert dict(first.attrs) == dict(second.attrs)
        assert content(first) == content(second)


@pytest.mark.parametrize("chunk_rows", [None, 7, 1000])
def test_content_is_kept(write, tmp_path, chunk_rows):
    source = write([5, 300, 1, 0, 20])
    done = run(source, tmp_path / "out.h5", Layout("uni", "float16", chunk_rows))
    assert (done.specimens, done.tiles, done.resumed) == (5, 326, 0)
    with h5py.File(source) as before, h5py.File(tmp_path / "out.h5") as after:
        paths = before["case-index/case_paths"].asstr()[()].tolist()
        assert after["case-index/case_paths"].asstr()[()].tolist() == paths
        assert after["case-index/case_ids"].asstr()[()].tolist() == [f"s{i}" for i in range(5)]
        for path in paths:
            assert before[f"{path}/report"][()] == after[f"{path}/report"][()]
            features = after[f"{path}/uni/features"]
            assert features.shape == before[f"{path}/uni/features"].shape
            if not len(features):
                continue
            for name in ("features", "positions", "tile_keys"):
                old, new = before[f"{path}/uni/{name}"], after[f"{path}/uni/{name}"]
                assert old.dtype == new.dtype and np.array_equal(old[()], new[()])
            rows = None if features.chunks is None else features.chunks[0]
            assert rows == (None if chunk_rows is None else min(chunk_rows, len(features)))
        assert after["patients/p0/s0/uni/positions"].attrs["unit"] == "um"
        assert dict(after["patients/p1/s1/uni"].attrs)["source"] == "cohort.h5"
    assert sorted(os.listdir(tmp_path)) == ["cohort.h5", "out.h5"]


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "f4"), ("bfloat16", "u2")])
def test_types(tmp_path, dtype, stored):
    values = np.array([[1e5, -3.140625], [70000.0, 1e-20]], np.float32)
    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        writer.add("p", "a", values, "text")
    run(tmp_path / "a.h5", tmp_path / "b.h5", Layout("uni", dtype, None))
    with h5py.File(tmp_path / "b.h5") as file:
        assert file["patients/p/a/uni/features"].dtype == stored
    store = Hdf5Cases(tmp_path / "b.h5", "uni")
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    assert torch.equal(store.read(store.cases[0], None).features, expected)


def test_overflow_names_the_specimen_and_keeps_the_rest(write, tmp_path):
    source = write([4, 4, 4])
    with h5py.File(source, "a") as file:
        for name, value in (("s0", 7e4), ("s2", np.inf)):
            group = file[f"patients/p{name[1]}/{name}/uni"]
            values = group["features"][()].astype(np.float32)
            values[1, 3] = value
            del group["features"]
            group["features"] = values
    with pytest.raises(DataError, match="specimens that cannot be converted: 1") as error:
        run(source, tmp_path / "out.h5")
    assert "specimen 's0': 1 tiles have features too large for float16, up to 70000" in str(
        error.value
    )
    assert "--dtype bfloat16 or float32" in str(error.value)
    assert "the same command goes on with what is left" in str(error.value)
    assert not (tmp_path / "out.h5").exists()
    # An infinite feature is not made by the conversion: it is kept, and told.
    done = run(source, tmp_path / "wide.h5", Layout("uni", "float32", None))
    assert done.not_finite == ("s2",)


def test_what_is_done_is_not_done_again(write, tmp_path, monkeypatch):
    source, read = write([3] * 12), []
    target = tmp_path / "out.h5"
    original = Hdf5Cases.read

    def counted(self, case, rows):
        if rows is None:  # the first look reads one row
            read.append(case.specimen)
            if len(read) == 8:
                raise KeyboardInterrupt
        return original(self, case, rows)

    monkeypatch.setattr(Hdf5Cases, "read", counted)
    with pytest.raises(KeyboardInterrupt):
        run(source, target)
    assert not target.exists()
    first, read[:] = list(read), ["more"] * 8
    done = run(source, target)
    assert done.resumed == 7 and read[8:] == [first[7], *(f"s{i}" for i in range(8, 12))]
    monkeypatch.undo()
    run(source, tmp_path / "at_once.h5")
    same(target, tmp_path / "at_once.h5")


@pytest.mark.slow
def test_a_kill_in_the_middle_and_going_on(tmp_path):
    source, target = write_large(tmp_path / "a.h5", 24, 3000, 256), tmp_path / "out.h5"
    # Each specimen takes a while, so that the kill comes in the middle on any machine.
    slow = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from slidevlm.data import convert as c\n"
        "from slidevlm.data.formats.hdf5_cases import Hdf5Cases\n"
        "from slidevlm.data.formats.hdf5_target import CaseTarget, Layout\n"
        "c._SYNC_SECONDS, fill = 0.0, c._fill_case\n"
        "def slowly(*args):\n    time.sleep(0.05)\n    return fill(*args)\n"
        "c._fill_case = slowly\n"
        "store = Hdf5Cases(Path(sys.argv[1]), 'uni', 'report')\n"
        "layout = Layout('uni', 'float16', None)\n"
        "c.convert(store, Path(sys.argv[2]), layout, store.texts, workers=0)\n"
    )
    journal = tmp_path / ".out.h5.partial.journal"
    seen = 0
    for wanted in (4, 12):
        process = subprocess.Popen([sys.executable, "-c", slow, str(source), str(target)])
        deadline = time.monotonic() + 120
        while seen <= wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            seen = len(journal.read_text().splitlines()) if journal.exists() else 0
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not target.exists()
    with open(journal, "a") as file:
        file.write('{"specimen": "s')  # what a kill may leave of a line
    done = run(source, target, workers=2)
    assert 12 <= done.resumed < 24 and done.specimens == 24
    run(source, tmp_path / "at_once.h5")
    same(target, tmp_path / "at_once.h5")
    assert sorted(os.listdir(tmp_path)) == ["a.h5", "at_once.h5", "out.h5"]


def test_an_unfinished_conversion_is_not_mixed_with_another(write, tmp_path, monkeypatch):
    source, target = write([3, 3, 3]), tmp_path / "out.h5"

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("slidevlm.data.convert._fill_case", stop)
    with pytest.raises(KeyboardInterrupt):
        run(source, target)
    monkeypatch.undo()
    for layout, settings in ((Layout("uni", "float32", None), ""), (FLOAT16, "other texts")):
        with pytest.raises(ConfigError, match="unfinished conversion of other data or with other"):
            run(source, target, layout, settings=settings)
    os.utime(source, (1, 1))
    with pytest.raises(ConfigError, match="unfinished conversion"):
        run(source, target)
    (tmp_path / ".out.h5.partial").unlink()
    assert run(source, target).resumed == 0


def test_only_one_conversion_to_a_target(write, tmp_path, monkeypatch):
    source, target = write([3]), tmp_path / "out.h5"

    def again(*args):
        with pytest.raises(ConfigError, match="another conversion to the same target is running"):
            run(source, target)
        return Filled("s0", 3)

    monkeypatch.setattr("slidevlm.data.convert._fill_case", again)
    run(source, target)


def test_refusals(write, tmp_path):
    source = write([3])
    with pytest.raises(ConfigError, match=r"cohort\.h5 exists; choose another name"):
        run(source, source)
    with pytest.raises(ConfigError, match="does not exist; make it first"):
        run(source, tmp_path / "no" / "out.h5")
    with pytest.raises(DataError, match="/patients/p0/s0: 'report' names both its features and a"):
        run(source, tmp_path / "out.h5", replace(FLOAT16, feature_attribute="report"))
    assert not list(tmp_path.glob("*out.h5*"))


def test_specimens_that_cannot_be_one_cohort(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, width in (("a", 4), ("b", 4), ("c", 6)):
            file[f"patients/p/{name}/uni/features"] = np.ones((2, width), "f2")
            file[f"patients/p/{name}/report"] = "text"
    with pytest.raises(DataError, match=r"differ in feature width.*4: 2 \(a, b\); 6: 1 \(c\)"):
        run(tmp_path / "a.h5", tmp_path / "out.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["patients/p/c"]
        file["patients/p/b/uni/positions"] = np.ones((2, 2))
    with pytest.raises(DataError, match="differ in positions.*with: 1|without: 1"):
        run(tmp_path / "a.h5", tmp_path / "out.h5")
    assert os.listdir(tmp_path) == ["a.h5"]


def test_specimens_without_features_are_told(write, tmp_path):
    source = write([3, 3])
    with h5py.File(source, "a") as file:
        del file["patients/p1/s1/uni"]
    done = run(source, tmp_path / "out.h5")
    assert (done.specimens, done.without_features) == (1, ("s1",))


def test_names_shared_by_patients(tmp_path):
    with CaseWriter(tmp_path / "a.h5", "uni") as writer:
        for patient in ("p", "q"):
            writer.add(patient, "A", np.full((2, 3), ord(patient), "f2"), f"of {patient}")
    run(tmp_path / "a.h5", tmp_path / "b.h5")
    store = Hdf5Cases(tmp_path / "b.h5", "uni", "report")
    assert [case.specimen for case in store.cases] == ["p/A", "q/A"]
    for case in store.cases:
        assert store.read(case, None).features[0, 0] == ord(case.patient)
        assert store.text(case) == f"of {case.patient}"


@pytest.mark.parametrize(
    ("dataset", "part"),
    [("uni/features", "tiles"), ("uni/positions", "tiles"), ("uni/tile_keys", "tiles"),
     ("report", "texts")],
)  # fmt: skip
def test_checksums_find_a_single_changed_value(write, tmp_path, dataset, part):
    target = tmp_path / "out.h5"
    run(write([40, 40]), target)
    store = Hdf5Cases(target, "uni", "report")
    for case in store.cases:
        found = scan(store, case)
        assert found.verified and found.damaged == () and found.problem is None
    store.close()
    with h5py.File(target, "a") as file:
        changed = file[f"patients/p1/s1/{dataset}"]
        if changed.shape == ():
            changed[()] = "Report of specimen 2."
        else:
            changed[7] = changed[8]
    assert scan(store, store.cases[0]).damaged == ()
    assert scan(store, store.cases[1]).damaged == (part,)


def test_missing_room_is_told_before(write, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Free(10))
    with pytest.raises(DataError, match=r"0\.0 GB free, the features need"):
        run(write([300]), tmp_path / "out.h5")


class Free:
    """What shutil.disk_usage tells."""

    def __init__(self, free: int) -> None:
        self.free = free


def test_a_full_disk_stops_at_once_and_is_gone_on_from(write, tmp_path, monkeypatch):
    source, target = write([3] * 6), tmp_path / "out.h5"
    original, written = CaseTarget.write_checksum, []

    class Full:
        def seek(self, offset):
            raise OSError(28, "No space left on device")

    def until_full(self, number, checksum):
        written.append(number)
        if len(written) == 4:
            self._handle = replace(self._handle, raw=Full())
        original(self, number, checksum)

    monkeypatch.setattr(CaseTarget, "write_checksum", until_full)
    monkeypatch.setattr(CaseTarget, "sync", lambda self: None)
    monkeypatch.setattr(CaseTarget, "close", lambda self: None)
    with pytest.raises(DataError, match=r"cannot be written: No space left.*goes on"):
        run(source, target)
    assert written == [0, 1, 2, 3] and not target.exists()
    monkeypatch.undo()
    assert run(source, target).resumed == 3
    run(source, tmp_path / "at_once.h5")
    same(target, tmp_path / "at_once.h5")


def test_what_a_kill_before_the_first_specimen_leaves(write, tmp_path):
    source = write([3, 4])
    for leftover in (".out.h5.partial", ".out.h5.partial.new", ".out.h5.partial.journal.lock"):
        (tmp_path / leftover).write_bytes(b"half a file")
    assert run(source, tmp_path / "out.h5").specimens == 2
    run(source, tmp_path / "at_once.h5")
    same(tmp_path / "out.h5", tmp_path / "at_once.h5")
    assert sorted(os.listdir(tmp_path)) == ["at_once.h5", "cohort.h5", "out.h5"]


def test_journal_lines_are_json(write, tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(
        "slidevlm.data.convert._Journal.remove",
        lambda self: lines.extend(self.path.read_text().splitlines() if self.path.exists() else []),
    )
    run(write([3, 4]), tmp_path / "out.h5")
    assert [json.loads(line).get("tiles") for line in lines] == [None, 3, 4]


def test_real_data(shared, tmp_path):
    source = Hdf5Cases(shared / "data/tcga/tcga.h5", "hipt_4096")
    source.cases = source.cases[::20]
    layout = Layout("hipt_4096", "float16", None)
    convert(source, tmp_path / "out.h5", layout, source.texts, workers=2)
    store = Hdf5Cases(tmp_path / "out.h5", "hipt_4096", "diagnosis")
    with h5py.File(source.path) as file:
        for before, after in zip(source.cases, store.cases, strict=True):
            group = file[before.location]
            assert before.specimen == after.specimen
            bag = store.read(after, None)
            assert np.array_equal(bag.features.numpy(), group["hipt_4096/features"][()])
            assert torch.equal(bag.slides, source.read(before, None).slides)
            for name in ("report", "diagnosis"):
                assert store.texts(after)[name] == group[name].asstr()[()]
