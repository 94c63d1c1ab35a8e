"""Feature files as each tool writes them: same names, shapes, types and attributes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

Maker = Callable[[Path, np.ndarray, np.ndarray], Path]


def stamp(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """STAMP 2: float16 `feats`, coordinates in micrometres."""
    path = path.with_name(path.name + ".h5")
    with h5py.File(path, "w") as file:
        file["coords"] = coords.astype(np.float32)
        file["feats"] = features.astype(np.float16)
        file.attrs["stamp_version"] = "2.3.0"
        file.attrs["extractor"] = "uni2"
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = 256.0
        file.attrs["tile_size_px"] = 224
        file.attrs["code_hash"] = "0a1b2c3d"
        file.attrs["feat_type"] = "tile"
    return path


def trident(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """TRIDENT: chunks of one row, growing; dictionaries as JSON, None as "None"."""
    path = path.with_name(path.name + ".h5")
    with h5py.File(path, "w") as file:
        for name, values in (("features", features), ("coords", coords.astype(np.int64))):
            file.create_dataset(
                name,
                data=values,
                maxshape=(None, *values.shape[1:]),
                chunks=(1, *values.shape[1:]),
            )
        file["features"].attrs.update(name=path.stem, savetodir="x", encoder="conch_v15")
        file["coords"].attrs.update(
            patch_size=512, patch_size_level0=1024, level0_magnification=40,
            target_magnification=20, overlap=0, name=path.stem, savetodir="None",
            level0_width=90_000, level0_height=80_000, extra=json.dumps({"a": 1}),
        )  # fmt: skip
    return path


def clam(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """CLAM's h5_files: growing datasets without attributes."""
    path = path.with_name(path.name + ".h5")
    with h5py.File(path, "w") as file:
        for name, values in (("features", features), ("coords", coords.astype(np.int32))):
            chunks = (1, *values.shape[1:])
            file.create_dataset(name, data=values, maxshape=(None, *chunks[1:]), chunks=chunks)
    return path


def gzipped(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """CLAM's names in compressed chunks, in the newest form of HDF5."""
    path = path.with_name(path.name + ".h5")
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset(
            "features", data=features, chunks=(min(16, len(features)), 8), compression=4
        )
        file.create_dataset(
            "coords", data=coords, chunks=(min(32, len(coords)), 2), compression="lzf"
        )
    return path


def plain(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """CLAM's names, contiguous."""
    path = path.with_name(path.name + ".h5")
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, coords
    return path


def keys(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """One bag a key; here one."""
    path = path.with_name(path.name + ".h5")
    with h5py.File(path, "w") as file:
        file[path.stem] = features
    return path


def tensor(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """CLAM's pt_files."""
    path = path.with_name(path.name + ".pt")
    torch.save(torch.from_numpy(features), path)
    return path


def legacy(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """torch before 1.6."""
    path = path.with_name(path.name + ".pt")
    torch.save(torch.from_numpy(features), path, _use_new_zipfile_serialization=False)
    return path


def gigapath(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """GigaPath's output of its tile encoder, saved."""
    path = path.with_name(path.name + ".pt")
    content = {"tile_embeds": torch.from_numpy(features), "coords": torch.from_numpy(coords)}
    torch.save(content, path)
    return path


def mosaic(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """MOSAIC: a tensor for each tile."""
    path = path.with_name(path.name + ".pth")
    tiles = {
        (3, 0, 0, i): {"feature": row, "position": torch.tensor([float(x), float(y), 0.0])}
        for i, (row, (x, y)) in enumerate(zip(torch.from_numpy(features), coords, strict=True))
    }
    torch.save({0: tiles}, path)
    return path


def slideflow(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """slideflow: a tensor, coordinates and a description beside it."""
    path = path.with_name(path.name + ".pt")
    torch.save(torch.from_numpy(features), path)
    np.savez(path.with_name(f"{path.stem}.index"), coords)
    described = {
        "extractor": {
            "class": "slideflow.model.extractors.retccl.RetCCLFeatures",
            "kwargs": {"center_crop": True},
        },
        "normalizer": None,
        "num_features": features.shape[-1],
        "tile_px": 299,
        "tile_um": 302,
    }
    path.with_name("bags_config.json").write_text(json.dumps(described))
    return path


def npy(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    path = path.with_name(path.name + ".npy")
    np.save(path, features)
    return path


def npz(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    path = path.with_name(path.name + ".npz")
    np.savez(path, features=features, coords=coords)
    return path


def npz_compressed(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    path = path.with_name(path.name + ".npz")
    np.savez_compressed(path, features=features, coords=coords)
    return path


def safetensors(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    from safetensors.torch import save_file

    path = path.with_name(path.name + ".safetensors")
    tensors = {"features": torch.from_numpy(features), "coords": torch.from_numpy(coords)}
    save_file(tensors, path, metadata={"encoder": "uni", "unit": "um"})
    return path


def lazyslide(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """SpatialData's table of tiles, as AnnData writes it (zarr 2)."""
    import zarr

    path = path.with_name(path.name + ".zarr")
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root.attrs["spatialdata_attrs"] = {"version": "0.2"}
    table = root.create_group("tables").create_group("uni_tiles")
    table.attrs.update({"encoding-type": "anndata", "region": "tiles", "instance_key": "tile_id"})
    table.create_array("X", data=features, chunks=(16, features.shape[1]))
    table.create_group("obs").create_array("tile_id", data=np.arange(len(features)))
    table.create_group("obsm").create_array("spatial", data=coords, chunks=(16, 2))
    return path


def tiatoolbox(path: Path, features: np.ndarray, coords: np.ndarray) -> Path:
    """TIAToolbox's DeepFeatureExtractor: bounds of tiles (zarr 3)."""
    import zarr

    path = path.with_name(path.name + ".zarr")
    root = zarr.open_group(str(path), mode="w", zarr_format=3)
    root.create_array("features", data=features, chunks=(16, features.shape[1]))
    root.create_array("coordinates", data=np.hstack([coords, coords + 224]), chunks=(16, 4))
    return path


MAKERS: dict[str, Maker] = {
    make.__name__: make
    for make in (
        stamp, trident, clam, gzipped, plain, keys, tensor, legacy, gigapath, mosaic, slideflow,
        npy, npz, npz_compressed, safetensors, lazyslide, tiatoolbox,
    )
}  # fmt: skip


def features_and_coords(count: int, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """[count, width] float32 that float16 holds exactly, and [count, 2] int64."""
    numbers = np.random.default_rng(count).integers(-999, 999, (count, width))
    places = np.stack([np.arange(count) * 224, np.arange(count) % 7 * 224], axis=1)
    return (numbers / 64).astype(np.float32), places


@pytest.fixture
def makers() -> dict[str, Maker]:
    return MAKERS
