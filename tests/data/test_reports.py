from __future__ import annotations

import csv
import json
import subprocess
import sys
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
