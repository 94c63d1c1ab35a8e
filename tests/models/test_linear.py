"""The fused layer norm and linear map against layer norm, then linear map, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slidevlm.models import linear
from slidevlm.models.linear import normalised_linear


@pytest.fixture
def norm() -> nn.LayerNorm:
    torch.manual_seed(0)
    norm = nn.LayerNorm(6).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_exact_over_several_pieces(
    norm: nn.LayerNorm, monkeypatch: pytest.MonkeyPatch, with_bias: bool
) -> None:
    monkeypatch.setattr(linear, "ROWS_AT_ONCE", 4)
    features = 3 + torch.randn(10, 6, dtype=torch.float64)
    weights = [torch.randn(w, 6, dtype=torch.float64, requires_grad=True) for w in (3, 5)]
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True) if with_bias else None
    leaves = [norm.weight, norm.bias, *weights, *([] if bias is None else [bias])]
    ours = torch.cat(normalised_linear(features, norm, tuple(weights), bias), 1)
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


def test_features_that_need_a_gradient_get_theirs(norm: nn.LayerNorm) -> None:
    features = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.float64)
    (ours,) = normalised_linear(features, norm, (weight,))
    (got,) = torch.autograd.grad(ours.square().sum(), features)
    reference = F.linear(norm(features), weight)
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
