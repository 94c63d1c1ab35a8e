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


def test_four_rows_of_each() -> None:
    """As processors with registers for it have them, on any."""
    draw = torch.Generator().manual_seed(0)
    for inputs in (1, 7, 64, 515):
        weight, x = torch.randn(13, inputs, generator=draw), torch.randn(6, inputs, generator=draw)
        y = torch.full((6, 13), torch.nan)
        kernels.tile(weight.numpy(), 1, 3, x.numpy(), 2, y.numpy())
        exact = F.linear(x.double(), weight.double())
        torch.testing.assert_close(y[2:, 1:11:3].double(), exact[2:, 1:11:3], atol=3e-5, rtol=1e-5)
        assert y.isnan().sum() == 6 * 13 - 16, "nothing else is touched"


def in_16_bits(weight: torch.Tensor, shares: int = 1) -> tuple[np.ndarray, np.ndarray]:
    outputs, inputs = weight.shape
    pairs, steps = np.empty((outputs, inputs // 2), np.int32), np.empty(outputs, np.float32)
    kernels.sketch(weight.numpy(), pairs, steps, shares)
    return pairs, steps


@pytest.mark.parametrize("shares", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (6, 5), (64, 2), (514, 130)])
def test_a_product_in_16_bits(inputs: int, outputs: int, shares: int) -> None:
    """Each number to half a step, of which the largest of its row has 32,767."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=draw) * torch.logspace(-9, 9, outputs)[:, None]
    weight[:, 0] = 3 * weight.abs().amax(1)  # so that the steps of a row are large
    form = in_16_bits(weight, shares)
    half = weight.abs().amax(1).double() / 32767 * 0.501
    found = kernels.linear(form, None, torch.eye(inputs)[:24].numpy(), shares)
    exact = weight.double().T[:24]
    assert ((torch.from_numpy(found).double() - exact).abs() <= half + 2e-7 * exact.abs()).all()
    last = torch.zeros(1, inputs)
    last[0, -1] = 1
    found = kernels.linear(form, None, last.numpy(), shares)
    assert ((torch.from_numpy(found)[0].double() - weight[:, -1]).abs() <= half).all()
    for rows in (1, 2, 3):
        x, bias = torch.randn(rows, inputs, generator=draw), torch.randn(outputs, generator=draw)
        found = kernels.linear(form, bias.numpy(), x.numpy(), shares)
        exact = F.linear(x.double(), weight.double(), bias.double())
        bound = half * x.double().abs().sum(1, keepdim=True) + 1e-6 * exact.abs() + 1e-6
        assert ((torch.from_numpy(found).double() - exact).abs() <= bound).all()
        assert np.array_equal(found, kernels.linear(form, bias.numpy(), x.numpy(), 1))


def test_rows_that_16_bits_do_not_hold() -> None:
    weight = torch.randn(6, 8)
    weight[1, 3], weight[2, 5], weight[3] = torch.nan, -torch.inf, 0
    weight[4] = 1e-39
    found = kernels.linear(in_16_bits(weight), None, np.ones((1, 8), np.float32), 1)[0]
    assert (found[1:5] == 0).all()
    exact = weight.double().sum(1)[[0, 5]]
    torch.testing.assert_close(torch.from_numpy(found[[0, 5]]).double(), exact, atol=1e-3, rtol=0)


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
        "before = kernels.is_compiled(narrow=False)\n"
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


def test_what_is_compiled_last_tells_of_all() -> None:
    for narrow in (False, True):
        kernels.compile_all(narrow=narrow)
        assert kernels.is_compiled(narrow=narrow)
    forms = kernels.self_attention_layer.signatures
    assert len(forms) == len(kernels.cross_attention.signatures) == 2
    assert len(kernels.linear.signatures) == 4, "with a bias and without"
    kernels.linear(in_16_bits(torch.ones(4, 2)), None, np.ones((1, 2), np.float32), 1)
    assert len(kernels.linear.signatures) == 4
