from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.data.reports import read_text_file
from slidevlm.data.splits import check_leakage, read_identifiers, resolve, write_identifiers
from slidevlm.errors import DataError


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "s 1,b\nc"),
        ("a.txt", "\ufeff s 1 ,, b\r\n\n c ,b,\n"),
        ("a", "s 1\nb\nc\n"),
        ("a.json", '["s 1", " b", "c", "c"]'),
        ("a.txt", ' ["s 1", "b", "c"]'),
        ("a.csv", "specimen,label\ns 1,0\nb,1\nc,1\n"),
        ("a.csv", "label;Case_ID\n0;s 1\n1;b\n2;c\n"),
        ("a.txt", "slide_id\ns 1\nb\nc\n"),
        ("a.tsv", "x\tpatient\n0\ts 1\n0\tb\n0\tc\n"),
        ("a.csv", '"patient","specimen"\n"p","s 1"\n"p","b"\n"p","c"\n'),
    ],
)
def test_forms(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_identifiers(tmp_path / name) == ["s 1", "b", "c"]


def test_integers_are_names(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    assert read_identifiers(tmp_path / "a.json") == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt names no specimen; write identifiers"),
        ("a.txt", " ,\n,", "names no specimen"),
        ("a.json", "{}", "not a JSON list of names"),
        ("a.json", "[true]", "not a JSON list of names"),
        ("a.json", "[", "is not JSON"),
        ("a.csv", "name,label\na,b\n", "has the columns name, label; one of specimen"),
        ("a.csv", "specimen\n", "names no specimen"),
    ],
)
def test_errors(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_identifiers(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"no\.txt cannot be read: No such file"):
        read_identifiers(tmp_path / "no.txt")


letters = st.characters(codec="utf-8", categories=("Ll", "Lu", "Nd"), include_characters="-_. ")
identifiers = st.lists(
    st.text(letters, min_size=1).map(str.strip).filter(bool), min_size=1, unique=True
)


@settings(max_examples=60, deadline=None)
@given(names=identifiers, data=st.data())
def test_separators_and_space_do_not_matter(tmp_path_factory, names, data):
    names = [f"x{name}" for name in names]  # no header by chance
    blanks = st.sampled_from([",", "\n", " , ", "\r\n", ",\n\n", "\t,"])
    path = tmp_path_factory.mktemp("splits") / "a.txt"
    text = "".join(name + data.draw(blanks) for name in [*names, names[0]])
    path.write_text(text, encoding="utf-8", newline="")
    assert read_identifiers(path) == names
    path.write_text(json.dumps(names))
    assert read_identifiers(path) == names


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".json", ".txt", ".csv"]))
def test_junk_is_an_error_of_ours_or_names(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("junk") / f"a{suffix}"
    path.write_bytes(content)
    try:
        assert read_identifiers(path)
    except DataError as error:
        assert str(path) in str(error)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8)


@settings(max_examples=80, deadline=None)
@given(
    names=identifiers,
    column=st.sampled_from(["specimen", "Case_ID", " slide_id ", "PATIENT"]),
    before=st.booleans(),
    delimiter=st.sampled_from(",;\t"),
    suffix=st.sampled_from([".csv", ".txt"]),
    data=st.data(),
)
def test_tables(tmp_path_factory, names, column, before, delimiter, suffix, data):
    rows = [[column, "note"], *([name, data.draw(texts)] for name in [*names, names[0]])]
    path = tmp_path_factory.mktemp("tables") / f"a{suffix}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            row[::-1] if before else row for row in rows
        )
    assert read_identifiers(path) == names


