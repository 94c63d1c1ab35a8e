"""Seeing what a run has learnt: `slidevlm report`, its page, and `slidevlm attention`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.app.attending import (
    Attention,
    Changed,
    Dropped,
    Faithfulness,
    attend,
    faithfulness,
)
from slidevlm.app.bags import sample_of
from slidevlm.app.page import write_page
from slidevlm.app.page_attention import SEEDS, Wanted
from slidevlm.app.slide_model import SlideModel
from slidevlm.app.thumbnails import Thumbnail, thumbnail
from slidevlm.app.using import Cohort, Using
from slidevlm.data.cases import Case
from slidevlm.data.dataset import Failure
from slidevlm.data.splits import some
from slidevlm.documents import Table, json_of
from slidevlm.errors import ConfigError, DataError
from slidevlm.report.tables import render
from slidevlm.report.tile_maps import geojson, least_distance, picture, png
from slidevlm.run import Bar, configure_logging, write_text

log = logging.getLogger("slidevlm")

_THUMBNAIL = 1024  # pixels along its longer side


@dataclass(frozen=True)
class Reporting:
    """What `slidevlm report` was asked for."""

    run: Path
    other: Path | None
    output: Path | None
    attention: tuple[str, ...]  # specimens, or one number; none: without
    device: str | None
    slide_files: tuple[str, ...]
    mpp: float | None
    as_json: bool


def report(asked: Reporting) -> Path:
    """Write the page and say where it is.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    places = [asked.run] if asked.other is None else [asked.run, asked.other]
    wanted = None
    if asked.attention:
        wanted = Wanted(asked.attention, asked.device, asked.slide_files, asked.mpp)
    path = write_page(places, asked.output, wanted)
    if asked.as_json:
        print(json.dumps({"page": str(path), "bytes": path.stat().st_size}))
        return path
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MB); open it in a browser")
    return path


@dataclass(frozen=True)
class Attending:
    """What `slidevlm attention` was asked for."""

    using: Using
    output: Path
    specimen: str | None
    sentence_wise: bool
    slide_file: Path | None
    mpp: float | None
    tile_size: float | None
    seed: int
    as_json: bool


@dataclass(frozen=True)
class _Seen:
    """What was written of one specimen."""

    specimen: str
    files: list[Path]
    dropped: list[Dropped]
    sentences: tuple[str, ...]
    changed: list[list[Changed]]  # of each sentence
    unplaced: bool  # positions in micrometres and nothing that makes pixels of them


