"""Attention for the page of a run: its model on specimens of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slidevlm.app.attending import attend, faithfulness
from slidevlm.app.cohorts import open_cohort
from slidevlm.app.datasets import bag_dataset
from slidevlm.app.slide_model import load
from slidevlm.app.trained import same_data
from slidevlm.config import Config, with_values
from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.splits import Split, find, read_identifiers, some
from slidevlm.errors import ConfigError, DataError
from slidevlm.flags import read_yaml
from slidevlm.report.attended import attended
from slidevlm.report.content import RunFiles
from slidevlm.run import Bar, working

SEEDS = 5  # random choices of each share


@dataclass(frozen=True)
class Wanted:
    """Whose attention the page shows.

    Args:
        names: specimens; or one number: so many, spread over the test split (without one, over
            the last validation split). A number that is the name of a specimen is a name.
        device: None: see `slide_model.load`.
    """

    names: tuple[str, ...]
    device: str | None = None


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
    sentences = model.trained.model.decoder is not None
    bar, found = Bar("following attention", len(cases), shown=True), []
    try:
        for done, case in enumerate(cases):
            split = Split("attention", (case,), ("",))
            sample = bag_dataset(config, store, split, model.trained, training=False)[0]
            same_data(model.trained, sample.bag.features.shape[1], sample.bag.unit)
            seen = attend(model.trained, model.precision, sample, sentences=sentences)
            dropped = faithfulness(model.trained, model.precision, sample, seen.tiles, range(SEEDS))
            one = attended(
                seen.specimen, seen.positions, seen.slides, seen.tiles, seen.sentences,
                seen.by_sentence,
            )  # fmt: skip
            rows = [{k: round(v, 5) for k, v in asdict(row).items()} for row in dropped]
            found.append({**one, "unit": seen.unit, "check": rows})
            bar.update(done + 1)
    finally:
        bar.close()
    return {"model_hash": made_by, "seeds": SEEDS, "specimens": found}


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
