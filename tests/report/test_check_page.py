"""The page of `data check`: whole without a network, and inert whatever the data says."""

from __future__ import annotations

import base64
import json
import re
from hashlib import sha256
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slidevlm.data.check import CheckReport, ClassTable, Cohort, Histogram, SplitRow
from slidevlm.report.check_page import page, terminal

HOSTILE = '</script><img src=x onerror=alert(1)><a href="javascript:x">\u2028&amp;\x1b[2J'


class Page(HTMLParser):
    """Tags, attributes, texts and scripts of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in == "script" else self.texts).append(data)


@pytest.fixture
def report() -> CheckReport:
    found = CheckReport(
        cohort=Cohort(
            HOSTILE, 3, 2, 4, 50, (1, 9, 40), (HOSTILE,), (6,), ("float16",), ("um",), (HOSTILE,), 0
        ),
        splits=[SplitRow(HOSTILE, 3, 3, 2, 50, 3, 1)],
        histograms=[
            Histogram("Tiles a specimen", "tiles", (1.0, 10.0, 100.0), {HOSTILE: (1, 2)}, 50.0)
        ],
        classes=[ClassTable(HOSTILE, (HOSTILE, "b"), {HOSTILE: (2, 1), "val": (0, 0)})],
    )
    found.add("note", "a note", "last")
    found.add("error", HOSTILE, HOSTILE, [HOSTILE] * 7)
    return found


def test_nothing_in_the_data_acts_on_the_page(report):
    parsed = Page(page(report, "var Plotly;"))
    assert {tag for tag, _ in parsed.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "span", "details",
        "summary", "div", "br", "table", "tr", "th", "td", "script",
    }  # fmt: skip
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "action"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 2
    assert sum(HOSTILE.split("\u2028")[0] in text for text in parsed.texts) >= 10
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy and "connect-src" not in policy
    assert "; base-uri 'none'; form-action 'none'" in policy, "default-src is not for these"
    scripts = policy.split("script-src ")[1].split(";")[0]
    assert "unsafe" not in scripts
    digests = [base64.b64encode(sha256(s.encode()).digest()).decode() for s in parsed.scripts]
    assert scripts.split() == [f"'sha256-{digest}'" for digest in digests]


def test_a_page_without_plots_admits_no_script() -> None:
    parsed = Page(page(CheckReport(), "var Plotly;"))
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a)
    assert "script-src 'none';" in policy and not parsed.scripts


def test_a_browser_draws_the_plots(browser: Any, report, tmp_path: Path) -> None:
    """The page's own policy holds in it: its scripts run, one put in from outside does not."""
    plotly = pytest.importorskip("plotly.offline")
    content = page(report, plotly.get_plotlyjs())
    for name, text in (
        ("own", content),
        ("other", content.replace("</body>", "<script>window.hacked=1</script></body>")),
    ):
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        looked = browser.new_page()
        problems: list[str] = []
        looked.on("console", lambda m, problems=problems: problems.append(m.text))
        looked.on("pageerror", lambda e, problems=problems: problems.append(str(e)))
        looked.goto((tmp_path / f"{name}.html").as_uri())
        looked.wait_for_selector("#plot1 .main-svg")
        assert looked.locator("#plot0 .bars .point").count() == 2
        assert looked.evaluate("window.hacked === undefined")
        assert len(problems) == (name == "other")
        assert all("Content Security Policy" in text for text in problems)
        looked.close()


def test_plots_have_the_numbers(report):
    script = Page(page(report, "var Plotly;")).scripts[-1]
    calls = re.findall(r'Plotly\.newPlot\("plot(\d)",(\[.*?\]),(\{.*?\}),\{"displaylogo"', script)
    assert [number for number, _, _ in calls] == ["0", "1"]
    (bars,) = json.loads(calls[0][1])
    assert bars["y"] == [1, 2] and bars["hovertext"] == ["1 to 10 tiles", "10 to 100 tiles"]
    assert json.loads(calls[0][2])["shapes"][0]["x0"] == 50.0
    first, second = json.loads(calls[1][1])
    assert first["y"] == [2 / 3, 1 / 3] and second["y"] == [0, 0]
    # plotly reads tags in its texts: there must be none.
    assert "<" not in json.dumps([first, bars]) and "&lt;/script&gt;" in first["x"][0]


def test_plotly_knows_everything_in_the_plots(report):
    graphs = pytest.importorskip("plotly.graph_objects")
    script = Page(page(report, "var Plotly;")).scripts[-1]
    calls = re.findall(r'newPlot\("plot\d",(\[.*?\]),(\{.*?\}),\{"displaylogo"', script)
    for data, layout in calls:
        figure = graphs.Figure(json.loads(data), json.loads(layout))  # refuses what it lacks
        assert figure.layout.title.text in ("Tiles a specimen", f"Classes of {escape(HOSTILE)}")
    with pytest.raises(ValueError, match="Invalid property"):
        graphs.Figure([{"type": "bar", "widths": [1]}])


def test_errors_come_first_and_lists_are_whole(report):
    content = page(report, "var Plotly;")
    assert content.index('class="error"') < content.index('class="note"')
    assert "7 listed" in content and content.count("onerror=alert(1)&gt;") >= 7


def test_the_real_library_stays_within_its_script(report):
    plotly = pytest.importorskip("plotly.offline")
    parsed = Page(page(report, plotly.get_plotlyjs()))
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 2
    assert sum(map(len, parsed.scripts)) > 3e6


def test_the_terminal_is_not_steered(report):
    text = terminal(report)
    assert all(c.isprintable() or c == "\n" for c in text)
    lines = text.splitlines()
    assert any(line.startswith("error: ") for line in lines)
    assert "    ... and 2 more" in lines
    assert lines[-1] == "errors: 1, warnings: 0"
    assert terminal(CheckReport()) == "nothing wrong was found"
