"""`slidevlm score`: reports against the true ones, without a model and without torch."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.data.reports import ID_COLUMNS, TEXT_COLUMNS, read_text_file, read_utf8
from slidevlm.documents import finite, json_of
from slidevlm.errors import ConfigError, DataError
from slidevlm.eval.bootstrap import Bootstrap
from slidevlm.eval.scores import Score
from slidevlm.eval.text_metrics.clinical import read_extractor
from slidevlm.eval.text_metrics.embedders import embedder
from slidevlm.eval.text_metrics.meteor_data import MeteorData, read_data
from slidevlm.eval.text_metrics.scoring import Scoring
from slidevlm.report.tables import score_table
from slidevlm.run import configure_logging, working, write_text

log = logging.getLogger("slidevlm")


@dataclass(frozen=True)
class Comparing:
    """What `slidevlm score` was asked for."""

    generated: Path
    references: Path | None  # None: they stand beside the generated ones
    bootstrap: Bootstrap
    clinical: Path | None
    meteor_data: Path | None
    embedder: str | None
    only_common: bool
    form: str
    output: Path | None
    as_json: bool = False


def score(asked: Comparing) -> dict[str, float]:
    """Score generated reports, print the table, perhaps write it as JSON.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    if asked.output == Path("-"):
        raise ConfigError("--output names a file; --json prints the scores to the terminal")
    if asked.output is not None and asked.output.exists():
        raise ConfigError(f"--output {asked.output} exists; choose another file or remove it")
    generated, references = _texts(asked)
    names = _matched(generated, references, asked)
    ours, theirs = [generated[n] for n in names], [references[n] for n in names]
    with working("scoring reports"):
        scoring = Scoring(
            extractor=read_extractor(asked.clinical),
            meteor=MeteorData() if asked.meteor_data is None else read_data(asked.meteor_data),
            embed=None if asked.embedder is None else embedder(asked.embedder, theirs),
        )
        counted = scoring.count(ours, theirs)
        values = counted.scores()
        drawn = asked.bootstrap.values(names, counted.values).values
    rows = [_row(name, value, drawn, asked.bootstrap, len(names)) for name, value in values.items()]
    if asked.output is not None:
        write_text(asked.output, _as_json(asked, rows))
    if asked.as_json:
        print(_as_json(asked, rows), end="")
        return values
    print(score_table(rows, asked.form, shutil.get_terminal_size().columns))
    if asked.output is not None:
        print(f"wrote {asked.output}")
    return values


def _row(
    name: str, value: float, drawn: dict[str, np.ndarray], bootstrap: Bootstrap, n: int
) -> Score:
    lo, hi = bootstrap.interval(drawn[name]) if name in drawn else (math.nan, math.nan)
    known = not math.isnan(lo)
    return Score("reports", name, value, lo if known else None, hi if known else None, n)


def _as_json(asked: Comparing, rows: Sequence[Score]) -> str:
    settings = {
        "generated": str(asked.generated),
        "references": str(asked.references or asked.generated),
        "bootstrap": asdict(asked.bootstrap),
        "clinical": None if asked.clinical is None else str(asked.clinical),
        "meteor_data": None if asked.meteor_data is None else str(asked.meteor_data),
        "embedder": asked.embedder,
    }
    scores = {r.metric: {"value": r.value, "lo": r.lo, "hi": r.hi} for r in rows}
    content = {"about": settings, "reports": rows[0].n if rows else 0, "scores": scores}
    return json.dumps(finite(content), indent=1) + "\n"


def _texts(asked: Comparing) -> tuple[dict[str, str], dict[str, str]]:
    """Generated and true texts by name."""
    if asked.references is not None:
        # Of a file with both sides, as a run writes them, the generated ones.
        generated = read_text_file(asked.generated, ("generated", *TEXT_COLUMNS))
        return generated, read_text_file(asked.references)
    path = asked.generated
    try:
        rows = json_of(read_utf8(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); give a second file of references") from None
    found: tuple[dict[str, str], dict[str, str]] = {}, {}
    for row in rows if isinstance(rows, list) else [None]:
        name, ours, theirs = _beside(row)
        if name is None or not isinstance(ours, str) or not isinstance(theirs, str):
            raise DataError(
                f"{path}: alone it must be a list of {{id, generated, report}}, such as the "
                "captions_test.json of a run; else give a second file of references"
            )
        known = found[0].setdefault(name, ours), found[1].setdefault(name, theirs)
        if known != (ours, theirs):
            raise DataError(f"{path} has two different entries for {name!r}; keep one")
    if not found[0]:
        raise DataError(f"{path} holds no reports")
    return found


def _beside(row: Any) -> tuple[str | None, Any, Any]:
    """Name, generated and true text of an entry that has both."""
    if not isinstance(row, dict):
        return None, None, None
    name = next((row[column] for column in ID_COLUMNS if column in row), None)
    if name is not None:
        name = f"{row['split']}/{name}" if "split" in row else str(name)
    return name, row.get("generated"), row.get("report")


def _matched(
    generated: dict[str, str], references: dict[str, str], asked: Comparing
) -> tuple[str, ...]:
    common = tuple(name for name in references if name in generated)
    if not common:
        raise DataError(
            f"{asked.generated} and {asked.references} have no name in common, such as "
            f"{next(iter(generated))!r} and {next(iter(references))!r}; the same specimens must "
            "have the same names"
        )
    lacking = [name for name in references if name not in generated]
    if lacking and not asked.only_common:
        raise DataError(
            f"{asked.generated} lacks {len(lacking)} of the {len(references)} specimens of "
            f"{asked.references}: {', '.join(lacking[:5])}; add them, or score those that are "
            "there with --only-common"
        )
    more = len(generated) - len(common)
    for number, what in ((len(lacking), "references"), (more, "generated reports")):
        if number:
            log.warning("%d %s have no counterpart and are left out", number, what)
    return common
