"""Tables read back as they were written; what documents may be: tests/hard/test_malicious.py."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st

from slidevlm.documents import Table

CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=12)


@given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=5))
def test_any_text_reads_back(rows: list[list[str]]) -> None:
    table = Table()
    for row in rows:
        table.writerow(row)
    assert list(csv.reader(io.StringIO(table.text(), newline=""))) == rows


def test_numbers_line_ends_and_what_no_table_may_hold() -> None:
    table = Table()
    table.writerow(["a\rb", 1, 2.5, "c\0d", None, 'e"f'])
    table.writerow(["x\r\ny", "", "", "", "", "z\n"])
    assert table.text() == '"a\rb",1,2.5,c\ufffdd,,"e""f"\n"x\r\ny",,,,,"z\n"\n'
