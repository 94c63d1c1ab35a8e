from __future__ import annotations

import logging
import multiprocessing
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from slidevlm.data.cases import open_store
from slidevlm.data.cohort import Likeness, hold_together
from slidevlm.data.formats import slide_folder
from slidevlm.data.formats.slide_folder import SlideFolder
from slidevlm.data.formats.slides import open_bags
from slidevlm.data.slide_table import SlideRow
from slidevlm.errors import ConfigError, DataError


def numbered(number: int, count: int, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Features whose first column is the row and whose second is `number`; positions."""
    features = np.zeros((count, width), np.float32)
    features[:, 0], features[:, 1] = np.arange(count), number
    return features, np.stack([np.arange(count) * 10 + 1000 * number, np.full(count, number)], 1)


def opened(**given: object) -> object:
    names = ("hdf5_filename", "hdf5_feature_attribute", "hdf5_text_attribute", "root_dir")
    return open_store(**dict.fromkeys(names) | given)


@pytest.fixture
def root(tmp_path, makers):
    """a: 3 tiles in STAMP's form; b: 0; c: 5, below in a folder; all in micrometres."""
    folder = tmp_path / "cohort"
    (folder / "more").mkdir(parents=True)
    makers["stamp"](folder / "a", *numbered(1, 3))
    makers["stamp"](folder / "b", *numbered(2, 0))
    makers["safetensors"](folder / "more/c", *numbered(3, 5))
    with h5py.File(folder / "a.h5", "a") as file:
        file.attrs["extractor"] = "uni"
    (folder / "notes.txt").write_text("no features")
    (folder / ".hidden.h5").write_text("no features")
    (folder / "patches").mkdir()
    (folder / "patches/a.h5").write_text("no features")
    return folder


def test_each_slide_is_a_specimen(root):
    store = opened(root_dir=root)
    assert isinstance(store, SlideFolder)
    assert [(c.specimen, c.patient, c.location) for c in store.cases] == [
        ("a", "a", "a.h5"), ("b", "b", "b.h5"), ("c", "c", "more/c.safetensors"),
    ]  # fmt: skip
    assert [store.length(case) for case in store.cases] == [3, 0, 5]
    assert store.text(store.cases[0]) is None
    bag = store.read(store.cases[2], np.array([1, 4]))
    assert bag.features.shape == (2, 4)
    assert bag.features[:, 0].tolist() == [1, 4] and bag.slides.tolist() == [0, 0]
    assert bag.positions[:, 0].tolist() == [3010, 3040] and bag.unit == "um"
    assert bag.relative_positions()[:, 0].tolist() == [-10, 20]
    facts = store.facts(store.cases[2])
    assert (facts.format, facts.encoder, facts.unit) == ("safetensors", "uni", "um")
    assert store.read(store.cases[1], None).features.shape == (0, 4)


def test_tcga_names_tell_the_patient(tmp_path, makers):
    for name in ("TCGA-02-0001-01Z-00-DX1.83FCE43E", "TCGA-02-0001-01Z-00-DX2.4A", "TCGA-02-00012"):
        makers["npy"](tmp_path / name, *numbered(0, 2))
    cases = SlideFolder(tmp_path).cases
    assert [case.patient for case in cases] == ["TCGA-02-0001", "TCGA-02-0001", "TCGA-02-00012"]


def test_a_table_joins_the_slides_of_a_specimen(root, tmp_path, caplog):
    (tmp_path / "t.csv").write_text(
        "PATIENT,FILENAME,x\np1,c.svs,1\np1,b.h5,2\np1,a.h5,3\np2,gone.h5,4\n"
    )
    with caplog.at_level(logging.WARNING, "slidevlm.data"):
        store = opened(root_dir=root, slide_table=tmp_path / "t.csv")
    assert "1 of 4 slides of the slide table have no file" in caplog.text
    case, absent = store.cases
    assert (case.specimen, case.patient) == ("p1", "p1")
    assert case.location == "more/c.safetensors, b.h5, a.h5"
    assert store.has_features(case) and not store.has_features(absent)
    with pytest.raises(DataError, match="specimen 'p2' has no feature file"):
        store.length(absent)
    assert store.length(case) == 8
    whole = store.read(case, None)
    assert whole.features[:, 1].tolist() == [3] * 5 + [1] * 3
    assert whole.slides.tolist() == [0] * 5 + [2] * 3
    assert whole.positions[:, 0].tolist() == [3000, 3010, 3020, 3030, 3040, 1000, 1010, 1020]
    assert whole.relative_positions()[:, 0].tolist() == [-20, -10, 0, 10, 20, -10, 0, 10]
    for rows in (np.array([0, 4, 5, 7]), np.array([6]), np.array([2])):
        part = store.read(case, rows)
        for field in ("positions", "slides", "centres"):
            assert torch.equal(getattr(part, field), getattr(whole, field)[rows]), field
        assert torch.equal(part.features.float(), whole.features.float()[rows])


def test_slides_within_a_file_are_counted_on(tmp_path):
    for name, slides in (("a", (4, 9)), ("b", (2,))):
        tiles = {(1, s, 0, s): {"feature": torch.ones(1, 3) * s} for s in slides}
        torch.save({0: tiles}, tmp_path / f"{name}.pth")
    table = [SlideRow("s", "p", "a"), SlideRow("s", "p", "b")]
    store = SlideFolder(tmp_path, table)
    assert store.read(store.cases[0], None).slides.tolist() == [0, 1, 2]
    assert store.read(store.cases[0], np.array([2])).slides.tolist() == [2]


@pytest.mark.parametrize(
    "written", ["c", "c.svs", "c.h5", "more/c.safetensors", "./more/c.safetensors", "D:\\x\\c.svs"]
)
def test_how_a_table_may_name_a_slide(root, written):
    store = SlideFolder(root, [SlideRow("s", "p", written)])
    assert store.cases[0].location == "more/c.safetensors"


def test_two_files_of_one_name(tmp_path, makers):
    for folder in ("uni", "conch"):
        (tmp_path / folder).mkdir()
        makers["npy"](tmp_path / folder / "a", *numbered(len(folder), 2))
    with pytest.raises(DataError, match=r"slide 'a' is there as conch/a\.npy and as uni/a\.npy"):
        SlideFolder(tmp_path)
    store = SlideFolder(tmp_path, [SlideRow("s", "p", "uni/a.npy")])
    assert store.read(store.cases[0], None).features[:, 1].tolist() == [3, 3]
    with pytest.raises(DataError, match="slide 'a' is there as"):
        SlideFolder(tmp_path, [SlideRow("s", "p", "a")])
    with pytest.raises(DataError, match=r"are the same file uni/a\.npy; remove one"):
        SlideFolder(tmp_path, [SlideRow("s", "p", "uni/a"), SlideRow("t", "p", "uni/a.npy")])


def test_clam_writes_a_slide_twice(tmp_path, makers):
    for folder, kind in (("h5_files", "clam"), ("pt_files", "tensor")):
        (tmp_path / folder).mkdir()
        makers[kind](tmp_path / folder / "a", *numbered(1, 2))
    store = SlideFolder(tmp_path)
    assert [case.location for case in store.cases] == ["h5_files/a.h5"]
    assert store.read(store.cases[0], None).unit == "px"


def test_no_slide_of_the_table_is_there(root):
    with pytest.raises(DataError, match=r"none of the 1 slides .* names x, the folder has a, b, c"):
        SlideFolder(root, [SlideRow("s", "p", "x")])


# -- one file ------------------------------------------------------------------------------


def test_one_file_of_several_slides(tmp_path):
    path = tmp_path / "all.h5"
    with h5py.File(path, "w") as file:
        for number, name in enumerate(["TCGA-02-0001-A", "x"]):
            file[name] = numbered(number, 3 + number)[0]
    store = opened(hdf5_filename=path)
    assert [(c.specimen, c.patient) for c in store.cases] == [
        ("TCGA-02-0001-A", "TCGA-02-0001"), ("x", "x"),
    ]  # fmt: skip
    assert store.read(store.cases[1], np.array([3])).features.tolist() == [[3, 1, 0, 0]]
    (tmp_path / "t.tsv").write_text("case_id\tslide_id\ns\tx\ns\tTCGA-02-0001-A\n")
    joined = opened(hdf5_filename=path, slide_table=tmp_path / "t.tsv")
    assert joined.read(joined.cases[0], None).features[:, 1].tolist() == [1] * 4 + [0] * 3
    folder = SlideFolder(tmp_path)
    assert [c.location for c in folder.cases] == ["all.h5::TCGA-02-0001-A", "all.h5::x"]
    assert folder.length(folder.cases[1]) == 4


def test_arguments_that_have_no_effect(root, tmp_path, write):
    cases, table = write([2]), tmp_path / "t.csv"
    table.write_text("case_id,slide_id\ns,a\n")
    with pytest.raises(ConfigError, match="--slide-table.*in the case layout"):
        opened(hdf5_filename=cases, hdf5_feature_attribute="uni", slide_table=table)
    with pytest.raises(ConfigError, match=r"needs --hdf5_feature_attribute.*: uni"):
        opened(hdf5_filename=cases)
    with pytest.raises(
        ConfigError, match=r"a\.h5 is not in the case layout.*it has: coords, feats"
    ):
        opened(hdf5_filename=root / "a.h5", hdf5_feature_attribute="uni")
    (tmp_path / "m/data_0").mkdir(parents=True)
    (tmp_path / "m/data_0/feature_information.txt").write_text("")
    with pytest.raises(ConfigError, match="--slide-table.*names its specimens itself"):
        opened(root_dir=tmp_path / "m", slide_table=table)


def test_a_file_of_several_bags_among_others_is_refused_when_used(tmp_path, makers, monkeypatch):
    monkeypatch.setattr(slide_folder, "_SAMPLE", 1)
    makers["npy"](tmp_path / "a", *numbered(1, 2))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["s"], file["t"] = numbered(1, 2)[0], numbered(1, 2)[0]
    store = SlideFolder(tmp_path)
    with pytest.raises(DataError, match=r"specimen 'b': .*holds 2 bags \(s, t\), not one slide"):
        store.length(store.cases[1])


# -- what a cohort shares ------------------------------------------------------------------


def changed(path: Path, kind: str) -> None:
    with h5py.File(path, "a") as file:
        if kind == "unit":
            file.attrs["unit"] = "px"
        elif kind == "encoder":
            file.attrs["extractor"] = "conch"
        else:
            del file["feats"]
            file["feats"] = np.ones((3, 7), "f2")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("width", r"one feature width: of 4 .*, 3 have 4 \(such as s0, s1, s3\); 1 have 7 .*s2"),
        ("unit", r"one unit of positions: .* 3 have um .* 1 have px \(such as s2\)"),
        ("encoder", r"one tile encoder: .* 3 have uni2 .* 1 have conch \(such as s2\)"),
    ],
)
def test_mixed_cohorts(tmp_path, makers, kind, message):
    for number in range(4):
        makers["stamp"](tmp_path / f"s{number}", *numbered(number, 3))
    changed(tmp_path / "s2.h5", kind)
    store = SlideFolder(tmp_path)
    with pytest.raises(DataError, match=message):
        hold_together(store, store.cases)
    others = [case for case in store.cases if case.specimen != "s2"]
    hold_together(store, others)
    assert store.expected == Likeness(4, "um", "uni2")
    again = pickle.loads(pickle.dumps(store))
    with pytest.raises(DataError, match=r"specimen 's2': .*s2\.h5 differs from the cohort"):
        again.read(store.cases[2], None)
    assert again.length(others[0]) == 3
    store = SlideFolder(tmp_path, [SlideRow("s", "p", f"s{n}") for n in range(4)])
    with pytest.raises(DataError, match=r"specimen 's': .*s2\.h5 differs from .*s0\.h5"):
        store.read(store.cases[0], None)