@settings(max_examples=60, deadline=None)
@given(names=identifiers, ending=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans())
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path_factory, names, ending, mark):
    names = [f"x{name}" for name in names]
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    content = ending.join(names) + ending
    path.write_text(content, encoding="utf-8-sig" if mark else "utf-8", newline="")
    assert read_identifiers(path) == names


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(value=st.lists(st.text(max_size=4) | st.integers(), max_size=4) | values)
def test_any_json_is_an_error_of_ours_or_its_names(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("values") / "a.json"
    path.write_text(json.dumps(value))
    try:
        found = read_identifiers(path)
    except DataError as error:
        assert str(path) in str(error)
        usable = isinstance(value, list) and all(type(v) in (str, int) for v in value)
        assert not (usable and any(str(v).strip() for v in value))
        return
    assert found == list(dict.fromkeys(t for v in value if (t := str(v).strip())))


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "cohort.h5"
    with CaseWriter(path, "uni") as writer:
        for patient, specimen, text in [
            ("p1", "a", "Text  a"), ("p1", "b", "b"), ("p2", "c", "c"), ("p3", "d", None),
            ("p4", "e", " \n"), ("p5", "A", "1"), ("p6", "A", "2"),
        ]:  # fmt: skip
            writer.add(patient, specimen, np.ones((2, 3), "f2"), text)
    return Hdf5Cases(path, "uni", "report")


def split(tmp_path, name, *identifiers):
    path = tmp_path / f"{name}.txt"
    path.write_text("\n".join(identifiers))
    return path


def test_specimens_then_patients_in_the_order_of_the_file(store, tmp_path):
    found = resolve(split(tmp_path, "train", "c", "p1", "a", "p6"), store)
    assert found.name == "train" and len(found) == 4
    assert [case.specimen for case in found.cases] == ["c", "a", "b", "p6/A"]
    assert found.reports == ("c", "Text a", "b", "2")
    assert [case.specimen for case in found.first(2).cases] == ["c", "a"]


def test_missing_and_textless_are_reported(store, tmp_path, caplog):
    wanted = ["a", *(f"no{i}" for i in range(12)), "d", "e"]
    with caplog.at_level(logging.WARNING, "slidevlm.data"):
        found = resolve(split(tmp_path, "train", *wanted), store)
    assert len(found) == 1 and len(found.missing) == 12 and found.without_text == ("d", "e")
    assert "12 of 15 identifiers have no features" in caplog.text
    assert "no9, ... (2 more)" in caplog.text and "no10" not in caplog.text
    assert "2 of 3 specimens have no report and are dropped: d, e" in caplog.text


def test_nothing_found(store, tmp_path):
    with pytest.raises(DataError, match=r"none of its 2 identifiers has features in .*names x, y"):
        resolve(split(tmp_path, "train", "x", "y"), store)
    with pytest.raises(DataError, match="none of its 1 specimens has a report"):
        resolve(split(tmp_path, "train", "d"), store)


def test_a_text_file_wins_and_is_the_only_source(store, tmp_path):
    texts = {"a": "new", "p5/A": "one", "p6/A": "two"}
    found = resolve(split(tmp_path, "train", "p1", "p5", "p6"), store, texts)
    assert found.reports == ("new", "one", "two") and found.without_text == ("b",)


def test_a_report_of_the_patient_goes_before_one_of_the_plain_name(store, tmp_path):
    """As a label does: `Labels.of` finds by the same names."""
    path = tmp_path / "texts.json"
    path.write_text('{"b": "of any b", "p1": {"b": "of p1\'s"}, "p2": {"c": "of p2\'s"}}')
    texts = read_text_file(path)
    assert resolve(split(tmp_path, "train", "b", "c"), store, texts).reports == (
        "of p1's",
        "of p2's",
    )


def test_a_case_of_the_index_that_is_not_there_is_missing(store, tmp_path):
    import h5py

    store.close()
    with h5py.File(store.path, "a") as file:
        del file["patients/p2/c/uni"]
    assert resolve(split(tmp_path, "train", "a", "c"), store).missing == ("c",)


def test_leakage(store, tmp_path):
    train = resolve(split(tmp_path, "train", "a", "c"), store)
    val = resolve(split(tmp_path, "val", "b"), store)
    with pytest.raises(
        DataError,
        match=r"1 patient\(s\) are both in split 'train' and in split 'val': p1;.*"
        "--allow-patient-overlap",
    ):
        check_leakage([train, val])
    check_leakage([train, resolve(split(tmp_path, "test", "p5", "p6"), store)])


def test_real_data(shared):
    folder = shared / "data/tcga"
    store = Hdf5Cases(folder / "tcga.h5", "hipt_4096", "diagnosis")
    splits = [resolve(folder / f"{name}.txt", store) for name in ("train", "val", "test")]
    assert [len(s) for s in splits] == [513, 142, 191]
    assert not any(s.missing or s.without_text for s in splits)
    check_leakage(splits)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
        .map(str.strip)
        .filter(bool),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_written_identifiers_are_read_back(tmp_path_factory, names):
    names = [name for name in names if not name.startswith("\ufeff")] or ["a"]
    path = tmp_path_factory.mktemp("splits") / "train.txt"
    path.write_text(write_identifiers(names), encoding="utf-8", newline="")
    assert read_identifiers(path) == names


@pytest.mark.parametrize(
    "names", [["specimen", "a"], ["a,b"], ["[x"], ["Patient;1", "b"], ['"specimen"', "b"], ["a\nb"]]
)
def test_names_that_would_be_read_otherwise_are_written_as_json(tmp_path, names):
    text = write_identifiers(names)
    assert text.startswith("[\n")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read_identifiers(tmp_path / "a.txt") == names
    assert write_identifiers(["a", "b c"]) == "a\nb c\n"