def attention(asked: Attending) -> list[Path]:
    """Write the files of the attention in each specimen; returns them.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    slide = None
    if asked.slide_file is not None:
        slide = thumbnail(asked.slide_file, _THUMBNAIL, "--slide-file")
    model, cohort = asked.using.load(), Cohort(asked.using)
    cases = _chosen(cohort, asked)
    names = _file_names(cohort.store.cases)  # of all, so that they do not depend on the choice
    about = _about(asked, model)
    there = {case.specimen: _known(asked, about, case, names[case.specimen]) for case in cases}
    if any(there.values()):
        count = sum(seen is not None for seen in there.values())
        log.info("%d of %d specimens are done already", count, len(cases))
    bar, done = Bar("following attention", len(cases), shown=True), list[_Seen]()
    try:
        for number, case in enumerate(cases):
            seen = there[case.specimen] or _follow(
                asked, model, cohort, case, slide, about, names[case.specimen]
            )
            done += [] if seen is None else [seen]
            bar.update(number + 1)
    finally:
        bar.close()
    if not done:
        raise DataError(f"{asked.using.source}: no specimen could be read; the warnings say why")
    files = [file for seen in done for file in seen.files]
    if asked.as_json:
        rows = [
            {
                "specimen": seen.specimen,
                "files": [str(f) for f in seen.files],
                "faithfulness": [asdict(one) for one in seen.dropped],
                "sentences": list(seen.sentences),
                "sentence_faithfulness": [[asdict(c) for c in rows] for rows in seen.changed],
            }
            for seen in done
        ]
        bad = dict(cohort.bad.messages)
        print(json.dumps({"specimens": rows, "bad": bad, "model": model.hash}, indent=1))
        return files
    print(_shown(_mean([seen.dropped for seen in done]), len(done)))
    if len(done) == 1 and done[0].sentences:
        print(_shown_sentences(done[0]))
    print(
        f"wrote {len(files)} files of {len(done)} specimens into {asked.output}"
        if len(done) > 1
        else "\n".join(f"wrote {file}" for file in files)
    )
    if any(seen.unplaced for seen in done):
        print("no QuPath annotations: positions are in micrometres; give --mpp or --slide-file")
    return files


def _follow(
    asked: Attending,
    model: SlideModel,
    cohort: Cohort,
    case: Case,
    slide: Thumbnail | None,
    about: dict[str, Any],
    name: str,
) -> _Seen | None:
    """One specimen; None where it is bad and bad ones are left out."""
    using, trained, precision = asked.using, model.trained, model.precision
    try:
        sample = sample_of(
            trained, cohort.store, case, str(using.source), using.image_features_cutoff
        )
    except DataError as error:
        cohort.bad.add(Failure(str(error), case.specimen))
        return None
    found = attend(trained, precision, sample, sentences=asked.sentence_wise)
    if slide is not None and len(set(found.slides.tolist())) > 1:
        raise DataError(
            f"specimen {found.specimen!r} is of several slides, and --slide-file is one; give the "
            "features of that slide alone"
        )
    seeds = range(asked.seed, asked.seed + SEEDS)
    checked = faithfulness(trained, precision, sample, found, seeds)
    unplaced = found.positions is not None and _pixels(asked, found, slide) is None
    return _write(asked, found, checked, slide, {**about, "no_annotations": unplaced}, name)


def _about(asked: Attending, model: SlideModel) -> dict[str, Any]:
    """What the files of a specimen depend on."""
    using = asked.using
    slide = None if asked.slide_file is None else str(asked.slide_file.resolve())
    return {
        "model": model.hash,
        "settings": {
            "source": str(using.source.resolve()),
            "image_features_cutoff": using.image_features_cutoff,
            "precision": model.computes_in,
            "sentence_wise": asked.sentence_wise,
            "slide_file": slide,
            "mpp": asked.mpp,
            "tile_size": asked.tile_size,
            "seed": asked.seed,
        },
    }


def _known(asked: Attending, about: dict[str, Any], case: Case, name: str) -> _Seen | None:
    """What an earlier call has written of a specimen; its JSON file is the last to be there.

    Raises:
        ConfigError: it was made otherwise.
    """
    path = asked.output / f"{name}.json"
    try:
        there = json_of(path.read_text(encoding="utf-8"))
        before = {"specimen": there["specimen"], "model": there["model"], **there["settings"]}
        files = [asked.output / file for file in there["files"]]
        seen = _Seen(
            there["specimen"],
            files,
            [Dropped(**row) for row in there["faithfulness"]],
            tuple(there["sentences"]),
            [[Changed(**row) for row in rows] for rows in there["sentence_faithfulness"]],
            there["no_annotations"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not of slidevlm attention, or of another version ({error!r}); remove it or "
            "choose another --output"
        ) from error
    now = {"specimen": case.specimen, "model": about["model"], **about["settings"]}
    differs = [key for key in now if now[key] != before.get(key)]
    if differs:
        raise ConfigError(
            f"{path} was made with another {', another '.join(differs)}; remove it or choose "
            "another --output"
        )
    return seen if all(file.is_file() for file in files) else None


def _chosen(cohort: Cohort, asked: Attending) -> list[Case]:
    cases = cohort.cases
    if asked.specimen is not None:
        cases = [case for case in cases if case.specimen == asked.specimen]
        if not cases:
            of_patient = [c.specimen for c in cohort.cases if c.patient == asked.specimen]
            hint = f"; that is a patient, who has {some(of_patient, 3)}" if of_patient else ""
            raise DataError(
                f"{asked.using.source} has no specimen {asked.specimen!r} with features{hint}"
            )
    if asked.slide_file is not None and len(cases) > 1:
        names = some((case.specimen for case in cases), 3)
        raise DataError(
            f"{asked.using.source} has {len(cases)} specimens ({names}), and --slide-file is of "
            "one; choose it with --specimen"
        )
    return cases


def _file_names(cases: Sequence[Case]) -> dict[str, str]:
    """Specimen -> what its files are called; names that would be the same get a number."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for case in cases:
        plain = re.sub(r"[^\w.-]+", "_", case.specimen)[:100] or "bag"
        name, number = plain, 2
        while name.lower() in taken:  # some disks do not tell a from A
            name, number = f"{plain}_{number}", number + 1
        taken.add(name.lower())
        found[case.specimen] = name
    return found


def _mean(several: Sequence[Sequence[Dropped]]) -> list[Dropped]:
    """Over specimens, share by share."""
    return [
        Dropped(**{k: sum(asdict(one)[k] for one in row) / len(row) for k in asdict(row[0])})
        for row in zip(*several, strict=True)
    ]


def _pixels(asked: Attending, found: Attention, slide: Thumbnail | None) -> float | None:
    """Level-0 pixels a unit of the positions; None where nothing tells."""
    if found.unit == "px":
        return 1.0
    mpp = asked.mpp or (None if slide is None else slide.mpp)
    return None if mpp is None else 1 / mpp


