"""The page of a large run: its size, and the time until a browser can use it.

    python -m benchmarks.report_page [--specimens 2000] [--words 250]

Writes a run of synthetic predictions (reports of so many words, three tasks), makes its page, and
opens it in Chromium five times: milliseconds from the start of the navigation until the first tab
is drawn and answers clicks, and until the map and the specimens are there after a click.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from slidevlm.app.outputs import Outputs, about
from slidevlm.app.page import write_page
from slidevlm.app.rescoring import score_stored
from slidevlm.app.suite import Suite
from slidevlm.batch import Predictions
from slidevlm.config import Config, with_values
from slidevlm.eval.stored import Stored
from slidevlm.run import Run

_TASKS, _CLASSES, _WIDTH, _OPENINGS = 3, 8, 256, 5


def write_run(folder: Path, specimens: int, words: int) -> Path:
    """A run of synthetic predictions."""
    random = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    vocabulary = ["".join(random.choice(list("abcdefghiorstu"), 7)) for _ in range(3000)]

    def text() -> str:
        return " ".join(vocabulary[i] for i in random.integers(0, 3000, words)) + "."

    image = unit(random.normal(size=(specimens, _WIDTH)))
    names = tuple(f"CASE-{i:05d}" for i in range(specimens))
    split = Predictions(
        names, names, tuple(text() for _ in names), np.arange(specimens), image,
        unit(image + random.normal(size=image.shape)), 20.0, tuple(text() for _ in names),
    )  # fmt: skip
    classes = [f"class {i}" for i in range(_CLASSES)]
    files: dict[str, list[str]] = {"prompts": [], "labels": []}
    for task in range(_TASKS):
        labels = {
            n: classes[i]
            for n, i in zip(names, random.integers(0, _CLASSES, specimens), strict=True)
        }
        for kind, content in (("prompts", {c: [c] for c in classes}), ("labels", labels)):
            path = folder / f"{kind}_{task}" / f"task_{task}.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content))
            files[kind].append(str(path))
    config = with_values(
        Config(),
        {
            "zsc_class_prompt_mapping": tuple(files["prompts"]),
            "zsc_specimen_class_mapping": tuple(files["labels"]),
        },
    )
    origin = about(config, None, {"test": split})
    prompts = unit(random.normal(size=(_CLASSES, _WIDTH)))
    stored = Stored({"test": split}, {}, tuple(classes), prompts, origin)
    place = folder / "run"
    with Run(place) as run:
        results = score_stored(stored, config)
        Outputs(run, "", Suite(config).bootstrap).write("test", "synthetic", results, stored)
        for step in range(20_000):
            run.log("train", step, {"epoch": step / 1000, "contrastive_loss": 3 / (1 + step)})
    return place


def openings(page: Path) -> dict[str, float]:
    """Medians over openings, milliseconds."""
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {"ready": [], "map": [], "specimens": [], "search": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for _ in range(_OPENINGS):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready]")
            found["ready"].append(
                tab.evaluate("performance.getEntriesByName('ready')[0].startTime")
            )
            for name, drawn in (("map", "#map-plot .main-svg"), ("specimens", ".detail h2")):
                began = time.perf_counter()
                tab.click(f"#button-{name}")
                tab.locator(drawn).first.wait_for()
                found[name].append(1000 * (time.perf_counter() - began))
            began = time.perf_counter()
            tab.fill("#search", "case-01234")
            tab.wait_for_selector(".count:text-is('1\u20131 of 1')")
            found["search"].append(1000 * (time.perf_counter() - began))
            tab.close()
        browser.close()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--specimens", type=int, default=2000)
    parser.add_argument("--words", type=int, default=250)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), arguments.specimens, arguments.words)
        began = time.perf_counter()
        page = write_page([run])
        print(f"made in {time.perf_counter() - began:.1f} s, {page.stat().st_size / 1e6:.1f} MB")
        for name, value in openings(page).items():
            print(f"{name}: {value:.0f} ms")


if __name__ == "__main__":
    main()
