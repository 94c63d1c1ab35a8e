"""The report on a cohort: each fault is found, none is invented, and it stops at nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from slidevlm.data.check import CheckReport, Finding, Labelled, Texts, check
from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.data.tokenizer import Tokenizer

CONTEXT = 40
SPLITS = {
    "train": ["s0", "s1", "s2", "s3", "s4", "s5"],
    "val": ["s6", "s7", "s8", "ghost"],
    "test": ["s9", "s10"],
}


def features(number: int, rows: int = 20, width: int = 6) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((rows, width)).astype(np.float16)


def write_sound(path: Path) -> Path:
    """Twelve specimens without a fault."""
    with CaseWriter(path, "uni", attributes={"unit": "um"}) as writer:
        for number in range(12):
            rows = 10 * (number + 1)
            writer.add(
                f"p{number}",
                f"s{number}",
                features(number, rows),
                f"Report of specimen number {number}.",
                np.ones((rows, 2)),
                ["slide/0"] * rows,
            )
    return path


def spoil(path: Path) -> None:
    """One fault each, in the file."""

    def change(specimen: str, values: np.ndarray) -> None:
        group = file[f"patients/p{specimen[1:]}/{specimen}/uni"]
        for name in list(group):
            del group[name]
        group["features"] = values
        group["positions"] = np.ones((len(values), 2), np.float32)
        group["positions"].attrs["unit"] = "um"

    with h5py.File(path, "a") as file:
        bad = features(1)
        bad[3, 2], bad[7] = np.nan, np.inf
        change("s1", bad)
        change("s2", features(2, 0))
        del file["patients/p3/s3/uni/positions"]
        file["patients/p3/s3/uni/positions"] = np.full((40, 2), np.nan)
        change("s4", features(4))
        change("s6", features(4))
        del file["patients/p5/s5/report"]
        for specimen, text in (
            ("s7", "report of  specimen number 0."),
            ("s8", "a long report " * 50),
        ):
            file[f"patients/p{specimen[1:]}/{specimen}/report"][()] = text
        file.move("patients/p9/s9", "patients/p0/s9")
        change("s10", features(10, 20, 8))
        change("s11", features(11, 1))
        del file["case-index"]


def run(
    path: Path,
    splits: dict[str, Sequence[str]] = SPLITS,
    labelled: Sequence[Labelled] = (),
    **more: object,
) -> CheckReport:
    files = {}
    for name, names in splits.items():
        files[name] = path.with_name(f"{name}.txt")
        files[name].write_text("\n".join(names))
    report = CheckReport()
    texts = Texts(lambda reports: Tokenizer.train(reports, 300), CONTEXT)
    options = {"cutoff": 1000, "allow_patient_overlap": False, "workers": 0, **more}
    check(report, Hdf5Cases(path, "uni", "report"), files, None, texts, labelled, **options)
    return report


def of(report: CheckReport, topic: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.topic == topic]


def one(report: CheckReport, topic: str, level: str) -> Finding:
    found = [finding for finding in of(report, topic) if finding.level == level]
    assert len(found) == 1, report.findings
    return found[0]


@pytest.fixture
def spoilt(tmp_path: Path) -> Callable[..., CheckReport]:
    path = write_sound(tmp_path / "a.h5")
    spoil(path)
    return lambda **more: run(path, **more)


def test_a_sound_cohort_has_no_finding(tmp_path):
    splits = {**SPLITS, "val": ["s6", "s7", "s8"], "test": ["s9", "s10", "s11"]}
    report = run(write_sound(tmp_path / "a.h5"), splits)
    assert report.findings == []
    cohort = report.cohort
    assert (cohort.specimens, cohort.patients, cohort.slides, cohort.tiles) == (12, 12, 12, 780)
    assert cohort.length == (10, 65, 120)
    assert (cohort.widths, cohort.dtypes, cohort.units) == ((6,), ("float16",), ("um",))
    rows = {s.name: (s.specimens, s.patients, s.tiles, s.truncated) for s in report.splits}
    assert rows == {"train": (6, 6, 210, 0), "val": (3, 3, 240, 0), "test": (3, 3, 330, 0)}
    lengths = report.histograms[0]
    assert {name: sum(counts) for name, counts in lengths.counts.items()} == {
        "train": 6, "val": 3, "test": 3,
    }  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_every_fault_is_listed_at_once(spoilt, workers):
    report = spoilt(workers=workers)
    assert one(report, "missing", "warning").items == ("ghost",)
    assert one(report, "no report", "warning").items == ("s5",)
    assert one(report, "no split", "warning").items == ("s11",)
    assert one(report, "not finite", "error").items == ("s1: 2 of 20 tiles",)
    assert one(report, "empty", "error").items == ("s2",)
    (unreadable,) = one(report, "unreadable", "error").items
    assert unreadable.startswith("s3: ") and "a.h5" in unreadable
    (leak,) = of(report, "leakage")
    assert leak.level == "error" and leak.items == ("p0",)
    assert leak.message == "1 patient both in split train and in split test"
    assert one(report, "duplicate slides", "error").items == ("s4 [train] = s6 [val]",)
    assert one(report, "duplicate reports", "warning").items == ("s0 [train] = s7 [val]",)
    mixture = one(report, "mixture", "error")
    assert "feature width: 6:" in mixture.message and "; 8: 1 (s10)" in mixture.message
    assert mixture.items == ("s10: 8",)
    (long,) = one(report, "truncated", "warning").items
    assert long.startswith("s8: ")
    assert one(report, "one tile", "note").items == ("s11",)
    assert report.count("error") == 6
    json.dumps(report.to_dict())


def test_token_counts_are_those_of_the_tokenizer(spoilt):
    tokenizer = Tokenizer.train([f"Report of specimen number {i}." for i in range(5)], 300)
    expected = len(tokenizer.tokens("a long report " * 50)) + 2
    report = spoilt()
    assert one(report, "truncated", "warning").items == (f"s8: {expected}",)
    tokens = report.histograms[1]
    assert tokens.edges[-1] == expected + 1 and tokens.mark == CONTEXT


def test_faults_outside_the_splits_are_warnings(spoilt):
    report = spoilt(splits={"train": ["s0", "s4"]})
    assert report.count("error") == 0
    for topic in ("not finite", "empty", "unreadable"):
        assert one(report, topic, "warning").message.startswith("1 specimen (no split uses) ")
    assert one(report, "duplicate slides", "warning").items == ("s4 [train] = s6 [(no split)]",)


def test_without_splits_everything_counts(spoilt):
    report = spoilt(splits={})
    assert {f.topic for f in report.findings if f.level == "error"} == {
        "not finite", "empty", "unreadable", "mixture",
    }  # fmt: skip
    assert of(report, "no split") == [] and report.splits == []
    assert list(report.histograms[0].counts) == ["all"]


def test_patients_in_two_splits_may_be_allowed(spoilt):
    assert one(spoilt(allow_patient_overlap=True), "leakage", "warning").items == ("p0",)


def test_bags_above_the_cutoff_are_noted(tmp_path):
    report = run(write_sound(tmp_path / "a.h5"), cutoff=45)
    assert one(report, "sampled", "note").items == ("s4", "s5", "s6", "s7", "s8", "s9", "s10")
    assert report.histograms[0].mark == 45


def test_split_files_that_cannot_be_used(tmp_path):
    report = run(write_sound(tmp_path / "a.h5"), {"train": ["s0"], "val": [], "test": ["x", "y"]})
    assert "names no specimen" in one(report, "split file", "error").message
    assert one(report, "missing", "error").items == ("x", "y")
    assert [(s.name, s.specimens) for s in report.splits] == [("train", 1), ("val", 0), ("test", 0)]


def test_classes(tmp_path):
    labels = {"s0": "a", "s1": "a", "p2/s2": "b", "s6": "a", "s9": "c", "elsewhere": "a"}
    labels = {name: (kind,) for name, kind in labels.items()}
    prompts = {"a": ["an a"], "b": ["a b " * 40], "d": ["a d"]}
    report = run(write_sound(tmp_path / "a.h5"), labelled=[Labelled("kinds", labels, prompts)])
    (table,) = report.classes
    assert table.classes == ("a", "b", "c", "d")
    assert table.counts == {"train": (2, 1, 0, 0), "val": (1, 0, 0, 0), "test": (0, 0, 1, 0)}
    assert one(report, "labels", "error").items == ("c",)
    warnings = {f.message: f.items for f in of(report, "labels") if f.level == "warning"}
    assert warnings["kinds: 1 of 6 labelled specimens not in the data"] == ("elsewhere",)
    assert warnings["kinds: 3 specimens of split train without label"] == ("s3", "s4", "s5")
    absent = {f.message: f.items for f in of(report, "classes")}
    assert absent["kinds: 2 of 4 classes without a specimen in split train"] == ("c", "d")
    assert "kinds: 1 prompt longer" in one(report, "truncated", "warning").message


def test_several_classes_of_a_specimen(tmp_path):
    labels = {"s0": ("a", "b"), "s1": (), "s2": ("b",), "s6": ("b",), "s9": ("a",), "s10": ("a",)}
    prompts = {"a": ["an a"], "b": ["a b"]}
    report = run(write_sound(tmp_path / "a.h5"), labelled=[Labelled("kinds", labels, prompts)])
    (table,) = report.classes
    assert table.counts == {"train": (1, 2), "val": (0, 1), "test": (2, 0)}
    messages = {f.message: f.items for f in of(report, "labels")}
    assert messages["kinds: 3 specimens of split train without label"] == ("s3", "s4", "s5")


def test_specimens_without_report_where_there_is_no_split(tmp_path):
    path = write_sound(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        del file["patients/p5/s5/report"]
    missing = one(run(path, {}), "no report", "warning")
    assert missing.items == ("s5",) and missing.message.startswith("1 of 12 specimens without")
    with h5py.File(path, "a") as file:
        for number in (n for n in range(12) if n not in (5, 7)):
            del file[f"patients/p{number}/s{number}/report"]
        file["patients/p7/s7/report"][()] = " "
    assert len(one(run(path, {}), "no report", "error").items) == 12


def test_a_test_split_alone(tmp_path):
    report = run(write_sound(tmp_path / "a.h5"), {"test": ["s9", "s10"]})
    assert report.count("error") == 0 and sum(report.histograms[1].counts["test"]) == 2


def test_mixed_positions_units_and_types(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number, (unit, dtype) in enumerate(
            [("um", "f2"), ("um", "f2"), ("px", "f4"), (None, "f2")]
        ):
            group = file.create_group(f"patients/p{number}/s{number}/uni")
            group["features"] = features(number).astype(dtype)
            file[f"patients/p{number}/s{number}/report"] = f"report {number}"
            if unit is not None:
                group["positions"] = np.ones((20, 2))
                group["positions"].attrs["unit"] = unit
    report = run(tmp_path / "a.h5", {"train": ["s0", "s1", "s2", "s3"]})
    start = "the specimens differ in "
    messages = {f.message.removeprefix(start): f.level for f in of(report, "mixture")}
    assert messages == {
        "positions: with: 3 (s0, s1, s2); without: 1 (s3)": "error",
        "unit of positions: um: 2 (s0, s1); px: 1 (s2)": "error",
        "type of features: float16: 3 (s0, s1, s3); float32: 1 (s2)": "note",
    }


def test_damage_after_conversion(tmp_path):
    from slidevlm.data.convert import convert
    from slidevlm.data.formats.hdf5_target import Layout

    store = Hdf5Cases(write_sound(tmp_path / "a.h5"), "uni", "report")
    convert(store, tmp_path / "b.h5", Layout("uni", "float16", None), store.texts, workers=0)
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["patients/p4/s4/uni/features"][2, 2] = 0
        file["patients/p7/s7/report"][()] = "another"
    report = run(tmp_path / "b.h5")
    assert report.cohort.verified == 12
    assert one(report, "checksum", "error").items == ("s4: tiles", "s7: texts")


def test_real_data(shared, tmp_path):
    folder = shared / "data/tcga"
    report = CheckReport()
    store = Hdf5Cases(folder / "tcga.h5", "hipt_4096", "diagnosis")
    texts = Texts(lambda reports: Tokenizer.train(reports, 2000), 256)
    splits = {name: folder / f"{name}.txt" for name in ("train", "val", "test")}
    check(
        report, store, splits, None, texts, (),
        cutoff=100_000, allow_patient_overlap=False, workers=0,
    )  # fmt: skip
    assert (report.cohort.specimens, report.cohort.slides, report.cohort.tiles) == (846, 920, 38447)
    assert report.cohort.length[0] == 4 and report.cohort.length[2] == 292
    assert [(s.name, s.specimens) for s in report.splits] == [
        ("train", 513), ("val", 142), ("test", 191),
    ]  # fmt: skip
    assert report.count("error") == 0
    (same,) = of(report, "duplicate reports")
    first, second = same.items[0].replace(" [train]", "").split(" = ")
    by_name = {case.specimen: case for case in store.cases}
    assert store.text(by_name[first]).lower() == store.text(by_name[second]).lower()
