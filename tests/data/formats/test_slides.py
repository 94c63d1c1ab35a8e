"""Each format against a file as its tool writes it; refusals; what inspection relies on."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from slidevlm.data.formats import npy
from slidevlm.data.formats.slides import bag_name, formats, open_bags
from slidevlm.errors import DataError

# maker -> format, dtype, unit, encoder, tile size
EXPECTED = {
    "stamp": ("STAMP", "float16", "um", "uni2", "256 um"),
    "trident": ("TRIDENT", "float32", "px", "conch_v15", "1024 px at level 0"),
    "clam": ("CLAM/GigaPath", "float32", "px", None, None),
    "gzipped": ("CLAM/GigaPath", "float32", "px", None, None),
    "plain": ("CLAM/GigaPath", "float32", "px", None, None),
    "keys": ("HDF5, a bag a key", "float32", None, None, None),
    "tensor": ("PyTorch tensor", "float32", None, None, None),
    "legacy": ("PyTorch tensor", "float32", None, None, None),
    "gigapath": ("PyTorch dictionary", "float32", "px", None, None),
    "mosaic": ("MOSAIC", "float32", "px", None, None),
    "slideflow": ("slideflow", "float32", "px", "RetCCLFeatures", "302 um"),
    "npy": ("NumPy .npy", "float32", None, None, None),
    "npz": ("NumPy .npz", "float32", "px", None, None),
    "npz_compressed": ("NumPy .npz", "float32", "px", None, None),
    "safetensors": ("safetensors", "float32", "um", "uni", None),
    "lazyslide": ("LazySlide", "float32", "px", "uni", None),
    "tiatoolbox": ("TIAToolbox", "float32", "px", None, None),
}


def features_and_coords(count: int, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(count).integers(-999, 999, (count, width))
    places = np.stack([np.arange(count) * 224, np.arange(count) % 7 * 224], axis=1)
    return (numbers / 64).astype(np.float32), places


def test_every_maker_is_expected(makers):
    assert set(makers) == set(EXPECTED)


@pytest.mark.parametrize("kind", list(EXPECTED))
@pytest.mark.parametrize("count", [1, 50])
def test_round_trip(makers, tmp_path, kind, count):
    features, coords = features_and_coords(count)
    path = makers[kind](tmp_path / "TCGA-02-0001-01Z-00-DX1.83fce43e-42ac", features, coords)
    with open_bags(path) as bags:
        assert list(bags) == ["TCGA-02-0001-01Z-00-DX1.83fce43e-42ac"]
        slide = bags["TCGA-02-0001-01Z-00-DX1.83fce43e-42ac"]
        facts = (slide.format, slide.dtype, slide.unit, slide.encoder, slide.tile_size)
        assert facts == EXPECTED[kind]
        assert (slide.path, slide.length, slide.width) == (path, count, 12)
        truth = torch.from_numpy(features)
        rows = np.arange(0, count, 7)
        for wanted, expected in ((None, truth), (rows, truth[rows])):
            found, positions = slide.read(wanted)
            assert found.dtype == getattr(torch, slide.dtype)
            assert torch.equal(found.float(), expected)
            if slide.unit is None:
                assert positions is None and any("positions are miss" in w for w in slide.warnings)
            else:
                assert positions.dtype == np.float64 and np.array_equal(positions, coords)
        bags.close()
        assert torch.equal(slide.read(rows)[0].float(), truth[rows]), "opens again after close"


@pytest.mark.parametrize("kind", ["stamp", "gzipped", "plain", "keys", "tensor", "npy", "npz"])
@pytest.mark.parametrize("shape", [(0, 12), (1, 12), (1, 9, 12), (4, 3, 12)])
def test_shapes(makers, tmp_path, kind, shape):
    if kind in ("gzipped", "keys") and len(shape) == 3:
        pytest.skip("this form is of matrices")
    features = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    count = int(np.prod(shape[:-1]))
    if kind == "gzipped" and not count:
        pytest.skip("HDF5 has no chunks larger than an empty dataset")
    coords = features_and_coords(count)[1]
    bags = open_bags(makers[kind](tmp_path / "a", features, coords))
    slide = next(iter(bags.values()))
    assert (slide.length, slide.width) == (count, 12)
    found, positions = slide.read(None)
    assert np.array_equal(found.float().numpy(), features.reshape(-1, 12))
    assert positions is None or len(positions) == count
    bags.close()


DTYPES = {"float16": "f2", "float32": "f4", "float64": "f8", "bfloat16": "u2"}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", ["plain", "clam", "tensor", "npy", "npz", "npz_compressed"])
def test_types(makers, tmp_path, kind, dtype):
    truth = torch.from_numpy(features_and_coords(20)[0]).to(getattr(torch, dtype))
    stored = truth.view(torch.int16).numpy().view("u2") if dtype == "bfloat16" else truth.numpy()
    if kind == "tensor":
        torch.save(truth, path := tmp_path / "a.pt")
    else:
        path = makers[kind](tmp_path / "a", stored, features_and_coords(20)[1])
    bags = open_bags(path)
    slide = bags["a"]
    assert slide.dtype == dtype
    expected = truth.float() if dtype == "float64" else truth
    for rows in (None, np.array([0, 3, 19])):
        found = slide.read(rows)[0]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected if rows is None else expected[rows])
    bags.close()


def test_bfloat16_of_safetensors_and_fortran_order(tmp_path):
    from safetensors.torch import save_file

    truth = torch.randn(9, 3).bfloat16()
    save_file({"feats": truth}, tmp_path / "a.safetensors")
    assert torch.equal(open_bags(tmp_path / "a.safetensors")["a"].read(np.array([2, 8]))[0],
                       truth[[2, 8]])  # fmt: skip
    np.save(tmp_path / "b.npy", np.asfortranarray(truth.float().numpy()))
    assert torch.equal(
        open_bags(tmp_path / "b.npy")["b"].read(np.array([2]))[0], truth[[2]].float()
    )


def test_hipt_is_flattened(tmp_path):
    truth = torch.randn(2, 256, 384)
    torch.save(truth, tmp_path / "a.pt")
    slide = open_bags(tmp_path / "a.pt")["a"]
    assert (slide.format, slide.length, slide.width) == ("HIPT", 512, 384)
    assert torch.equal(slide.read(np.array([0, 257]))[0], truth.reshape(512, 384)[[0, 257]])


def test_slides_of_the_nested_form(tmp_path):
    tiles = {
        (3, slide, 0, i): {"feature": torch.full((2, 4), float(i)), "position": torch.ones(3) * i}
        for i, slide in enumerate([5, 5, 8])
    }
    torch.save({0: tiles, 1: {}}, tmp_path / "a.pth")
    slide = open_bags(tmp_path / "a.pth")["a"]
    assert slide.slides().tolist() == [0, 0, 0, 0, 1, 1]
    assert slide.read(np.array([1, 4]))[0][:, 0].tolist() == [0, 2]
    assert slide.read(None)[1][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_trident_without_tissue(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (0,), "f4", maxshape=(None,), chunks=(1,))
        file.create_dataset("coords", (0, 2), "i8", maxshape=(None, 2), chunks=(1, 2))
        file["features"].attrs["encoder"] = "None"
        file["coords"].attrs["patch_size_level0"] = 512
    slide = open_bags(tmp_path / "a.h5")["a"]
    assert (slide.format, slide.length, slide.width, slide.encoder) == ("TRIDENT", 0, 0, None)
    features, positions = slide.read(None)
    assert features.shape == (0, 0) and positions.shape == (0, 2)


def test_attributes_as_text(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = np.ones((2, 3), "f4"), np.ones((2, 2), int)
        file["features"].attrs["encoder"] = np.bytes_(b"uni")
        file["coords"].attrs["patch_size_level0"] = "None"
    slide = open_bags(tmp_path / "a.h5")["a"]
    assert (slide.format, slide.encoder, slide.tile_size) == ("TRIDENT", "uni", None)


def old_stamp(path: Path, coords: np.ndarray, **attributes: object) -> Path:
    with h5py.File(path, "w") as file:
        file["feats"], file["coords"] = np.ones((len(coords), 3), "f2"), coords
        file.attrs.update(attributes)
    return path


def test_stamp_of_older_versions(tmp_path):
    grid = np.array([[0, 0], [224, 0], [224, 448]])
    slide = open_bags(old_stamp(tmp_path / "a.h5", grid))["a"]
    assert slide.unit == "um" and np.allclose(slide.read(None)[1], grid / 224 * 256)
    slide = open_bags(old_stamp(tmp_path / "b.h5", grid * 2))["b"]
    assert slide.unit is None and slide.read(None)[1] is None
    assert slide.warnings == ("coords name no unit (attribute 'unit'); positions are left out",)
    slide = open_bags(old_stamp(tmp_path / "c.h5", grid, unit="um", tile_size=2508.0))["c"]
    assert slide.tile_size == "2508 um" and np.array_equal(slide.read(None)[1], grid)
    for unit, shown in (("mm", "'mm'"), ('["um"]', r"\['um'\]")):
        with pytest.raises(DataError, match=rf"d\.h5: attribute unit is {shown}"):
            open_bags(old_stamp(tmp_path / "d.h5", grid, unit=unit))["d"]
    for size in (np.nan, np.inf):  # told, but no number
        assert open_bags(old_stamp(tmp_path / "e.h5", grid, tile_size=size))["e"].unit == "um"


def test_clam_finds_what_lies_beside(makers, tmp_path):
    features, coords = features_and_coords(9)
    for folder in ("feats/h5_files", "feats/pt_files", "patches"):
        (tmp_path / folder).mkdir(parents=True)
    makers["clam"](tmp_path / "feats/h5_files/a", features, coords)
    with h5py.File(tmp_path / "patches/a.h5", "w") as file:
        file["coords"] = coords
        file["coords"].attrs.update(patch_size=256, patch_level=1)
    slide = open_bags(tmp_path / "feats/h5_files/a.h5")["a"]
    assert slide.tile_size == "256 px at level 1" and slide.warnings == ()
    makers["clam"](tmp_path / "feats/h5_files/c", features, coords)
    (tmp_path / "patches/c.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    slide = open_bags(tmp_path / "feats/h5_files/c.h5")["c"]
    assert np.array_equal(slide.read(None)[1], coords) and slide.tile_size is None
    assert slide.warnings == ("the file in patches/ cannot be read; the tile size is not known",)
    slide = open_bags(makers["tensor"](tmp_path / "feats/pt_files/a", features, coords))["a"]
    assert (slide.format, slide.unit) == ("CLAM/GigaPath", "px")
    assert np.array_equal(slide.read(None)[1], coords)
    slide = open_bags(makers["tensor"](tmp_path / "feats/pt_files/b", features, coords))["b"]
    assert slide.unit is None and slide.read(None)[1] is None


def test_several_bags_a_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["s1"], file["s2"] = np.ones((2, 3), "f4"), np.zeros((5, 3), "f4")
    with open_bags(tmp_path / "a.h5") as bags:
        assert {name: slide.length for name, slide in bags.items()} == {"s1": 2, "s2": 5}


def test_case_layout_as_bags(write):
    with open_bags(write([3, 2])) as bags:
        assert list(bags) == ["p0/s0/uni", "p1/s1/uni"]
        slide = bags["p0/s0/uni"]
        assert (slide.format, slide.length, slide.unit) == ("case layout", 3, "um")
        assert slide.read(np.array([1]))[0][0, 0] == 1 and len(slide.slides()) == 3


# -- refusals ------------------------------------------------------------------------------


def h5(path: Path, attributes: dict[str, object] | None = None, **datasets: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        file.attrs.update(attributes or {})
    return path


ONES = np.ones((4, 3), "f4")
REFUSED_H5 = {
    "one vector of 3 numbers, a slide embedding": ({}, {"features": ONES[0]}),
    "feat_type 'slide': it holds a slide embedding": ({"feat_type": "slide"}, {"feats": ONES}),
    "feat_type 'patient'": ({"feat_type": "patient"}, {"feats": ONES}),
    "holds coordinates of tiles (coords) and no features": ({}, {"coords": ONES[:, :2]}),
    "has type int64; write float16": ({}, {"features": np.ones((4, 3), int)}),
    "has type object; write float16": ({}, {"features": np.array([["a", "b"]], object)}),
    "coords has 3 rows, the features 4": ({}, {"features": ONES, "coords": ONES[:3, :2]}),
    "1 of 4 rows of /coords are not finite": (
        {},
        {"features": ONES, "coords": np.array([[0, 1], [2, np.nan], [0, 0], [1, 1]])},
    ),
    "has type |S1; write [N, 2] numbers": (
        {},
        {"features": ONES, "coords": np.full((4, 2), b"a")},
    ),
    "is of no known format": ({}, {"labels": np.ones(4)}),
    "4 tiles without features": ({}, {"features": np.ones((4, 0), "f4")}),
}


@pytest.mark.parametrize("message", list(REFUSED_H5))
def test_refused_hdf5(tmp_path, message):
    attributes, datasets = REFUSED_H5[message]
    path = h5(tmp_path / "a.h5", attributes, **datasets)
    with pytest.raises(DataError) as caught:
        open_bags(path)["a"].read(None)
    assert message in str(caught.value) and "a.h5" in str(caught.value)


@pytest.mark.parametrize("name", ["features", "coords"])
@pytest.mark.parametrize("way", ["external link", "soft link", "virtual", "stored", "reference"])
def test_nothing_outside_the_file_is_read(tmp_path, name, way):
    outside = h5(tmp_path / "outside.h5", secret=np.ones((4, 2), "f4"))
    raw = tmp_path / "raw.bin"
    raw.write_bytes(b"\0" * 32)
    others = {"features", "coords"} - {name}
    path = h5(tmp_path / "a.h5", **dict.fromkeys(others, np.ones((4, 2), "f4")))
    with h5py.File(path, "a") as file:
        if way == "external link":
            file[name] = h5py.ExternalLink(str(outside), "/secret")
        elif way == "soft link":
            file["hidden/away"] = h5py.ExternalLink(str(outside), "/secret")
            file[name] = h5py.SoftLink("/hidden/away")
        elif way == "virtual":
            layout = h5py.VirtualLayout((4, 2), "f4")
            layout[:] = h5py.VirtualSource(str(outside), "/secret", (4, 2))
            file.create_virtual_dataset(name, layout)
        elif way == "stored":
            file.create_dataset(name, (4, 2), "f4", external=[(str(raw), 0, 32)])
        else:
            file.create_dataset(name, (4, 2), h5py.ref_dtype)
    with pytest.raises(DataError, match=r"a\.h5.*(leaves the file|in another file|has type)"):
        open_bags(path)["a"].read(None)


def test_unwritten_data_are_not_zeros(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("features", (64, 4), "f4", chunks=(16, 4))
        dataset[:20] = 1
    with pytest.raises(DataError, match="has 2 of 4 chunks stored; it was not written to its end"):
        open_bags(tmp_path / "a.h5")["a"]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("features", (64, 4), "f4")
    with pytest.raises(DataError, match="0 of 1024 bytes stored"):
        open_bags(tmp_path / "b.h5")["b"]


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize("content", ["torch", "torch legacy", "npy", "npz", "zarr"])
def test_code_is_never_run(tmp_path, content):
    evil = Evil(tmp_path / "ran")
    if content.startswith("torch"):
        path = tmp_path / "a.pt"
        torch.save({"features": ONES, "x": evil}, path,
                   _use_new_zipfile_serialization=content == "torch")  # fmt: skip
    elif content == "npy":
        np.save(path := tmp_path / "a.npy", np.array([evil], object), allow_pickle=True)
    elif content == "npz":
        np.savez(path := tmp_path / "a.npz", features=np.array([evil], object))
    else:
        import pickle

        import zarr

        path = tmp_path / "a.zarr"
        zarr.open_group(str(path), mode="w", zarr_format=2).create_array("features", data=ONES)
        described = json.loads((path / "features/.zarray").read_text())
        described |= {"compressor": {"id": "pickle", "protocol": 4}, "filters": None}
        (path / "features/.zarray").write_text(json.dumps(described))
        for chunk in path.glob("features/[0-9]*"):
            chunk.write_bytes(pickle.dumps(evil))
    with pytest.raises(DataError, match=r"a\.(pt|npy|npz|zarr)"):
        open_bags(path)["a"].read(None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "one vector of 3 numbers, a slide embedding"),
        (torch.ones(2, 3, dtype=torch.int64), "has type torch.int64"),
        (torch.ones(2, 3).to_sparse(), "is not a dense tensor"),
        (torch.ones(1, 3).expand(10**9, 3), "is not what the file stores"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, "one of them must be named embeddings"),
        ({"features": torch.ones(2, 3), "coords": torch.ones(3, 2)}, "coords has 3 rows"),
        ({"features": torch.ones(2, 3), "coords": torch.ones(2, 2), "unit": "mm"}, "unit 'mm'"),
        ([torch.ones(2, 3)], "is list; save a tensor"),
        ({1: {}}, "no component 0"),
    ],
)
def test_refused_torch_files(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt") as caught:
        open_bags(tmp_path / "a.pt")["a"].read(None)
    assert message in str(caught.value)


@pytest.mark.parametrize("version", [1, 2])
def test_a_numpy_header_that_is_no_header(tmp_path, version):
    """NumPy reads a header as Python, for which 10,000 bytes are many."""
    np.save(tmp_path / "a.npy", ONES)
    content = (tmp_path / "a.npy").read_bytes()
    header = content[10:128].rstrip() + b" " * 20_000
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    (tmp_path / "a.npy").write_bytes(
        b"\x93NUMPY" + bytes([version, 0]) + length + header + content[128:]
    )
    with pytest.raises(DataError, match=r"a\.npy: the array cannot be read .*large"):
        open_bags(tmp_path / "a.npy")["a"]


def test_a_zarr_chunk_that_is_all_of_the_memory(makers, tmp_path):
    """A chunk is decoded as a whole: of a few kB it could make a TB."""
    path = makers["tiatoolbox"](tmp_path / "a", *features_and_coords(50))
    described = json.loads((path / "features/zarr.json").read_text())
    chunks = described["chunk_grid"]["configuration"]["chunk_shape"]
    described["chunk_grid"]["configuration"]["chunk_shape"] = [2**40, *chunks[1:]]
    (path / "features/zarr.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="in chunks of"):
        open_bags(path)["a"]


def test_a_zarr_array_with_missing_chunks(makers, tmp_path):
    path = makers["tiatoolbox"](tmp_path / "a", *features_and_coords(50))
    next(path.glob("features/c/*/*")).unlink()
    with pytest.raises(DataError, match="has 3 of 4 chunks"):
        open_bags(path)["a"]


def test_a_zarr_folder_of_two_encoders(makers, tmp_path):
    path = makers["lazyslide"](tmp_path / "a", *features_and_coords(5))
    import shutil

    shutil.copytree(path / "tables/uni_tiles", path / "tables/conch_tiles")
    assert list(open_bags(path)) == ["conch_tiles", "uni_tiles"]


def test_unknown_and_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"no file .*nothing\.h5"):
        open_bags(tmp_path / "nothing.h5")
    (tmp_path / "a.pt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.pt is of no known format; they are: case layout"):
        open_bags(tmp_path / "a.pt")


def test_names_and_order():
    assert bag_name("TCGA-A1.svs.h5") == "TCGA-A1.svs" and bag_name("a.b.PT") == "a.b"
    assert bag_name("a.txt") == "a.txt"
    names = [name for name, _ in formats()]
    assert names.index("case layout") < names.index("STAMP") < names.index("TRIDENT")
    assert names.index("TRIDENT") < names.index("CLAM/GigaPath") < names.index("coordinates only")


@pytest.mark.parametrize("order", ["C", "F"])
def test_compressed_npz_is_read_a_piece_at_a_time(tmp_path, monkeypatch, order):
    monkeypatch.setattr(npy, "_PIECE_BYTES", 3 * 12 * 4)
    features = np.asarray(features_and_coords(40)[0], order=order)
    np.savez_compressed(tmp_path / "a.npz", features=features)
    with open_bags(tmp_path / "a.npz") as bags:
        (slide,) = bags.values()
        for rows in (None, np.array([39]), np.array([0, 2, 3, 17]), np.arange(40)):
            expected = features if rows is None else features[rows]
            assert np.array_equal(slide.read(rows)[0].numpy(), expected)


def test_a_compressed_npz_costs_the_rows_read(tmp_path):
    features = np.zeros((40_000, 256), np.float32)  # 41 MB
    features[:, 0] = np.arange(40_000)
    np.savez_compressed(tmp_path / "a.npz", features=features)
    with open_bags(tmp_path / "a.npz") as bags:
        (slide,) = bags.values()
        tracemalloc.start()
        try:
            found, _ = slide.read(np.array([5, 39_999]))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert found[:, 0].tolist() == [5, 39_999]
    assert peak < features.nbytes / 3


def test_a_compressed_npz_whose_array_is_another_by_the_time_it_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", features=np.zeros((9, 4), np.float32))
    with open_bags(tmp_path / "a.npz") as bags:
        (slide,) = bags.values()
        np.savez_compressed(tmp_path / "a.npz", features=np.zeros((3, 4), np.float32))
        with pytest.raises(DataError, match=r"a\.npz"):
            slide.read(None)
