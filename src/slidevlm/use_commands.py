"""The commands that use a model without writing reports: embed and classify."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.app.slide_model import SlideModel
from slidevlm.app.using import (
    Cohort,
    Record,
    Results,
    Using,
    collect,
    tell,
    to_terminal,
)
from slidevlm.batch import Batch
from slidevlm.data.formats.embeddings import (
    Embeddings,
    check_form,
    load_embeddings,
    save_embeddings,
)
from slidevlm.documents import Table
from slidevlm.errors import ConfigError, DataError
from slidevlm.eval.prompts import Prompts, prompts_of, read_prompts
from slidevlm.run import configure_logging, write_text

# -- embed -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedding:
    """What `slidevlm embed` was asked for."""

    using: Using
    as_json: bool = False


def embed(asked: Embedding) -> int:
    """Embed every specimen; the number of embeddings in the output.

    Those that the output has already, by the same model and of the same source, stay.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    using = asked.using
    if using.output is not None:
        check_form(using.output)
    model = using.load()
    cohort = Cohort(using)
    about = _about(using, model)
    kept = {**about, **cohort.origin}

    # Digits for readers, a third of their room for the partial file.
    form: Callable[[np.ndarray], Any] = np.ndarray.tolist if using.output is None else _as_text

    def use(batch: Batch, keep: Callable[[Record], None]) -> None:
        rows = model.embed_bags(batch.bags)
        parts = (batch.specimen_ids, batch.patient_ids, batch.bags.lengths, rows)
        for specimen, patient, tiles, row in zip(*parts, strict=True):
            keep({"id": specimen, "patient": patient, "tiles": tiles, "embedding": form(row)})

    if using.output is None:
        return to_terminal(using, model, cohort, "embedding", about, use)
    known = _known(using.output, kept)
    results, partial = collect(using, model, cohort, "embedding", about, use, known)
    if results.new or len(results.records) > len(known) or not using.output.exists():
        save_embeddings(using.output, _embeddings(results, using, kept))
    partial.path.unlink()
    tell(using.output, results, cohort, model, "embeddings", as_json=asked.as_json)
    return len(results.records)


def _about(using: Using, model: SlideModel) -> dict[str, Any]:
    return {
        "model": model.hash,
        "image_features_cutoff": using.image_features_cutoff,
        "precision": model.computes_in,
    }


def _as_text(row: np.ndarray) -> str:
    """[E] float32 exactly, in a third of the room of digits."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")


def _row(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def _known(output: Path, about: Mapping[str, Any]) -> list[Record]:
    """Records of an output that is there.

    Raises:
        ConfigError: it was made otherwise.
        DataError: it is no such file.
    """
    if not output.exists():
        return []
    there = load_embeddings(output)
    differs = [
        key
        for key in dict.fromkeys([*about, *there.about])
        if about.get(key) != there.about.get(key)
    ]
    if differs:
        raise ConfigError(
            f"--output {output} exists and was made with another {', another '.join(differs)}; "
            "choose another file or remove it"
        )
    parts = (there.specimen_ids, there.patient_ids, there.tiles.tolist(), there.image_embedding)
    return [
        {"id": specimen, "patient": patient, "tiles": tiles, "embedding": _as_text(row)}
        for specimen, patient, tiles, row in zip(*parts, strict=True)
    ]


def _embeddings(results: Results, using: Using, about: dict[str, Any]) -> Embeddings:
    records = results.records
    if not records:
        raise DataError(f"{using.source}: no specimen could be read; the warnings say why")
    rows = np.empty((len(records), len(_row(records[0]["embedding"]))), np.float32)
    for row, record in zip(rows, records, strict=True):
        row[:] = _row(record["embedding"])
    return Embeddings(
        tuple(r["id"] for r in records),
        tuple(r["patient"] for r in records),
        np.array([r["tiles"] for r in records], np.int64),
        rows,
        about,
    )


# -- classify --------------------------------------------------------------------------------

FORMS = (".csv", ".json")


@dataclass(frozen=True)
class Classifying:
    """What `slidevlm classify` was asked for."""

    using: Using
    prompts: tuple[str, ...]  # a file of prompts, or texts that are each a class
    ensemble: str
    as_json: bool = False


def classify(asked: Classifying) -> int:
    """Write the probability of each class for every specimen; the number of specimens.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    using = asked.using
    using.check_output(FORMS)
    prompts = _prompts(asked.prompts)
    model = using.load()
    cohort = Cohort(using)
    texts = model.class_texts(prompts, asked.ensemble)
    about = {
        **_about(using, model),
        "prompts": dict(zip(prompts.classes, map(list, prompts.texts), strict=True)),
        "ensemble": asked.ensemble,
    }

    def use(batch: Batch, keep: Callable[[Record], None]) -> None:
        chances = model.probabilities(model.embed_bags(batch.bags), texts)
        for specimen, row in zip(batch.specimen_ids, chances, strict=True):
            label = texts.classes[int(row.argmax())]
            found = dict(zip(texts.classes, row.tolist(), strict=True))
            keep({"id": specimen, "label": label, "probabilities": found})

    if using.output is None:
        return to_terminal(using, model, cohort, "classifying", {"model": model.hash}, use)
    results, partial = collect(using, model, cohort, "classifying", about, use)
    write_text(using.output, _formatted(results.records, about, using.output))
    partial.path.unlink()
    tell(using.output, results, cohort, model, "classifications", as_json=asked.as_json)
    return len(results.records)


def _prompts(given: Sequence[str]) -> Prompts:
    if not given:
        raise ConfigError("--prompts names the classes; give a file of them, or two or more texts")
    if len(given) > 1:
        return prompts_of(given)
    if not Path(given[0]).is_file():
        raise ConfigError(
            f"--prompts: no file {given[0]!r} (looked in {Path.cwd()}); give a file of classes and "
            "their prompts, or two or more texts that are each a class"
        )
    return read_prompts(Path(given[0]))


def _formatted(records: Sequence[Record], about: Mapping[str, Any], output: Path) -> str:
    """JSON: `about` and the specimens. CSV: a column a class; the first row tells the origin."""
    if output.suffix.lower() == ".json":
        return (
            json.dumps({"about": about, "specimens": records}, indent=1, ensure_ascii=False) + "\n"
        )
    classes = list(about["prompts"])
    table = Table()
    table.writerow(["id", "label", *(f"probability/{c}" for c in classes), "about"])
    origin = json.dumps(about, ensure_ascii=False)
    for r in records:
        table.writerow([r["id"], r["label"], *(r["probabilities"][c] for c in classes), origin])
        origin = ""
    return table.text()
