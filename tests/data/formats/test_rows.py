"""Features are read into memory that a loader's worker can send on as it is."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from slidevlm.data.formats import rows as module
from slidevlm.data.formats.rows import new_rows, shared_rows
from slidevlm.data.formats.slides import open_bags

LAYOUTS = {
    "contiguous": {},
    "gzip": {"compression": "gzip", "chunks": (7, 3)},
    "lzf": {"compression": "lzf", "chunks": (7, 3)},
    "single rows": {"chunks": (1, 8)},
}
CHOSEN = (None, np.array([0, 3, 4, 21]))


@pytest.fixture(autouse=True)
def share_small_bags_too(monkeypatch):
    monkeypatch.setattr(module, "_SHARED_BYTES", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bf16"])
def test_shared_rows_hold_the_same_values(tmp_path, layout, dtype):
    values = np.random.default_rng(0).standard_normal((30, 8)).astype("f4")
    stored = values.astype("f2").view("u2") if dtype == "bf16" else values.astype(dtype)
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("features", data=stored, **LAYOUTS[layout])
        file["coords"] = np.zeros((30, 2), np.int64)
    (slide,) = open_bags(tmp_path / "s.h5").values()
    for rows in CHOSEN:
        own = slide.read(rows)[0]
        with shared_rows(enabled=True):
            shared = slide.read(rows)[0]
        assert shared.dtype == own.dtype and torch.equal(
            shared.view(torch.uint8), own.view(torch.uint8)
        )
        assert not own.is_shared()
        # float64 is narrowed, and what is narrowed lies elsewhere.
        assert shared.is_shared() or (dtype == "f8" and layout == "contiguous")


def test_small_bags_are_not_shared(monkeypatch):
    monkeypatch.setattr(module, "_SHARED_BYTES", 1000)
    with shared_rows(enabled=True):
        assert new_rows((4, 5), np.dtype("f4")).base is None
        assert new_rows((40, 50), np.dtype("f4")).base is not None


def test_sharing_ends_with_the_block_also_after_an_error():
    with pytest.raises(ValueError, match="x"), shared_rows(enabled=True):
        raise ValueError("x")
    assert new_rows((4, 5), np.dtype("f4")).base is None
