"""Attention for the page of a run: its model on specimens of its data."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slidevlm.app.attending import Attention, Changed, Dropped, attend, faithfulness
from slidevlm.app.cohorts import open_cohort
from slidevlm.app.datasets import bag_dataset
from slidevlm.app.slide_model import load
from slidevlm.app.thumbnails import files_of, jpeg, thumbnail
from slidevlm.app.trained import same_data
from slidevlm.config import Config, with_values
from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.splits import Split, find, read_identifiers, some
from slidevlm.errors import ConfigError, DataError
from slidevlm.flags import read_yaml
from slidevlm.report.attended import attended, beneath
from slidevlm.report.content import RunFiles
from slidevlm.run import Bar, working

FLAG = "--slide-files"
_SIDE = 800  # pixels of a thumbnail along its longer side
_BYTES = 120_000  # of its JPEG

log = logging.getLogger("slidevlm")

SEEDS = 5  # random choices of each share


@dataclass(frozen=True)
class Wanted:
    """Whose attention the page shows.

    Args:
        names: specimens; or one number: so many, spread over the test split (without one, over
            the last validation split). A number that is the name of a specimen is a name.
        device: None: see `slide_model.load`.
        slide_files: files of the slides, or folders of them, for the pictures under the tiles.
        mpp: micrometres a level-0 pixel of them; None: what they say.
    """

    names: tuple[str, ...]
    device: str | None = None
    slide_files: tuple[str, ...] = ()
    mpp: float | None = None


def attention_of(files: RunFiles, wanted: Wanted) -> dict[str, Any]:
    """Attention and its check, for `report.content`.

    Model and data are those of the evaluation that the page shows, as its config.yaml has them.

    Raises:
        ConfigError: no config.yaml, or a model without attention over tiles.
        DataError: the data are not where config.yaml says, or lack a specimen.
    """
    path, config = _settings(files)
    source = str(files.folder)
    resume = config.checkpoint.resume
    if config.evaluation.test and resume != "latest":  # of weights that came from elsewhere
        source = resume or config.model.pretrained or source
    with working("reading the model"):
        model = load(source, device=wanted.device)
        made_by = model.hash
    try:
        store = open_cohort(config)
        cases = _chosen(store, config, wanted.names)
    except (ConfigError, DataError) as error:
        raise DataError(f"--attention reads the data that {path} names: {error}") from error
    names = [case.specimen for case in cases]
    slides = files_of(wanted.slide_files, names, FLAG) if wanted.slide_files else {}
    if wanted.slide_files and len(slides) < len(names):
        lacking = [name for name in names if name not in slides]
        log.warning("no slide file is called %s: shown without a picture", some(lacking, 5))
    sentences = model.trained.model.decoder is not None
    bar, found = Bar("following attention", len(cases), shown=True), []
    try:
        for done, case in enumerate(cases):
            split = Split("attention", (case,), ("",))
            sample = bag_dataset(config, store, split, model.trained, training=False)[0]
            same_data(model.trained, sample.bag.features.shape[1], sample.bag.unit, case.specimen)
            seen = attend(model.trained, model.precision, sample, sentences=sentences)
            checked = faithfulness(model.trained, model.precision, sample, seen, range(SEEDS))
            one = attended(
                seen.specimen, seen.positions, seen.slides, seen.tiles, seen.sentences,
                seen.by_sentence,
            )  # fmt: skip
            if case.specimen in slides:
                _lay_under(one, seen, slides[case.specimen], wanted.mpp)
            checks = {
                "check": _rounded(checked.slide),
                "sentence_checks": [_rounded(rows) for rows in checked.sentences],
            }
            found.append({**one, "unit": seen.unit, **checks})
            bar.update(done + 1)
    finally:
        bar.close()
    return {"model_hash": made_by, "seeds": SEEDS, "specimens": found}


def _rounded(rows: Sequence[Dropped] | Sequence[Changed]) -> list[dict[str, float]]:
    return [{k: round(v, 5) for k, v in asdict(row).items()} for row in rows]


def _lay_under(one: dict[str, Any], seen: Attention, path: Path, mpp: float | None) -> None:
    """Give the slide of `attended`'s result the thumbnail that lies under its cells."""
    if len(one["slides"]) != 1 or seen.positions is None:
        what = "has no positions" if seen.positions is None else "is of several slides"
        raise DataError(f"{FLAG} {path}: specimen {seen.specimen!r} {what}; leave its file out")
    slide = thumbnail(path, _SIDE, FLAG)
    mpp = mpp or slide.mpp
    if seen.unit == "um" and mpp is None:
        raise DataError(
            f"positions are in micrometres and {path} does not say how many a pixel has; give --mpp"
        )
    unit = mpp if seen.unit == "um" and mpp is not None else 1.0  # of a level-0 pixel
    data = base64.b64encode(jpeg(slide.pixels, _BYTES)).decode()
    one["slides"][0]["thumbnail"] = {
        "src": f"data:image/jpeg;base64,{data}",
        **beneath(
            one["slides"][0]["size"], seen.positions, slide.width * unit, slide.height * unit
        ),
    }


def _settings(files: RunFiles) -> tuple[Path, Config]:
    """The config.yaml of the shown evaluation, else of the run."""
    places = [files.folder] if files.predictions is None else [files.predictions.parent]
    path = next((p for place in (*places, files.folder) if (p := place / "config.yaml").is_file()),
                None)  # fmt: skip
    if path is None:
        raise ConfigError(
            f"--attention needs config.yaml in {files.folder}, which says where the data are; "
            "`slidevlm attention` takes a model and features"
        )
    values = {k: v for k, v in read_yaml(path).items() if k != "device"}
    return path, with_values(Config(), values)


def _chosen(store: CaseStore, config: Config, names: Sequence[str]) -> tuple[Case, ...]:
    found = find(names, store)
    if len(names) > 1 or not names[0].isdecimal() or not found.missing:
        if found.missing:
            raise DataError(f"no specimen {some(found.missing, 3)} with features")
        return found.cases
    path = config.data.test_split or next(reversed(config.data.val_split or ()), None)
    if path is None:
        raise ConfigError("neither test nor validation split; name specimens: --attention ID ...")
    cases, count = find(read_identifiers(path), store).cases, int(names[0])
    if not cases:
        raise DataError(f"no specimen of {path} has features")
    count = min(count, len(cases))
    # Spread over the split rather than its first ones, which may be of one hospital.
    return tuple(cases[i * len(cases) // count] for i in range(count))
