"""Small pictures of slide files, read by OpenSlide or tiffslide, whichever is installed."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slidevlm.data.splits import some
from slidevlm.errors import ConfigError, DataError

SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide"),
    *(".dcm", ".czi"),
)  # what OpenSlide and tiffslide read
_QUALITIES = (80, 65, 50, 35, 20)


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A slide seen from afar.

    Args:
        pixels: [h, w, 3] uint8.
        width: of the slide, in level-0 pixels.
        height: likewise.
        mpp: micrometres a level-0 pixel; None where the file does not say.
    """

    pixels: np.ndarray
    width: int
    height: int
    mpp: float | None

    @property
    def scale(self) -> float:
        """Pixels of the thumbnail a level-0 pixel."""
        return max(self.pixels.shape[:2]) / max(self.width, self.height)


def thumbnail(path: Path, side: int, flag: str) -> Thumbnail:
    """The slide in at most `side` pixels along its longer side.

    Args:
        path: the slide file.
        side: pixels.
        flag: that named the file, for messages.

    Raises:
        ConfigError: neither library is installed.
        DataError: no library that is installed reads the file.
    """
    readers = _readers()
    if not readers:
        raise ConfigError(
            f"{flag} needs a library that reads slides: pip install 'slidevlm[slide]' (OpenSlide), "
            "or 'slidevlm[tiffslide]' (of Python alone)"
        )
    problems = []
    for name, (open_slide, mpp) in readers.items():
        try:
            with open_slide(str(path)) as slide:
                width, height = slide.dimensions
                image = slide.get_thumbnail((side, side)).convert("RGB")
                told = slide.properties.get(mpp)
        except Exception as error:  # each library has errors of its own, for each format others
            problems.append(f"{name}: {error or type(error).__name__}")
            continue
        return Thumbnail(np.asarray(image), width, height, float(told) if told else None)
    raise DataError(f"{flag} {path} cannot be read as a slide ({'; '.join(problems)})")


def _readers() -> dict[str, tuple[Callable[[str], Any], str]]:
    """Of each library that is installed: what opens a file, and its name of the resolution."""
    found: dict[str, tuple[Callable[[str], Any], str]] = {}
    try:
        import openslide

        found["OpenSlide"] = (openslide.OpenSlide, "openslide.mpp-x")
    except ImportError:
        pass
    try:
        import tiffslide

        found["tiffslide"] = (tiffslide.TiffSlide, "tiffslide.mpp-x")
    except ImportError:
        pass
    return found


def jpeg(pixels: np.ndarray, limit: int) -> bytes:
    """[h, w, 3] uint8 as JPEG of at most `limit` bytes where the coarsest quality is enough."""
    from PIL import Image  # both libraries come with it

    data = b""
    for quality in _QUALITIES:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, optimize=True)
        data = file.getvalue()
        if len(data) <= limit:
            break
    return data


def files_of(given: Sequence[str], specimens: Sequence[str], flag: str) -> Mapping[str, Path]:
    """The slide file of each specimen that has one: the file of the specimen's name.

    Args:
        given: files and folders; one file for one specimen may have any name.
        specimens: names.
        flag: that named the files, for messages.

    Raises:
        DataError: a file that is not there, or is of no specimen; two of one.
    """
    if len(given) == len(specimens) == 1 and Path(given[0]).is_file():
        return {specimens[0]: Path(given[0])}
    found: dict[str, Path] = {}
    for word in given:
        place = Path(word)
        if place.is_dir():
            files = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
            files = [p for p in files if p.stem in specimens]
        elif not place.is_file():
            raise DataError(f"{flag}: there is no file {place}")
        elif place.stem not in specimens:
            raise DataError(
                f"{flag} {place}: no specimen shown is called {place.stem!r} "
                f"({some(specimens, 3)}); a slide file has the name of its specimen"
            )
        else:
            files = [place]
        for file in files:
            other = found.setdefault(file.stem, file)
            if other != file:
                raise DataError(f"{flag}: {other} and {file} are both of {file.stem!r}; give one")
    return found
