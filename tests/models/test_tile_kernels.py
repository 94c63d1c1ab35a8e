"""The compiled pass over tiles against the same written out in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slidevlm.models import jit

if jit.kernels("tile_kernels", threaded=False) is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from slidevlm.models.tile_kernels import pass_over


def bits(tiles: Tensor) -> np.ndarray:
    return (tiles.view(torch.int16) if tiles.dtype == torch.float16 else tiles).numpy()


def passed(tiles: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised rows, and moments."""
    rows = np.full(tiles.shape, np.nan, np.float32)
    moments = np.full((2, tiles.shape[1]), np.nan)
    pass_over(bits(tiles), mean.numpy(), deviation.numpy(), 1e-5, rows, moments)
    return torch.from_numpy(rows), torch.from_numpy(moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64, 515])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 200])
def test_rows_and_moments(count: int, width: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tiles = (5 + 3 * torch.randn(count, width, generator=draw)).to(dtype)
    mean = torch.randn(width, generator=draw)
    deviation = 0.5 + torch.rand(width, generator=draw)
    exact = (tiles.double() - mean.double()) / deviation.double()
    rows, moments = passed(tiles, mean, deviation)
    if width > 1:  # of one channel the norm is 0, and rounding all that is seen
        torch.testing.assert_close(
            rows.double(), F.layer_norm(exact, (width,), eps=1e-5), atol=2e-5, rtol=1e-5
        )
    torch.testing.assert_close(moments[0], exact.mean(0), atol=1e-5, rtol=1e-6)
    squares = (exact - exact.mean(0)).square().sum(0)
    torch.testing.assert_close(moments[1], squares, atol=1e-5, rtol=1e-5)


def test_what_is_not_wanted_is_left_alone() -> None:
    tiles, zero, one = torch.randn(40, 6), torch.zeros(6), torch.ones(6)
    rows, moments = passed(tiles, zero, one)
    only = np.full((40, 6), np.nan, np.float32)
    pass_over(bits(tiles), zero.numpy(), one.numpy(), 1e-5, only, np.empty((0, 6)))
    assert np.array_equal(only, rows.numpy())
    seen = np.full((2, 6), np.nan)
    pass_over(bits(tiles), zero.numpy(), one.numpy(), 0.0, np.empty((0, 6), np.float32), seen)
    assert np.array_equal(seen, moments.numpy())


def test_every_number_of_16_bits() -> None:
    """Subnormal, infinite and undefined ones too, each as torch reads it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    rows = torch.full((2**16, 1), torch.nan).numpy()
    moments = np.empty((2, 1))
    zero, one = torch.zeros(1), torch.ones(1)
    for value in every.split(1):  # the mean of one number is itself
        pass_over(bits(value[None]), zero.numpy(), one.numpy(), 1e-5, rows[:1], moments)
        expected = value.double().item()
        assert moments[0, 0] == expected or np.isnan([moments[0, 0], expected]).all()


def test_a_large_mean_loses_no_digits() -> None:
    """A channel of 1000 with a deviation of a hundredth, over many blocks."""
    tiles = 1000 + 0.01 * torch.randn(20_000, 2)
    moments = passed(tiles, torch.zeros(2), torch.ones(2))[1]
    exact = tiles.double()
    torch.testing.assert_close(moments[0], exact.mean(0), rtol=1e-8, atol=0)
    variance = moments[1] / len(tiles)
    torch.testing.assert_close(variance, exact.var(0, unbiased=False), rtol=2e-2, atol=0)


def test_rows_beyond_what_squares_can_be_of_are_no_numbers() -> None:
    tiles = torch.tensor([[1e20, 2.0, 3.0], [1.0, 2.0, 3.0]])
    rows = passed(tiles, torch.zeros(3), torch.ones(3))[0]
    assert rows[0].isnan().all() and F.layer_norm(tiles, (3,))[0].isnan().all()
    assert rows[1].isfinite().all()


def test_a_processor_without_an_instruction_for_float16(tmp_path: Path) -> None:
    """LLVM would call a function that is not there, and end the process."""
    code = (
        "import torch; from slidevlm.models import tile_kernels, tile_rows\n"
        "tile_rows.LEAST = 1\n"
        "x = torch.randn(90, 7).half()\n"
        "rows = torch.cat(list(tile_rows.normalised_rows(x, 1e-5, torch.float32)))\n"
        "expected = torch.nn.functional.layer_norm(x.float(), (7,))\n"
        "torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)\n"
        "print(tile_kernels.READS_HALVES, len(tile_kernels.pass_over.signatures))\n"
    )
    told = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **told}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.stdout == "False 1\n", done.stderr


def test_a_channel_without_deviation_is_what_torch_makes_of_it() -> None:
    tiles = torch.tensor([[1.0, 2.0], [1.0, 3.0]])
    rows, moments = passed(tiles, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert rows.isnan().all() and moments[:, 0].isnan().all()
    assert moments[:, 1].tolist() == [2.5, 0.5]
    moments = passed(tiles, torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))[1]
    assert moments[0, 0] == float("inf")
