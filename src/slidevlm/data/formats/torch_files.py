"""Safe reading of files of `torch.save`, and the nested form that MOSAIC writes.

Code in a file is never run: only tensors, numbers, text and containers are unpickled. Files are
mapped, not loaded, so that chosen rows cost what is read of them. The structure of a file has a
checksum, which is verified; that of the numbers is not, as it would cost reading them all.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slidevlm.data.formats.rows import MemoryRows
from slidevlm.documents import check_stored
from slidevlm.errors import DataError

COMPONENT = 0  # the one read of several, as MOSAIC does by default
DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


def load(path: Path, owner: str) -> Any:
    """What a file of `torch.save` holds; DataError, beginning with `owner`, for anything unsafe."""
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_structure(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises whatever the damage leads its unpickler to
        raise DataError(
            f"{owner} cannot be read ({_reason(error)}); it must hold plain tensors, "
            "dictionaries and tuples, saved by torch.save"
        ) from error


def _check_structure(path: Path) -> None:
    """Verify the checksums of all small members; torch itself does not look at them."""
    with zipfile.ZipFile(path) as archive:
        check_stored(archive)
        for info in archive.infolist():
            if "/data/" not in info.filename:
                archive.read(info)


def _reason(error: Exception) -> str:
    """The sentence that says what happened, out of torch's advice to run the file's code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = next((line for line in lines if "Unpickler error" in line), lines[0])
    return told.split(". Please use")[0].strip()


def checked(value: object, path: Path, what: str) -> Tensor:
    """A dense tensor of floats whose numbers are all in the file; else DataError."""
    if not isinstance(value, Tensor):
        raise DataError(f"{path}: {what} is {type(value).__name__}; save a tensor [N, D]")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise DataError(f"{path}: {what} is not a dense tensor; save a dense tensor [N, D]")
    if value.dtype not in DTYPES:
        raise DataError(
            f"{path}: {what} has type {value.dtype}; save float16, bfloat16, float32 or float64"
        )
    stored = value.untyped_storage().nbytes()
    needed = value.numel() * value.element_size()
    # Files before torch 1.6 have no checksum; there a shape that leaves numbers over is damage.
    whole = needed == stored or zipfile.is_zipfile(path)
    if needed > stored or needed > path.stat().st_size or not whole:
        raise DataError(
            f"{path}: {what} of shape {tuple(value.shape)} is not what the file stores, {stored} "
            "bytes; it is cut short or damaged: copy or write it again"
        )
    return value.detach()


@dataclass(frozen=True)
class TileParts:
    """The tiles of a nested file, still on disk: P of them, of S rows each."""

    features: tuple[Tensor, ...]  # P of [S, D]
    positions: np.ndarray | None  # [P, 2]
    slides: np.ndarray  # [P] int64

    def rows(self) -> MemoryRows:
        """The rows of all tiles end to end."""
        first = self.features[0] if self.features else torch.empty(0, 0)
        count = sum(len(feature) for feature in self.features)
        return MemoryRows(self.features, (count, first.shape[1]), DTYPES[first.dtype])

    def row_positions(self) -> np.ndarray | None:
        """[N, 2] float64, repeated for the sub-tiles of a tile; None where there are none."""
        return None if self.positions is None else np.repeat(self.positions, self._sizes(), axis=0)

    def row_slides(self) -> np.ndarray:
        """[N] int64, repeated for the sub-tiles of a tile."""
        return np.repeat(self.slides, self._sizes())

    def _sizes(self) -> np.ndarray:
        return np.array([len(feature) for feature in self.features], np.int64)


def tile_parts(content: object, owner: str) -> TileParts:
    """The tiles of `{component: {(specimen, slide, section, tile): {"feature", "position"}}}`."""
    if not isinstance(content, dict) or not isinstance(content.get(COMPONENT), dict):
        held = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{owner} has no component {COMPONENT} (a dictionary of tiles); it holds {held}"
        )
    features, positions, slides = [], [], []
    for key, tile in content[COMPONENT].items():
        try:
            feature = tile["feature"]
            features.append(feature.reshape(-1, feature.shape[-1]))
            slides.append(int(key[1]))
            if "position" in tile:
                positions.append([float(value) for value in tile["position"]][:2])
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise DataError(
                f"{owner}, tile {key!r}: not of the form (specimen, slide, section, tile): "
                f"{{'feature': tensor, 'position': tensor}} ({error!r})"
            ) from error
    if len({feature.shape[1] for feature in features}) > 1:
        raise DataError(f"{owner} has tiles of different widths")
    if len({feature.dtype for feature in features} - set(DTYPES)) or (
        len({feature.dtype for feature in features}) > 1
    ):
        raise DataError(f"{owner} has tiles that are not all of one type of floats")
    if positions and (len(positions) != len(features) or min(map(len, positions)) < 2):
        raise DataError(
            f"{owner}: {len(positions)} of {len(features)} tiles have a position, or some have "
            "less than two numbers; give x and y for all or none"
        )
    places = np.array(positions, np.float64).reshape(-1, 2) if positions else None
    if places is not None and not np.isfinite(places).all():
        raise DataError(f"{owner}: some positions are not finite; write them again")
    _, order = np.unique(np.array(slides, np.int64), return_inverse=True)
    return TileParts(tuple(features), places, order.astype(np.int64))
