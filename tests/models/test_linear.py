"""Linear maps that compute their input again, against the same layers one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.models import tile_rows
from slidevlm.models.linear import (
    geglu_linear,
    gelu_linear,
    norm_linear,
    normalised_linear,
)
from slidevlm.models.tile_rows import rows_of


@pytest.fixture
def norm() -> nn.LayerNorm:
    torch.manual_seed(0)
    norm = nn.LayerNorm(6).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("standardised", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_exact_over_several_pieces(
    norm: nn.LayerNorm, monkeypatch: pytest.MonkeyPatch, with_bias: bool, standardised: bool
) -> None:
    monkeypatch.setitem(tile_rows.BYTES_AT_ONCE, "cpu", 4 * 6 * 4)
    assert [len(rows) for rows in rows_of(torch.zeros(10, 6))] == [4, 4, 2]
    features = 3 + torch.randn(10, 6, dtype=torch.float64)
    weights = [torch.randn(w, 6, dtype=torch.float64, requires_grad=True) for w in (3, 5)]
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True) if with_bias else None
    leaves = [norm.weight, norm.bias, *weights, *([] if bias is None else [bias])]
    given, standard = features.clone(), None
    if standardised:
        mean = torch.randn(6, dtype=torch.float64)
        standard = mean, 0.5 + torch.rand(6, dtype=torch.float64)
        features = (features - standard[0]) / standard[1]
    ours = torch.cat(normalised_linear(given, norm, tuple(weights), bias, standard), 1)
    expected = F.linear(
        F.layer_norm(features, (6,), norm.weight, norm.bias, norm.eps), torch.cat(weights), bias
    )
    torch.testing.assert_close(ours, expected)
    factor = torch.randn_like(expected)
    mine = torch.autograd.grad((ours * factor).sum(), leaves)
    for got, reference in zip(
        mine, torch.autograd.grad((expected * factor).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, reference)


@pytest.mark.parametrize("standardised", [True, False])
def test_features_that_need_a_gradient_get_theirs(norm: nn.LayerNorm, standardised: bool) -> None:
    features = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.float64)
    standard = (torch.randn(6).double(), 0.5 + torch.rand(6).double()) if standardised else None
    (ours,) = normalised_linear(features, norm, (weight,), standard=standard)
    (got,) = torch.autograd.grad(ours.square().sum(), features)
    tiles = features if standard is None else (features - standard[0]) / standard[1]
    reference = F.linear(norm(tiles), weight)
    (expected,) = torch.autograd.grad(reference.square().sum(), features)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_normalised_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, weight = nn.LayerNorm(6), torch.randn(3, 6)
    features = (100 + torch.randn(10, 6)).to(dtype)
    (ours,) = normalised_linear(features, norm, (weight,))
    torch.testing.assert_close(ours, F.linear(norm(features.float()), weight))


def test_autocast_decides_the_type_of_the_product() -> None:
    torch.manual_seed(0)
    norm, weight = nn.LayerNorm(6), torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (ours,) = normalised_linear(torch.randn(10, 6), norm, (weight,))
    assert ours.dtype == torch.bfloat16
    ours.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def plain(name: str, x: Tensor, norm: nn.LayerNorm, linear: nn.Module) -> Tensor:
    if name == "norm":
        return linear(norm(x))
    if name == "gelu":
        return linear(F.gelu(x))
    a, b = x.chunk(2, -1)
    return linear(a * F.gelu(b))


def recomputing(name: str, x: Tensor, norm: nn.LayerNorm, linear: nn.Module) -> Tensor:
    if name == "norm":
        return norm_linear(x, norm, linear)
    return gelu_linear(x, linear) if name == "gelu" else geglu_linear(x, linear)


every_kind = pytest.mark.parametrize("name", ["norm", "gelu", "geglu"])


@every_kind
@pytest.mark.parametrize("frozen", ["nothing", "linear", "norm", "x"])
def test_recomputing_gives_the_same_numbers(name: str, frozen: str) -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(6), nn.Linear(3 if name == "geglu" else 6, 5)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 4, 6, requires_grad=frozen != "x")
    norm.requires_grad_(frozen != "norm")
    linear.requires_grad_(frozen != "linear")
    results = []
    for way in (plain, recomputing):
        y = way(name, x, norm, linear)
        for t in (x, *norm.parameters(), *linear.parameters()):
            t.grad = None
        if y.requires_grad:
            (y * torch.arange(40.0).view(2, 4, 5)).sum().backward()
        results.append([y, *(t.grad for t in (x, *norm.parameters(), *linear.parameters()))])
    for expected, ours in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)


@every_kind
def test_only_the_input_is_kept(name: str) -> None:
    norm, linear = nn.LayerNorm(6), nn.Linear(3 if name == "geglu" else 6, 5)
    x = torch.randn(50, 6, requires_grad=True)
    known = {t.data_ptr() for t in (x, *norm.parameters(), *linear.parameters())}
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(0 if t.data_ptr() in known else t.numel()) or t, lambda t: t
    ):
        recomputing(name, x, norm, linear)
        assert sizes and max(sizes) == 0
        plain(name, x, norm, linear)
        assert max(sizes) > 0


@every_kind
def test_autocast_is_the_same_in_the_backward_pass(name: str) -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(6), nn.Linear(3 if name == "geglu" else 6, 5)
    x = torch.randn(7, 6, requires_grad=True)
    results = []
    for way in (plain, recomputing):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = way(name, x, norm, linear)
        (gradient, weight) = torch.autograd.grad(y.float().square().sum(), (x, linear.weight))
        assert y.dtype == torch.bfloat16 and weight.dtype == torch.float32
        results.append((y, gradient, weight))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-2, rtol=2e-2)


@every_kind
def test_a_replaced_layer_is_called(name: str) -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    norm, linear = nn.LayerNorm(6), Other(3 if name == "geglu" else 6, 5)
    x = torch.randn(7, 6, requires_grad=True)
    torch.testing.assert_close(
        recomputing(name, x, norm, linear), plain(name, x, norm, linear), atol=0, rtol=0
    )