def test_a_sample_leaves_damaged_and_empty_slides_to_who_reads_them(tmp_path, makers):
    makers["stamp"](tmp_path / "a", *numbered(1, 0, width=9))
    makers["stamp"](tmp_path / "c", *numbered(1, 2))
    (tmp_path / "b.h5").write_text("junk")
    store = SlideFolder(tmp_path)
    hold_together(store, store.cases)
    assert store.expected == Likeness(4, "um", "uni2")
    with pytest.raises(DataError, match=r"specimen 'b': .*b\.h5"):
        store.length(store.cases[1])


# -- processes and size --------------------------------------------------------------------


def _first_row(store: SlideFolder) -> list[float]:
    features: list[float] = store.read(store.cases[0], np.array([1])).features[0].tolist()
    return features


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_works_in_other_processes(tmp_path, makers, method):
    expected, stores = [], []
    for number, kind in enumerate(
        ["stamp", "gzipped", "tensor", "npz", "safetensors", "tiatoolbox"], 1
    ):
        (tmp_path / kind).mkdir()
        features, coords = numbered(number, 5, width=8)
        makers[kind](tmp_path / kind / "a", features, coords)
        stores.append(SlideFolder(tmp_path / kind))
        expected.append(features[1].tolist())
    assert [_first_row(store) for store in stores] == expected
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_first_row, stores) == expected
    assert [_first_row(store) for store in stores] == expected


