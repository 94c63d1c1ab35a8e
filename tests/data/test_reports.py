from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.data.reports import normalise, read_text_file, report_id
from slidevlm.errors import DataError


def test_normalise():
    assert normalise("  Cafe\u0301\t\r\n a\x00\x07b\u00a0\u2028c ") == "Caf\u00e9 a b c"
    assert normalise("\ud800x") == "x" and normalise("\n") == ""


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_normalise_is_idempotent(text):
    once = normalise(text)
    assert normalise(once) == once and "  " not in once
    assert report_id(text) == report_id(f" {once}\n")
    assert -(2**63) <= report_id(text) < 2**63


def test_report_id_is_the_same_in_another_process():
    code = "from slidevlm.data.reports import report_id; print(report_id('Grade 3.'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(other.stdout) == report_id("grade  3.") != report_id("grade 4.")


TEXTS = {"a 1": 'Says "x, y"\nand more', "b": "\u00e9"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("nested.json", json.dumps({"p": {" a 1 ": TEXTS["a 1"]}, "q": {"b": "\u00e9"}})),
        ("flat.json", json.dumps(TEXTS)),
        ("bom.json", "\ufeff" + json.dumps(TEXTS)),
        ("list.json", json.dumps([{"id": k, "report": v} for k, v in TEXTS.items()])),
        ("lines.jsonl", "\n".join(json.dumps({"case_id": k, "text": v}) for k, v in TEXTS.items())),
        ("table.csv", 'Specimen_ID,x,Diagnosis\na 1,0,"Says ""x, y""\nand more"\n\nb,0,\u00e9\n'),
        ("table.tsv", 'slide_id\tcaption\na 1\t"Says ""x, y""\nand more"\nb\t\u00e9\n'),
    ],
)
def test_forms(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text_file(tmp_path / name) == TEXTS


def test_names_shared_by_patients(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"p": {"A": "one"}, "q": {"A": "two", "B": None}}))
    assert read_text_file(path) == {"p/A": "one", "q/A": "two", "B": ""}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "3", "holds int; give"),
        ("a.json", "{}", "holds no texts"),
        ("a.json", '{"s": 3}', "s: the text is int, not a string"),
        ("a.json", '[{"name": "a", "report": "b"}]', "columns name, report; needed are one of"),
        ("a.json", "[3]", "entry 1: 3 is not an object"),
        ("a.jsonl", '{"id": "a", "text": "b"}\n{', "line 2 is not JSON"),
        ("a.jsonl", '{"id": 1, "text": "b"}\n{"id": "1", "text": "c"}', "two different texts"),
        ("a.csv", "name,report\na,b\n", "columns name, report; needed are one of specimen"),
    ],
)
def test_errors(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_text_file(tmp_path / name)


def test_unreadable(tmp_path):
    with pytest.raises(DataError, match=r"no\.json cannot be read: No such file"):
        read_text_file(tmp_path / "no.json")
    (tmp_path / "latin.json").write_bytes('{"a": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_text_file(tmp_path / "latin.json")


names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1)


@settings(max_examples=40, deadline=None)
@given(texts=st.dictionaries(names, st.text(st.characters(codec="utf-8")), min_size=1))
def test_every_form_gives_the_same(tmp_path_factory, texts):
    folder = Path(tmp_path_factory.mktemp("texts"))
    (folder / "a.json").write_text(json.dumps(texts))
    (folder / "a.jsonl").write_text(
        "\n".join(json.dumps({"id": k, "report": v}) for k, v in texts.items())
    )
    assert read_text_file(folder / "a.json") == read_text_file(folder / "a.jsonl") == texts
    with open(folder / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "report"), *texts.items()])
    read = read_text_file(folder / "a.csv")
    assert {k: normalise(v) for k, v in read.items()} == {k: normalise(v) for k, v in texts.items()}


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=80), suffix=st.sampled_from([".json", ".jsonl", ".csv"]))
def test_junk_is_an_error_of_ours_or_texts(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("junk") / f"a{suffix}"
    path.write_bytes(content)
    try:
        assert read_text_file(path)
    except DataError as error:
        assert str(path) in str(error)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.dictionaries(
        names, st.dictionaries(names, st.text(st.characters(codec="utf-8")), min_size=1), min_size=1
    )
)
def test_texts_by_patient(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("nested") / "a.json"
    path.write_text(json.dumps(texts))
    owners = Counter(specimen for specimens in texts.values() for specimen in specimens)
    expected = {
        f"{patient}/{specimen}" if owners[specimen] > 1 else specimen: text
        for patient, specimens in texts.items()
        for specimen, text in specimens.items()
    }
    try:
        assert read_text_file(path) == expected
    except DataError as error:  # "a/b" and the b of two patients, one of them a
        assert "two different texts" in str(error) and any("/" in name for name in owners)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=12)