def _write(
    asked: Attending,
    found: Attention,
    checked: Faithfulness,
    slide: Thumbnail | None,
    about: dict[str, Any],
    name: str,
) -> _Seen:
    """All files of a specimen, the one that tells of the others last."""
    asked.output.mkdir(parents=True, exist_ok=True)
    measures = {"attention": found.tiles}
    measures |= {f"sentence_{i + 1}": row for i, row in enumerate(found.by_sentence)}
    files = [asked.output / f"{name}.csv", asked.output / f"{name}.json"]
    write_text(files[0], _csv(found, measures))
    if found.positions is not None:
        files += _drawn(asked, found, found.positions, measures, slide, name)
    content: dict[str, Any] = {
        "specimen": found.specimen,
        **about,
        "tiles": len(found.tiles),
        "what": "attention rollout: where the model reads, not why it decides",
        "files": [file.name for file in files],
        "faithfulness": [asdict(one) for one in checked.slide],
        "sentences": list(found.sentences),
        "sentence_faithfulness": [[asdict(one) for one in rows] for rows in checked.sentences],
    }
    write_text(files[1], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    unplaced = bool(about["no_annotations"])
    return _Seen(found.specimen, files, checked.slide, found.sentences, checked.sentences, unplaced)


def _drawn(
    asked: Attending,
    found: Attention,
    positions: np.ndarray,
    measures: dict[str, np.ndarray],
    slide: Thumbnail | None,
    name: str,
) -> list[Path]:
    """Pictures and annotations of each slide."""
    files: list[Path] = []
    pixels = _pixels(asked, found, slide)
    if slide is not None and pixels is None:
        raise DataError(
            f"positions are in micrometres and {asked.slide_file} does not say how many a pixel "
            "has; give --mpp"
        )
    for number in np.unique(found.slides).tolist():
        mine = found.slides == number
        places = positions[mine].astype(np.float64)
        size = asked.tile_size or least_distance(places)
        of = "" if found.slides.max() == 0 else f"_slide_{number + 1}"
        for measure, weights in measures.items():
            drawn = picture(places, size, weights[mine])
            if slide is not None and pixels is not None:
                drawn = picture(places, size, weights[mine], slide.pixels, pixels * slide.scale)
            files.append(asked.output / f"{name}{of}_{measure}.png")
            files[-1].write_bytes(png(drawn))
        if pixels is not None:
            files.append(asked.output / f"{name}{of}.geojson")
            picked = {k: v[mine] for k, v in measures.items()}
            write_text(files[-1], geojson(places * pixels, size * pixels, picked))
    return files


def _csv(found: Attention, measures: dict[str, np.ndarray]) -> str:
    table = Table()
    table.writerow(["tile", "slide", "x", "y", *measures])
    for i in range(len(found.tiles)):
        place = ["", ""] if found.positions is None else found.positions[i].tolist()
        values = [f"{row[i]:.6g}" for row in measures.values()]
        table.writerow([i, int(found.slides[i]), *place, *values])
    return table.text()


def _shown(dropped: list[Dropped], specimens: int) -> str:
    rows = [
        (f"{100 * d.share:.0f} %", *(f"{v:.3f}" for v in (d.most_attended, d.random_mean)),
         f"{d.random_least:.3f} to {d.random_most:.3f}", f"{d.least_attended:.3f}")
        for d in dropped
    ]  # fmt: skip
    header = ("dropped", "most attended", "random", "its range", "least attended")
    lines = render(header, rows, "markdown", 100)
    of = f" (mean of {specimens} specimens)" if specimens > 1 else ""
    title = "cosine of the slide embedding with that of all tiles, after dropping tiles"
    return f"{title}{of}:\n{lines}"


def _shown_sentences(seen: _Seen) -> str:
    """Each sentence at half of the tiles, or the nearest share."""
    at = min(range(len(seen.dropped)), key=lambda i: abs(seen.dropped[i].share - 0.5))
    rows = []
    for text, changed in zip(seen.sentences, seen.changed, strict=True):
        one = changed[at]
        random = f"{one.random_least:+.3f} to {one.random_most:+.3f}"
        short = text if len(text) <= 50 else text[:49] + "\u2026"
        rows.append((short, f"{one.most_attended:+.3f}", f"{one.random_mean:+.3f}", random))
    header = ("sentence", "its most attended", "random", "its range")
    share = f"{100 * seen.dropped[at].share:.0f} %"
    title = "change of a sentence's mean log-probability a token, after dropping"
    return f"\n{title} {share} of the tiles:\n{render(header, rows, 'markdown', 100)}"
