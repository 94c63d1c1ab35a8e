"""The compiled kernels against the same written out in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from slidevlm.models.fused import is_available

if not is_available():
    pytest.skip("numba is not installed", allow_module_level=True)

import numpy as np

from slidevlm.models import kernels


@pytest.mark.parametrize("shares", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (64, 2), (515, 130)])
def test_a_product_is_the_layer_s(inputs: int, outputs: int, shares: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    for rows in range(1, 26):
        x = torch.randn(rows, inputs, generator=generator)
        for b in (None, bias):
            found = kernels.linear(
                weight.numpy(), None if b is None else b.numpy(), x.numpy(), shares
            )
            exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
            torch.testing.assert_close(
                torch.from_numpy(found).double(), exact, atol=3e-5, rtol=1e-5
            )


@pytest.mark.parametrize("outputs", [3, 37, 64])
def test_the_number_of_threads_changes_no_digit(outputs: int) -> None:
    weight = torch.randn(outputs, 64).numpy()
    for rows in (1, 2, 3, 24):
        x = torch.randn(rows, 64).numpy()
        alone = kernels.linear(weight, None, x, 1)
        for shares in (2, 3, 5, 50):
            assert np.array_equal(kernels.linear(weight, None, x, shares), alone)


def test_nor_does_it_in_a_whole_layer() -> None:
    """Three queries to each of two contexts; two new tokens of each of three sequences."""
    draw = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> np.ndarray:
        return torch.randn(shape, generator=draw).numpy()

    width, heads, hidden = 36, 3, 22
    norm = numbers(width), numbers(width), 1e-5
    x, context = numbers(6, width), numbers(2 * heads * 7 * 12)
    query, out, bias = numbers(width, width), numbers(width, width), numbers(width)
    project, inner, outer = (
        numbers(3 * width, width), numbers(2 * hidden, width), numbers(width, hidden)
    )  # fmt: skip
    inner_bias, starts = numbers(2 * hidden), np.array([0, 4, 2])
    cache = numbers(3, heads, 9, 12)

    def both(shares: int) -> list[np.ndarray]:
        crossed = kernels.cross_attention(
            x, norm, query, out, bias, heads, context, context, (heads * 84, 84, 12), 7, 3, shares
        )
        layer = kernels.self_attention_layer(
            x, norm, project, out, bias, norm, inner, inner_bias, outer, bias, heads,
            cache.copy(), cache.copy(), starts, shares,
        )  # fmt: skip
        return [crossed, layer]

    alone = both(1)
    for shares in (2, 3, 5, 50):
        assert all(map(np.array_equal, both(shares), alone))


def test_a_row_is_the_same_beside_others() -> None:
    """To rounding; what is not finite in one row stays there."""
    weight, x = torch.randn(64, 100), torch.randn(9, 100)
    x[4, 3], x[7, 0] = torch.nan, torch.inf
    found = kernels.linear(weight.numpy(), None, x.numpy(), 1)
    for i, row in enumerate(x):
        alone = kernels.linear(weight.numpy(), None, row[None].numpy(), 1)
        assert np.allclose(found[i], alone[0], atol=1e-4, equal_nan=True)
    assert np.isnan(found[4]).all() and np.isinf(found[7]).all()
    assert np.isfinite(np.delete(found, [4, 7], 0)).all()


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("seen", [1, 2, 4, 5, 31, 260])
def test_attention_of_one_query(seen: int, spread: float) -> None:
    """Also where the weights are all on one key, or lie beyond what float32 has."""
    generator = torch.Generator().manual_seed(seen)
    query = spread * torch.randn(24, generator=generator)
    apart = torch.randn(seen, 3, 24, generator=generator)  # of a head in the middle
    values = torch.randn(seen, 3, 24, generator=generator)
    out = np.empty(24, np.float32)
    kernels._attend(
        query.numpy(), apart.view(-1).numpy(), values.view(-1).numpy(), 24, 72, seen, out
    )
    q, k, v = (t.double() for t in (query[None], apart[:, 1], values[:, 1]))
    exact = F.scaled_dot_product_attention(q[None], k[None], v[None])[0, 0]
    torch.testing.assert_close(torch.from_numpy(out).double(), exact, atol=1e-5, rtol=1e-4)


def test_exponentials() -> None:
    x = torch.linspace(-90, 3, 1001, dtype=torch.float64)
    found = x.numpy().astype(np.float32)
    total = kernels._exponentials(found, np.float32(0.5))
    exact = (0.5 * (x - x.max())).exp()
    torch.testing.assert_close(torch.from_numpy(found).double(), exact, atol=0, rtol=1e-5)
    assert total == pytest.approx(float(exact.sum()), rel=1e-5)
    far = np.array([0, -1e30, -np.inf], np.float32)
    assert kernels._exponentials(far, np.float32(1)) == 1
    assert far[1:].max() < 2e-38, "as good as nothing"
    assert np.isnan(kernels._exponentials(np.array([0, np.nan], np.float32), np.float32(1)))


def test_the_gate_is_the_exact_gelu_s() -> None:
    b = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, 1e4, 0.0, -0.0])])
    a = torch.full_like(b, 2.0)
    x = torch.cat([a, b])[None].numpy()
    found = np.empty((1, len(b)), np.float32)
    kernels._gate(x, 0, 1000, found)
    kernels._gate(x, 1000, len(b), found)
    exact = a.double() * F.gelu(b.double())
    torch.testing.assert_close(torch.from_numpy(found[0]).double(), exact, atol=1e-6, rtol=2e-7)


def test_it_is_compiled_once(tmp_path: Path) -> None:
    """A second process loads what the first has kept, and knows that it will."""
    code = (
        "import numpy as np\n"
        "from slidevlm.models import kernels\n"
        "before = kernels.is_compiled()\n"
        "kernels.linear(np.ones((2, 3), np.float32), None, np.ones((1, 3), np.float32), 1)\n"
        "print(before, sum(kernels.linear.stats.cache_hits.values()))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def told() -> list[str]:
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return found.stdout.split()

    assert told() == ["False", "0"]
    assert told() == ["False", "1"], "the layer, which takes longest, has not been compiled"
    for file in tmp_path.rglob("*linear*.nbi"):
        file.rename(file.with_name(file.name.replace("linear", "self_attention_layer")))
    assert told() == ["True", "0"]
