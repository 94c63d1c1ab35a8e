"""The page of a run: which files it is made of, and where it goes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from slidevlm.app.outputs import newest_predictions
from slidevlm.app.page_attention import Wanted, attention_of
from slidevlm.errors import ConfigError
from slidevlm.eval.stored import FILE
from slidevlm.report.content import RunFiles, content
from slidevlm.report.run_page import render
from slidevlm.run import METRICS, write_text

log = logging.getLogger("slidevlm")

PAGE = "report.html"


def plotly_source() -> str:
    """plotly.js, which the page carries with it.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            "a page with plots needs the extra: pip install 'slidevlm[report]'"
        ) from error
    return str(get_plotlyjs())


def run_files(place: Path) -> RunFiles:
    """The files of a run folder, or of one of its evaluations.

    A run shows its newest evaluation; the folder of an evaluation shows itself, with the training
    of the run that it lies in.

    Raises:
        ConfigError: neither, or nothing has been written of it but its settings.
    """
    if not place.is_dir():
        raise ConfigError(f"{place} is not the folder of a run or of an evaluation")
    predictions = newest_predictions(place)
    if predictions is None and not _has_curves(place):
        raise ConfigError(
            f"{place} has nothing to show: a run's folder has {METRICS}, into which training "
            f"logs its steps, an evaluation's {FILE}; give a folder in which "
            "`slidevlm train` or `slidevlm evaluate` has come that far"
        )
    folder = place.resolve()
    name = folder.name
    if folder.name.startswith("evaluation-") and (folder.parent / METRICS).is_file():
        folder, name = folder.parent, f"{folder.parent.name}/{folder.name}"
    checks = [place / "check.json", place / "check" / "check.json", folder / "check" / "check.json"]
    check = next((path for path in checks if path.is_file()), None)
    return RunFiles(name, folder, predictions, check)


def _has_curves(place: Path) -> bool:
    path = place / METRICS
    return path.is_file() and path.stat().st_size > 0


def write_page(
    places: Sequence[Path], output: Path | None = None, attention: Wanted | None = None
) -> Path:
    """Write the page of one run, or of two side by side; returns where.

    Args:
        places: folders of runs or evaluations, one or two.
        output: the file; `report.html` in the first folder where None.
        attention: the specimens whose attention is shown; it needs the runs' data.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    runs = [run_files(place) for place in places]
    plotly = plotly_source()
    path = places[0] / PAGE if output is None else output
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; give a file such as {path / PAGE}")
    seen = [] if attention is None else [attention_of(files, attention) for files in runs]
    found = content(runs, seen)
    for run in found["runs"]:
        table = run["specimens"]
        if table is not None and (whole := sum(table["of"])) > len(table["id"]):
            log.warning(
                "%s: %d of its %d specimens are on the page, at equal distances; metrics are of "
                "all, and predictions.csv has the others",
                run["name"],
                len(table["id"]),
                whole,
            )
    write_text(path, render(found, plotly))
    return path
