"""The page in a real browser: Chromium, wide and narrow, light and dark.

Screenshots go to the folder that $SLIDEVLM_SCREENSHOTS names, else to the test's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slidevlm
import slidevlm.testing
from slidevlm.app.cohorts import open_path
from slidevlm.app.page import write_page
from slidevlm.app.page_attention import Wanted
from slidevlm.cli import main
from slidevlm.flags import read_yaml
from slidevlm.report import specimens

TABS = (
    "overview", "training", "retrieval", "tasks", "map", "specimens", "attention", "data",
    "settings",
)  # fmt: skip
WITH_PLOTS = ("training", "retrieval", "tasks", "map")


class Looked:
    """A page that was opened, and everything it complained of or asked the network for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light") -> None:
        self.problems: list[str] = []
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.problems.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.on(
            "request",
            lambda r: (
                None
                if r.url.startswith((path.as_uri(), "data:", "blob:"))
                else self.problems.append(f"request {r.url}")
            ),
        )
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def tab(self, name: str) -> None:
        """Open a tab and draw all its plots."""
        self.page.click(f"#button-{name}")
        plots = self.page.locator(f"#tab-{name} .plot")
        for i in range(plots.count()):
            plots.nth(i).scroll_into_view_if_needed()
            plots.nth(i).locator(".main-svg").first.wait_for()
        self.page.evaluate("scrollTo(0, 0)")

    def overflow(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("SLIDEVLM_SCREENSHOTS", tmp_path / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_every_tab(browser: Any, run_folder: Path, tmp_path: Path, width: int, scheme: str) -> None:
    looked = Looked(browser, write_page([run_folder]), width, scheme)
    for tab in TABS:
        looked.tab(tab)
        shown = looked.page.locator(f"#tab-{tab}")
        assert shown.is_visible() and shown.inner_text().strip()
        assert looked.overflow() <= 0, f"{tab} is wider than {width}"
        drawn = looked.page.locator(f"#tab-{tab} .plot .main-svg").count()
        assert (drawn > 0) == (tab in WITH_PLOTS), tab
        path = screenshots(tmp_path) / f"{tab}-{width}-{scheme}.png"
        looked.page.screenshot(path=str(path), full_page=True)
    assert looked.problems == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with its data."""
    settings = slidevlm.testing.settings(tmp_path_factory.mktemp("trained"))
    found = slidevlm.train({**settings, "model": "coca_small"}).folder
    assert found is not None
    return found


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_attention(browser: Any, trained: Path, tmp_path: Path, width: int, scheme: str) -> None:
    path = write_page([trained], tmp_path / "page.html", Wanted(("2",), "cpu"))
    looked = Looked(browser, path, width, scheme)
    page = looked.page
    looked.tab("attention")
    assert page.locator("#tab-attention .plot .main-svg").count() > 1
    assert "no explanation" in page.locator("#tab-attention").inner_text()
    assert "times an even share" in page.locator("#attention-map").inner_text()
    values = "document.getElementById('attention-map').data[0].z.flat().filter((v) => v !== null)"
    before = page.evaluate(values)
    assert len(before) == 64, "each tile that was read"
    assert sum(before) / 64 == pytest.approx(1, abs=0.02), "in even shares"
    assert looked.overflow() <= 0
    name = f"attention-seen-{width}-{scheme}.png"
    page.screenshot(path=str(screenshots(tmp_path) / name), full_page=True)
    page.click(".sentence >> nth=1")
    assert page.locator(".sentence[aria-pressed=true]").count() == 1
    page.wait_for_function(f"JSON.stringify({values}) !== {json.dumps(json.dumps(before))}")
    box = page.locator("#attention-map .nsewdrag").bounding_box()
    page.locator("#tab-attention select").first.select_option("1")
    assert page.locator(".sentence[aria-pressed=true]").inner_text() == "The slide's embedding"
    assert box["width"] > 100
    page.click("text=Its reports")
    chosen = page.locator("#tab-attention select option").nth(1).text_content()
    assert page.locator(".detail h2").inner_text() == chosen
    assert looked.problems == []


def test_attention_over_the_slide(browser: Any, trained: Path, tmp_path: Path) -> None:
    """The slide's picture lies under the tiles, and each tile over its place."""
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("openslide")
    config = read_yaml(trained / "config.yaml")
    store = open_path(Path(config["hdf5_filename"]), None, None)
    name = Path(config["test_split"]).read_text().split()[0]
    bag = store.read(next(c for c in store.cases if c.specimen == name), None)
    assert bag.positions is not None and bag.unit == "um"
    mpp = float(bag.positions.max()) * 1.25 / 2048  # the tiles end at four fifths of the slide
    pixels = np.full((2048, 2048, 3), 230, np.uint8)
    pixels[:300, :300] = (200, 30, 30)
    (tmp_path / "slides").mkdir()
    options = {"tile": (256, 256), "photometric": "rgb"}
    with tifffile.TiffWriter(tmp_path / "slides" / f"{name}.tif") as file:
        file.write(pixels, **options)
        file.write(pixels[::2, ::2], subfiletype=1, **options)
    words = ["report", str(trained), "--output", str(tmp_path / "page.html"), "--attention", "2"]
    words += ["--slide-files", str(tmp_path / "slides"), "--mpp", str(mpp), "--device", "cpu"]
    assert main(words) == 0
    for width, scheme in ((1280, "light"), (400, "dark")):
        looked = Looked(browser, tmp_path / "page.html", width, scheme)
        page = looked.page
        looked.tab("attention")
        image = page.locator("#attention-map image")
        image.first.wait_for()
        sources = [image.nth(i).get_attribute("href") or "" for i in range(image.count())]
        assert sum(s.startswith("data:image/jpeg;base64,") for s in sources) == 1
        assert all(len(s) < 200_000 for s in sources)
        path = screenshots(tmp_path) / f"attention-slide-{width}-{scheme}.png"
        page.screenshot(path=str(path), full_page=True)
        place = page.evaluate("""() => {
            const node = document.getElementById("attention-map"), [image] = node.layout.images;
            return [image.x, image.y, image.sizex, image.sizey, node.data[0].opacity];
        }""")
        side = 2048 * mpp
        tiles = bag.positions.numpy()
        cell = side / place[2]
        for axis in (0, 1):  # some tiles were read; the first of these is where cell 0 begins
            corner = (-place[axis] - 0.5) * cell
            assert np.abs(tiles[:, axis] - corner).min() < 1e-3 * side
        assert place[3] == pytest.approx(place[2]) and place[4] == 0.55
        page.locator("label", has_text="Show").locator("select").select_option("tiles")
        page.wait_for_function(
            "!document.querySelector('#attention-map image[href^=\"data:image/jpeg\"]')"
        )
        # The check is of what is chosen.
        assert "cosine with" in page.locator("#tab-attention figure").last.inner_text()
        page.click(".sentence >> nth=1")
        shown = page.locator("#tab-attention figure").last
        page.wait_for_function("""document.querySelector('#tab-attention figure').innerText
            .includes('log-probability a token')""")
        assert "below 0 is less readily" in shown.inner_text()
        assert looked.overflow() <= 0 and looked.problems == []


def test_the_data_tab_draws_a_real_check(browser: Any, trained: Path, tmp_path: Path) -> None:
    words = ["--config", str(trained / "config.yaml"), "--output", str(trained / "check")]
    main(["data", "check", *words])  # its exit code tells whether it has found errors
    told = json.loads((trained / "check/check.json").read_text())
    assert told["histograms"] and told["cohort"]["specimens"] == 20
    for width in (1280, 400):
        looked = Looked(browser, write_page([trained], tmp_path / "page.html"), width)
        looked.tab("data")
        shown = looked.page.locator("#tab-data")
        plots = shown.locator(".plot")
        assert plots.count() == len(told["histograms"]) + len(told["classes"])
        assert shown.locator(".bars .point, .points .point").count() > 0, "bars are drawn"
        text = shown.inner_text()
        for split in told["splits"]:
            assert split["name"] in text
        for finding in told["findings"]:
            assert finding["message"].split("\n")[0][:40] in text
        assert looked.overflow() <= 0
        path = screenshots(tmp_path) / f"data-checked-{width}.png"
        looked.page.screenshot(path=str(path), full_page=True)
        assert looked.problems == []


def test_search_map_and_specimens(browser: Any, run_folder: Path) -> None:
    looked = Looked(browser, write_page([run_folder]), 1280)
    page = looked.page
    looked.tab("specimens")
    page.fill("#search", "s0017 shows")
    page.wait_for_selector(".count:text-is('1\u20131 of 1')")
    page.click(".entry")
    assert page.locator(".detail h2").inner_text() == "S0017"
    assert "Specimen 17 shows" in page.locator(".detail .text").first.inner_text()
    missed = page.locator(".detail mark.missed").all_inner_texts()
    assert any("free" in text for text in missed), "the generated report says involved"
    assert any("involved" in t for t in page.locator(".detail mark.added").all_inner_texts())
    page.fill("#search", "there is no such word")
    page.wait_for_selector("text=Nothing fits this search")

    looked.tab("map")
    box = page.locator("#map-plot .points path").nth(3).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#tip:not([hidden])")
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("S00") and "shows" in tip
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("#tab-specimens:not([hidden])")
    assert page.locator(".detail h2").inner_text() == tip.split()[0]
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    assert looked.problems == []


def test_of_many_specimens_every_tab_says_that_it_has_a_part(
    browser: Any, tmp_path: Path, writer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specimens, "SHOWN", 20)
    looked = Looked(browser, write_page([writer(tmp_path / "run")]), 1280)
    for name in ("overview", "retrieval", "map", "specimens"):
        looked.tab(name)
        said = looked.page.locator(f"#tab-{name} .thinned").inner_text()
        assert said.startswith("20 of 60 specimens are on this page"), name
    assert "60 specimens, of which 20 are shown" in looked.page.text_content("#tab-overview")
    assert looked.page.text_content("#tab-specimens .count").endswith("of 20")
    assert not looked.problems


def test_hostile_texts_do_nothing(browser: Any, run_folder: Path) -> None:
    looked = Looked(browser, write_page([run_folder]), 1280)
    page = looked.page
    for tab in TABS:
        looked.tab(tab)
    looked.tab("specimens")
    page.click(".entry >> nth=0")
    assert "<img src=x onerror" in page.locator(".detail h2").inner_text(), "shown as text"
    looked.tab("map")
    page.mouse.move(*(lambda b: (b["x"] + 3, b["y"] + 3))(
        page.locator("#map-plot .points path").nth(0).bounding_box()))  # fmt: skip
    page.wait_for_selector("#tip:not([hidden])")
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("img, a[href^='javascript'], iframe, object, embed").count() == 0
    assert page.locator("script").count() == 3
    assert looked.problems == []


def test_two_runs(browser: Any, tmp_path: Path, writer: Callable[..., Path]) -> None:
    places = [writer(tmp_path / name / name) for name in "ab"]
    other = writer(tmp_path / "c" / "second", seed=5)
    looked = Looked(browser, write_page([places[0], other], tmp_path / "two.html"), 1280)
    for tab in TABS:
        looked.tab(tab)
        assert looked.overflow() <= 0, tab
        path = screenshots(tmp_path) / f"two-{tab}-1280.png"
        looked.page.screenshot(path=str(path), full_page=True)
    assert looked.page.locator("#tab-retrieval th", has_text="B \u2212 A").count() > 0
    assert (
        looked.page.locator("#tab-specimens .detail h3", has_text="Generated report").count() == 2
    )
    assert looked.problems == []
