"""The demo from nothing to results, as a user starts it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from slidevlm.cli import main
from slidevlm.flags import parse_config

SHORT = ("--specimens", "20", "--epochs", "1", "--workers", "0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the demo went, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["demo", str(folder), *SHORT]) == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_the_page_in_a_browser(browser: Any, made: tuple[Path, str], tmp_path: Path) -> None:
    """Plots, search, hover, no complaint, no overflow."""
    folder, _ = made
    path = folder / "runs/demo/report.html"
    pictures = Path(os.environ.get("SLIDEVLM_SCREENSHOTS", tmp_path / "screenshots"))
    wanted = sorted((folder / "cohort/test.txt").read_text().split())[0]
    for width in (1280, 400):
        page = browser.new_page(viewport={"width": width, "height": 900})
        problems: list[str] = []
        page.on("console", lambda m, told=problems: told.append(m.text))
        page.on("pageerror", lambda e, told=problems: told.append(str(e)))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        for button in page.locator("#tabs button").all():
            button.click()
            name = (button.get_attribute("id") or "").removeprefix("button-")
            for plot in page.locator(f"#tab-{name} .plot").all():
                plot.scroll_into_view_if_needed()
                plot.locator(".main-svg").first.wait_for()
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{name} is wider than {width}"
            page.screenshot(path=pictures / f"demo-{name}-{width}.png", full_page=True)
        page.click("#button-specimens")
        page.fill("#search", wanted)
        page.wait_for_selector(".count:text-is('1\u20131 of 1')")
        assert page.locator(".entry .entry-id").inner_text().startswith(wanted)
        page.click("#button-map")
        page.locator("#map-plot .points path").first.hover(force=True)
        page.wait_for_selector("#tip:not([hidden])")
        assert len(page.locator("#tip p").first.inner_text()) > 20, "hover shows the report"
        assert problems == []
        page.close()


@pytest.mark.slow
def test_from_nothing_to_results(
    made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, shown = made
    for line in re.findall(rf"^  ({re.escape(str(folder))}\S+) ", shown, re.MULTILINE):
        assert Path(line).exists(), "every place that it names is there"
    run = folder / "runs/demo"
    for name in (
        "report.html",
        "test.md",
        "captions_test.json",
        "metrics.jsonl",
        "config.yaml",
        "checkpoints",
    ):
        assert f"{run}/{name}" in shown
    result = json.loads((run / "test.json").read_text())["metrics"]
    for task in ("diagnosis", "grade", "margin"):
        assert 0 <= result[f"test/zero_shot/{task}/balanced_accuracy"] <= 1
    assert 0 < result["test/image_to_text/R@10"] <= 1
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in told if line["kind"] == "evaluation"] == [1.0]
    tests = set((folder / "cohort/test.txt").read_text().split())
    assert {w["id"] for w in json.loads((run / "captions_test.json").read_text())} == tests
    again, _ = parse_config(["--config", str(run / "config.yaml")])
    assert (again.optim.epochs, again.evaluation.val_gen_top_k) == (1, 1)

    before = (run / "test.json").read_bytes()
    assert main(["demo", str(folder), *SHORT]) == 2, "a second demo does not write over the first"
    assert "remove it or give another folder" in capsys.readouterr().err
    assert (run / "test.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--specimens", "19"], "--specimens must be at least 20, not 19"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--workers", "-1"], "--workers must be at least 0, not -1"),
        (["--specimen", "30"], "did you mean --specimens"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["demo", str(tmp_path / "demo"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_cohort_alone_has_the_same_ranges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "synthesize", str(tmp_path / "cohort"), "--seed", "-1"]) == 2
    assert "--seed must be at least 0, not -1" in capsys.readouterr().err
    assert not (tmp_path / "cohort").exists()