@settings(max_examples=80, deadline=None)
@given(
    texts=st.dictionaries(names, st.text(st.characters(codec="utf-8")), min_size=1),
    id_column=st.sampled_from(["specimen", "Case_ID ", "SLIDE_ID", "id"]),
    text_column=st.sampled_from(["report", " Text", "diagnosis", "CAPTION"]),
    delimiter=st.sampled_from(",;\t"),
    swapped=st.booleans(),
    data=st.data(),
)
def test_tables(tmp_path_factory, texts, id_column, text_column, delimiter, swapped, data):
    header = [id_column, "other", text_column]
    rows = [[name, data.draw(cells), text] for name, text in texts.items()]
    if swapped:
        header, rows = header[::-1], [row[::-1] for row in rows]
    path = tmp_path_factory.mktemp("tables") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    read = read_text_file(path)
    assert {k: normalise(v) for k, v in read.items()} == {k: normalise(v) for k, v in texts.items()}


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.sampled_from(["id", "report", "specimen", "text", "a"]) | st.text(max_size=3)
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=8
)


@settings(max_examples=200, deadline=None)
@given(value=values, suffix=st.sampled_from([".json", ".jsonl"]))
def test_any_json_is_an_error_of_ours_or_texts(tmp_path_factory, value, suffix):
    path = tmp_path_factory.mktemp("values") / f"a{suffix}"
    path.write_text(json.dumps(value))
    try:
        texts = read_text_file(path)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert texts and all(type(k) is str and type(v) is str for k, v in texts.items())
    # Nothing is made up: every name and text stands in the file.
    content = json.dumps(value)
    for name, text in texts.items():
        assert json.dumps(text)[1:-1] in content
        assert all(json.dumps(part)[1:-1] in content for part in name.split("/"))


@settings(max_examples=60, deadline=None)
@given(
    texts=st.dictionaries(names, st.text(st.characters(codec="utf-8"), min_size=1), min_size=2),
    cut=st.floats(0, 1, exclude_max=True),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
def test_a_file_that_was_cut_short_is_never_read_wrongly(tmp_path_factory, texts, cut, suffix):
    path = tmp_path_factory.mktemp("cut") / f"a{suffix}"
    rows = [{"id": k, "report": v} for k, v in texts.items()]
    content = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(content[: int(cut * len(content))])
    try:
        read = read_text_file(path)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert suffix == ".jsonl", "half a JSON is no JSON"
    assert read.items() <= texts.items() and len(read) < len(texts)


@pytest.mark.parametrize("name", [None, True, 1.5, [1], {"a": 1}, " "])
def test_names_that_are_none(tmp_path, name):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": "a", "report": "b"}, {"id": name, "report": "c"}]))
    with pytest.raises(DataError, match=r"a\.json, entry 2: .* is not a specimen's name"):
        read_text_file(path)


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_quote_that_is_not_closed_takes_no_rows_with_it(tmp_path, ending):
    path = tmp_path / "reports.csv"
    path.write_text(f'id,report\na,lung\nb,"breast\nc,colon\nd,skin{ending}')
    with pytest.raises(DataError, match=r"reports\.csv, row 3: a quote is not closed"):
        read_text_file(path)
    path.write_text(f'id,report\na,5" tumor\nb,"breast\nbiopsy"\nc,colon{ending}')
    assert read_text_file(path) == {"a": '5" tumor', "b": "breast\nbiopsy", "c": "colon"}


def test_a_column_that_may_hold_classes_is_told_once(tmp_path, caplog):
    rows = [{"id": "a", "diagnosis": "cancer"}, {"id": "b", "diagnosis": "none"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps([{**row, "report": "text"} for row in rows]))
    with caplog.at_level("INFO", "slidevlm.data"):
        assert read_text_file(tmp_path / "a.json") == {"a": "cancer", "b": "none"}
        assert read_text_file(tmp_path / "b.json") == {"a": "text", "b": "text"}
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.endswith("a.json: the reports are its 'diagnosis'")
