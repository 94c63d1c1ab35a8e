"""Seeing what a run has learnt: `slidevlm report`, its page, and `slidevlm attention`."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.app.attending import Attention, Dropped, attend, faithfulness
from slidevlm.app.bags import sample_of
from slidevlm.app.cohorts import open_path
from slidevlm.app.page import write_page
from slidevlm.app.page_attention import Wanted
from slidevlm.app.slide_model import load
from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.splits import some
from slidevlm.errors import ConfigError, DataError
from slidevlm.report.tables import render
from slidevlm.report.tile_maps import geojson, least_distance, picture, png
from slidevlm.run import configure_logging, write_text

_SEEDS = 5  # random choices of each share
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

    model: str
    source: Path
    output: Path
    specimen: str | None
    sentence_wise: bool
    slide_file: Path | None
    mpp: float | None
    tile_size: float | None
    hdf5_feature_attribute: str | None
    slide_table: Path | None
    image_features_cutoff: int
    device: str | None
    seed: int
    as_json: bool


@dataclass(frozen=True)
class _Slide:
    """A slide file's thumbnail."""

    pixels: np.ndarray  # [h, w, 3] uint8
    scale: float  # pixels of the thumbnail a level-0 pixel
    mpp: float | None


def attention(asked: Attending) -> list[Path]:
    """Write the files of one specimen's attention; returns them.

    Raises:
        SlideVLMError: for everything a user can mend.
    """
    configure_logging(debug=False, main=True)
    slide = None if asked.slide_file is None else _thumbnail(asked.slide_file)
    model = load(
        asked.model, device=asked.device, image_features_cutoff=asked.image_features_cutoff
    )
    store = open_path(asked.source, asked.hdf5_feature_attribute, asked.slide_table)
    case = _chosen(store, asked)
    trained, precision = model.trained, model.precision
    sample = sample_of(trained, store, case, str(asked.source), asked.image_features_cutoff)
    found = attend(trained, precision, sample, sentences=asked.sentence_wise)
    if slide is not None and len(set(found.slides.tolist())) > 1:
        raise DataError(
            f"specimen {found.specimen!r} is of several slides, and --slide-file is one; give the "
            "features of that slide alone"
        )
    seeds = range(asked.seed, asked.seed + _SEEDS)
    dropped = faithfulness(trained, precision, sample, found.tiles, seeds)
    files = _write(asked, found, dropped, slide, model.hash)
    if asked.as_json:
        rows = [asdict(one) for one in dropped]
        print(json.dumps({"files": [str(f) for f in files], "faithfulness": rows}))
        return files
    print(_shown(dropped))
    print("\n".join(f"wrote {file}" for file in files))
    if found.positions is not None and _pixels(asked, found, slide) is None:
        print("no QuPath annotations: positions are in micrometres; give --mpp or --slide-file")
    return files


def _chosen(store: CaseStore, asked: Attending) -> Case:
    cases = [case for case in store.cases if store.has_features(case)]
    if asked.specimen is not None:
        cases = [case for case in cases if case.specimen == asked.specimen]
        if not cases:
            raise DataError(f"{asked.source} has no specimen {asked.specimen!r} with features")
    if len(cases) != 1:
        names = some((case.specimen for case in cases), 3) or "none"
        raise DataError(
            f"{asked.source} has {len(cases)} specimens with features ({names}); choose one with "
            "--specimen"
        )
    return cases[0]


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
    asked: Attending, found: Attention, dropped: list[Dropped], slide: _Slide | None, model: str
) -> list[Path]:
    name = re.sub(r"[^\w.-]+", "_", found.specimen)[:100] or "bag"
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


def _shown(dropped: list[Dropped]) -> str:
    rows = [
        (f"{100 * d.share:.0f} %", *(f"{v:.3f}" for v in (d.most_attended, d.random_mean)),
         f"{d.random_least:.3f} to {d.random_most:.3f}", f"{d.least_attended:.3f}")
        for d in dropped
    ]  # fmt: skip
    header = ("dropped", "most attended", "random", "its range", "least attended")
    lines = render(header, rows, "markdown", 100)
    return f"cosine of the slide embedding with that of all tiles, after dropping tiles:\n{lines}"