def test_few_files_stay_open(tmp_path, makers, monkeypatch):
    for number in range(20):
        makers["stamp"](tmp_path / f"s{number:02}", *numbered(number, 2))
    store = SlideFolder(tmp_path)
    opens = []
    monkeypatch.setattr(
        slide_folder, "open_bags", lambda path: (opens.append(path.name), open_bags(path))[1]
    )
    for case in store.cases:
        store.length(case)
        store.read(case, None)
    assert len(opens) == 20, "one opening serves the length and the rows"
    assert len(store._files) == slide_folder._OPEN_FILES
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    store.close()
    assert len(list(Path("/proc/self/fd").iterdir())) < descriptors
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > descriptors


@pytest.mark.slow
def test_twenty_thousand_files_are_listed_and_not_opened(tmp_path, makers):
    makers["stamp"](tmp_path / "s00000", *numbered(1, 2))
    for number in range(1, 20_000):
        (tmp_path / f"s{number:05}.h5").hardlink_to(tmp_path / "s00000.h5")
    code = (
        "import resource, sys, time\n"
        "from pathlib import Path\n"
        "from slidevlm.data.formats import slides, slide_folder\n"
        "count, original = [], slide_folder.open_bags\n"
        "slide_folder.open_bags = lambda path: (count.append(path), original(path))[1]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "store = slide_folder.SlideFolder(Path(sys.argv[1]))\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(len(store.cases), len(count), grown)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    cases, opened_files, grown_kilobytes = map(int, found.stdout.split())
    assert cases == 20_000 and opened_files <= 20
    assert grown_kilobytes < 100_000
