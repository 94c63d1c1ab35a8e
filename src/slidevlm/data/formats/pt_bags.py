"""Files of `torch.save`: one tensor, a dictionary of tensors, or MOSAIC's nested dictionaries.

| content | format |
|---|---|
| `[N, D]`, `[1, N, D]` | CLAM (`pt_files`), TRIDENT (`--save_features_as pt`), slideflow |
| `[M, 256, 384]` | HIPT: 256 sub-tiles of each of M regions, flattened to M * 256 rows |
| `{"embeddings", "features", "feats" or "tile_embeds": ..., "coords": ...}` | GigaPath, others |
| `{component: {(specimen, slide, section, tile): {"feature", "position"}}}` | MOSAIC |

slideflow keeps the coordinates of `<slide>.pt` in `<slide>.index.npz` and describes the encoder
in `bags_config.json`, both beside it; CLAM's `pt_files/<slide>.pt` has its coordinates in
`h5_files/<slide>.h5`. All coordinates are level-0 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidevlm.data.formats.hdf5 import Hdf5File, positions_of_rows
from slidevlm.data.formats.npy import read_npz
from slidevlm.data.formats.rows import (
    MemoryRows,
    as_positions,
    damage,
    flat_shape,
    for_each_row,
)
from slidevlm.data.formats.slides import (
    FORMATS,
    TORCH_EXTENSIONS,
    OpenBags,
    Slide,
    SlideFormat,
    Source,
    find_arrays,
    size_text,
)
from slidevlm.data.formats.torch_files import DTYPES, checked, load, tile_parts
from slidevlm.errors import DataError

_HIPT = (256, 384)
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9c"  # before torch 1.6
Positions = Callable[[], np.ndarray | None]


def _recognises(source: Source) -> bool:
    names = source.zip_names
    if names is None:
        return source.head.startswith(_LEGACY)
    return any(name.endswith("/data.pkl") or name == "data.pkl" for name in names)


def _open(source: Source) -> OpenBags:
    path = source.path

    def open_bag(name: str) -> Slide:
        content = load(path, str(path))
        with damage(path, "the content"):
            if isinstance(content, dict):
                nested = any(isinstance(value, dict) for value in content.values())
                return _nested(path, content) if nested else _dictionary(path, content)
            return _tensor(path, name, content)

    return OpenBags([source.name], open_bag, lambda: None)


def _rows(value: object, path: Path, what: str) -> tuple[MemoryRows, tuple[int, ...]]:
    """Rows of a tensor, and its shape before it was flattened."""
    tensor = checked(value, path, what)
    shape = tuple(tensor.shape) or (1,)
    flat = flat_shape(shape, path, what)
    dtype = DTYPES[tensor.dtype]
    return MemoryRows((tensor.reshape(flat),), flat, dtype), shape


def _tensor(path: Path, name: str, content: object) -> Slide:
    rows, shape = _rows(content, path, "the tensor")
    form, positions, encoder, tile_size = "PyTorch tensor", None, None, None
    index, config = path.with_name(f"{name}.index.npz"), path.with_name("bags_config.json")
    clam = path.absolute().parent
    beside = clam.parent / "h5_files" / f"{name}.h5"
    if index.is_file() or config.is_file():
        form = "slideflow"
        positions = _slideflow_positions(index, shape) if index.is_file() else None
        encoder, tile_size = _slideflow_config(config) if config.is_file() else (None, None)
    elif clam.name == "pt_files":
        form = "CLAM/GigaPath"
        positions = _clam_positions(beside, shape) if beside.is_file() else None
    elif len(shape) == 3 and shape[1:] == _HIPT:
        form = "HIPT"
    return Slide(
        form,
        path,
        rows,
        unit=None if positions is None else "px",
        encoder=encoder,
        tile_size=tile_size,
        warnings=() if positions else ("no coordinates; positions are missing",),
        positions=positions or (lambda: None),
    )


def _slideflow_positions(path: Path, shape: tuple[int, ...]) -> Positions:
    def read() -> np.ndarray | None:
        values = as_positions(read_npz(path, "arr_0"), path, "arr_0")
        return for_each_row(values, shape, path, "arr_0")

    return read


def _slideflow_config(path: Path) -> tuple[str | None, str | None]:
    """Encoder and size of a tile."""
    with damage(path, "the description of the bags"):
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        extractor = config.get("extractor") or {}
        name = extractor.get("class") if isinstance(extractor, dict) else None
        encoder = None if name is None else str(name).rpartition(".")[2]
        micrometres = size_text(config.get("tile_um"), "um")
        return encoder, micrometres or size_text(config.get("tile_px"), "px")


def _clam_positions(path: Path, shape: tuple[int, ...]) -> Positions:
    def read() -> np.ndarray | None:
        file = Hdf5File(path)
        try:
            return positions_of_rows(file, "/coords", shape)
        finally:
            file.close()

    return read


def _dictionary(path: Path, content: dict[Any, Any]) -> Slide:
    arrays = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not all(isinstance(key, str) for key in arrays):
        raise DataError(
            f"{path} holds tensors by {sorted({type(key).__name__ for key in arrays})}; name them "
            "features and coords"
        )
    features, coordinates = find_arrays(list(arrays), path)
    rows, shape = _rows(arrays[features], path, features)
    unit = content.get("unit")
    if unit not in (None, "um", "px"):
        raise DataError(f"{path}: unit {unit!r}; make it 'um' (micrometres) or 'px'")

    def positions() -> np.ndarray | None:
        if coordinates is None:
            return None
        values = (
            arrays[coordinates].float().numpy()
            if arrays[coordinates].dtype == torch.bfloat16
            else arrays[coordinates].numpy()
        )
        return for_each_row(as_positions(values, path, coordinates), shape, path, coordinates)

    missing = ("no coordinates; positions are missing",)
    assumed = ("coordinates name no unit; level-0 pixels are assumed",)
    encoder = content.get("encoder")
    return Slide(
        "PyTorch dictionary",
        path,
        rows,
        unit=None if coordinates is None else unit or "px",
        encoder=encoder if isinstance(encoder, str) else None,
        warnings=missing if coordinates is None else () if unit else assumed,
        positions=positions,
    )


def _nested(path: Path, content: dict[Any, Any]) -> Slide:
    parts = tile_parts(content, str(path))
    for part in parts.features[:1]:
        checked(part, path, "the first tile")
    there = parts.positions is not None
    return Slide(
        "MOSAIC",
        path,
        parts.rows(),
        unit="px" if there else None,
        warnings=("positions name no unit; level-0 pixels are assumed",)
        if there
        else ("no positions",),
        positions=parts.row_positions,
        slide_numbers=parts.row_slides,
    )


FORMATS.register("PyTorch")(
    SlideFormat(
        60,
        "a file of torch.save: a tensor, a dictionary of tensors, or nested dictionaries of tiles",
        TORCH_EXTENSIONS,
        _recognises,
        _open,
    )
)
