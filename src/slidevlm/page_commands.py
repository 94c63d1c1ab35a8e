"""Seeing what a run has learnt: `slidevlm report`, its page, and `slidevlm attention`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.app.attending import Attention, Dropped, attend, faithfulness
from slidevlm.app.bags import sample_of
from slidevlm.app.page import write_page
from slidevlm.app.page_attention import SEEDS, Wanted
from slidevlm.app.slide_model import SlideModel
from slidevlm.app.using import Cohort, Using
from slidevlm.data.cases import Case
from slidevlm.data.dataset import Failure
from slidevlm.data.splits import some
from slidevlm.errors import ConfigError, DataError
from slidevlm.report.tables import render
from slidevlm.report.tile_maps import geojson, least_distance, picture, png
from slidevlm.run import Bar, configure_logging, write_text

_THUMBNAIL = 1024  # pixels along its longer side


@dataclass(frozen=True)
class Reporting:
    """What `slidevlm report` was asked for."""

    run: Path
    other: Path | None
    output: Path | None
    attention: tuple[str, ...]  # specimens, or one number; none: without
    device: str | None
    as_json: bool


def report(asked: Reporting) -> Path:
    """Write the page and say where it is.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    places = [asked.run] if asked.other is None else [asked.run, asked.other]
    wanted = Wanted(asked.attention, asked.device) if asked.attention else None
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
class _Slide:
    """A slide file's thumbnail."""

    pixels: np.ndarray  # [h, w, 3] uint8
    scale: float  # pixels of the thumbnail a level-0 pixel
    mpp: float | None


@dataclass(frozen=True)
class _Seen:
    """What was written of one specimen."""

    specimen: str
    files: list[Path]
    dropped: list[Dropped]
    unplaced: bool  # positions in micrometres and nothing that makes pixels of them


def attention(asked: Attending) -> list[Path]:
    """Write the files of the attention in each specimen; returns them.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    slide = None if asked.slide_file is None else _thumbnail(asked.slide_file)
    model, cohort = asked.using.load(), Cohort(asked.using)
    cases = _chosen(cohort, asked)
    names = _file_names(cases)
    bar, done = Bar("following attention", len(cases), shown=True), list[_Seen]()
    try:
        for number, case in enumerate(cases):
            seen = _follow(asked, model, cohort, case, slide, names[case.specimen])
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
            }
            for seen in done
        ]
        bad = dict(cohort.bad.messages)
        print(json.dumps({"specimens": rows, "bad": bad, "model": model.hash}, indent=1))
        return files
    print(_shown(_mean([seen.dropped for seen in done]), len(done)))
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
    slide: _Slide | None,
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
    dropped = faithfulness(trained, precision, sample, found.tiles, seeds)
    files = _write(asked, found, dropped, slide, model.hash, name)
    unplaced = found.positions is not None and _pixels(asked, found, slide) is None
    return _Seen(found.specimen, files, dropped, unplaced)


def _chosen(cohort: Cohort, asked: Attending) -> list[Case]:
    cases = cohort.cases
    if asked.specimen is not None:
        cases = [case for case in cases if case.specimen == asked.specimen]
        if not cases:
            raise DataError(
                f"{asked.using.source} has no specimen {asked.specimen!r} with features"
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


def _thumbnail(path: Path) -> _Slide:
    try:
        import openslide
    except ImportError as error:
        raise ConfigError("--slide-file needs the extra: pip install 'slidevlm[slide]'") from error
    try:
        with openslide.OpenSlide(str(path)) as slide:
            width, height = slide.dimensions
            image = slide.get_thumbnail((_THUMBNAIL, _THUMBNAIL)).convert("RGB")
            mpp = slide.properties.get("openslide.mpp-x")
    except (openslide.OpenSlideError, OSError) as error:
        raise DataError(f"--slide-file {path} cannot be read by OpenSlide ({error})") from error
    scale = max(image.size) / max(width, height)
    return _Slide(np.asarray(image), scale, float(mpp) if mpp else None)


def _pixels(asked: Attending, found: Attention, slide: _Slide | None) -> float | None:
    """Level-0 pixels a unit of the positions; None where nothing tells."""
    if found.unit == "px":
        return 1.0
    mpp = asked.mpp or (None if slide is None else slide.mpp)
    return None if mpp is None else 1 / mpp


def _write(
    asked: Attending,
    found: Attention,
    dropped: list[Dropped],
    slide: _Slide | None,
    model: str,
    name: str,
) -> list[Path]:
    asked.output.mkdir(parents=True, exist_ok=True)
    measures = {"attention": found.tiles}
    measures |= {f"sentence_{i + 1}": row for i, row in enumerate(found.by_sentence)}
    files = [asked.output / f"{name}.csv", asked.output / f"{name}.json"]
    write_text(files[0], _csv(found, measures))
    about: dict[str, Any] = {
        "specimen": found.specimen,
        "model": model,
        "tiles": len(found.tiles),
        "what": "attention rollout: where the model reads, not why it decides",
        "sentences": list(found.sentences),
        "faithfulness": [asdict(one) for one in dropped],
    }
    write_text(files[1], json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    if found.positions is None:
        return files
    pixels = _pixels(asked, found, slide)
    if slide is not None and pixels is None:
        raise DataError(
            f"positions are in micrometres and {asked.slide_file} does not say how many a pixel "
            "has; give --mpp"
        )
    for number in np.unique(found.slides).tolist():
        mine = found.slides == number
        places = found.positions[mine].astype(np.float64)
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
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["tile", "slide", "x", "y", *measures])
    for i in range(len(found.tiles)):
        place = ["", ""] if found.positions is None else found.positions[i].tolist()
        values = [f"{row[i]:.6g}" for row in measures.values()]
        writer.writerow([i, int(found.slides[i]), *place, *values])
    return file.getvalue()


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
