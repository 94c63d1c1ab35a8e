from __future__ import annotations

from slidevlm.report.plain import printable, shortened, table


def test_table():
    assert table(("name", "n"), [("a", 1), ("long name", 200)]) == (
        "name         n\n---------  ---\na            1\nlong name  200"
    )
    assert table(("a", "b"), []) == "a  b\n-  -"


def test_control_characters_are_blanks():
    assert printable("a\x1b[31m\r\nb\u202ec") == "a [31m  b c"


def test_lists_are_cut():
    assert shortened(["x" * 20, "b"], width=10) == ["xxxxxxx...", "b"]
    assert shortened(list("abcdefg")) == [*"abcde", "... and 2 more"]
