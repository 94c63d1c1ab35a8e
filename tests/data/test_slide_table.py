from __future__ import annotations

import csv
import io
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidevlm.data.slide_table import SlideRow, patient_of, read_slide_table
from slidevlm.errors import DataError


def table(folder, text: str, name: str = "t.csv") -> tuple[SlideRow, ...]:
    (folder / name).write_text(text, encoding="utf-8")
    return read_slide_table(folder / name)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("case_id,slide_id,label\nc,s,1\n", SlideRow("c", "c", "s")),
        ("PATIENT,FILENAME\np,s.h5\n", SlideRow("p", "p", "s.h5")),
        ("Slide_ID;Specimen;Patient\ns;x;p\n", SlideRow("x", "p", "s")),
        ("case_id\tslide\nTCGA-02-0001-01\ts\n", SlideRow("TCGA-02-0001-01", "TCGA-02-0001", "s")),
        ("patient,wsi\nTCGA-02-0001-01,s\n", SlideRow("TCGA-02-0001-01", "TCGA-02-0001-01", "s")),
        ('case_id,slide_id\n" c ","s, 1"\n', SlideRow("c", "c", "s, 1")),
    ],
)
def test_columns(tmp_path, text, row):
    assert table(tmp_path, text) == (row,)


def test_rows_keep_their_order_and_count_once(tmp_path):
    rows = table(tmp_path, "case_id,slide_id\nb,2\na,1\n\nb,2\nb,0\n")
    assert [(row.specimen, row.slide) for row in rows] == [("b", "2"), ("a", "1"), ("b", "0")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case_id,label\nc,1\n", r"has the columns case_id, label; the slide must be in one of"),
        ("slide_id,label\nc,1\n", "the specimen must be in one of specimen, specimen_id, case_id"),
        ("case_id,slide_id\nc,s\nc, \n", "row 2 below the header: an empty cell in case_id, slide"),
        ("case_id,slide_id\na,s\nb,s\n", "slide 's' is listed for 'a' of patient 'a' and for 'b'"),
        ("case_id,patient,slide_id\na,p,1\na,q,2\n", "'a' is listed for the patients 'p' and 'q'"),
        ("case_id,slide_id\n", "lists no slide"),
        ("", r"has the columns \(none\)"),
    ],
)
def test_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        table(tmp_path, text)
    assert "t.csv" in str(caught.value)


def test_xlsx(tmp_path):
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["PATIENT", "FILENAME"], [17, "s.h5"], [None, None], [18.0, "t.h5"]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    rows = read_slide_table(tmp_path / "t.xlsx")
    assert rows == (SlideRow("17", "17", "s.h5"), SlideRow("18", "18", "t.h5"))
    whole = (tmp_path / "t.xlsx").read_bytes()
    for size in (0, 10, 1000, len(whole) - 30):
        (tmp_path / "t.xlsx").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"t\.xlsx cannot be read as XLSX"):
            read_slide_table(tmp_path / "t.xlsx")


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("TCGA-02-0001-01Z-00-DX1.ABC", "TCGA-02-0001"),
        ("tcga-a2-a0cm", "TCGA-A2-A0CM"),
        ("TCGA-02-00012", "TCGA-02-00012"),
        ("x_TCGA-02-0001", "x_TCGA-02-0001"),
    ],
)
def test_patient_of(name, patient):
    assert patient_of(name) == patient


words = st.text(string.ascii_letters + string.digits + ' .-_/,;"äß', min_size=1, max_size=12).map(
    str.strip
)


@settings(max_examples=100, deadline=None)
@given(
    slides=st.dictionaries(words.filter(bool), words.filter(bool), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_is_written_is_read(tmp_path_factory, slides, delimiter, end):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end)
    writer.writerow(["specimen", "slide_id", "patient"])
    writer.writerows([specimen, slide, f"p{specimen}"] for slide, specimen in slides.items())
    path = tmp_path_factory.mktemp("table") / "t.csv"
    path.write_bytes(buffer.getvalue().encode())
    expected = tuple(SlideRow(case, f"p{case}", slide) for slide, case in slides.items())
    assert read_slide_table(path) == expected


@settings(max_examples=300, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.xlsx"])
def test_any_bytes_are_a_table_or_an_error(tmp_path_factory, name, content):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        rows = read_slide_table(path)
    except DataError as error:
        assert name in str(error)
    else:
        assert rows and all(row.slide and row.specimen and row.patient for row in rows)
