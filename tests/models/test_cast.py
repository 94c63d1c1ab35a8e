"""Weights in 16 bits: which of them, and what a forward pass then computes in."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from slidevlm.batch import Bags
from slidevlm.models import build_model, zoo
from slidevlm.models.cast import cast_weights

BFLOAT16 = torch.bfloat16


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(dataclasses.replace(zoo.load(name), tile_width=6), 20, siglip=False)


def inputs() -> tuple[Bags, torch.Tensor, torch.Tensor]:
    bags = Bags(torch.randn(5, 6), (2, 3), 1e4 * torch.rand(5, 2), None, "um")
    tokens = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]])
    return bags, tokens, tokens != 0


def test_linear_weights_alone_and_tied_ones_stay_tied() -> None:
    model = model_of("coca_tiny")
    count = cast_weights(model, BFLOAT16, everything=False)
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        expected = BFLOAT16 if id(parameter) in linear else torch.float32
        assert parameter.dtype == expected, name
    assert count == sum(p.numel() for p in model.parameters() if id(p) in linear) > 0
    assert model.decoder.vocabulary.weight is model.text.embedding.weight
    assert cast_weights(model, BFLOAT16, everything=False) == 0


@pytest.mark.parametrize("name", ["coca_tiny", "lm_tiny"])
def test_everything_and_the_pass_computes_in_it(name: str) -> None:
    model = model_of(name)
    cast_weights(model, BFLOAT16, everything=True)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept <= {"log_scale", "bias"}
    assert all(b.dtype == BFLOAT16 for b in model.state_dict().values() if b.ndim)
    output = model(*inputs())
    assert output.logits.dtype == BFLOAT16
    if name == "coca_tiny":  # losses are computed in float32
        assert output.image_embedding.dtype == output.text_embedding.dtype == torch.float32
        assert model.slide(inputs()[0]).dtype == BFLOAT16
        wide = model_of(name)(*inputs())
        assert (output.image_embedding - wide.image_embedding).abs().max() < 0.5


@pytest.mark.parametrize("everything", [False, True])
def test_generation_in_16_bits(everything: bool) -> None:
    model = model_of("coca_tiny").eval()
    cast_weights(model, BFLOAT16, everything=everything)
    bags, tokens, _ = inputs()
    with torch.inference_mode(), torch.autocast("cpu", BFLOAT16, enabled=not everything):
        _, cache = model.start(bags, 4)
        logits = model.step(tokens[:, :1], cache)
    assert logits.shape == (2, 20) and torch.isfinite(logits).all()
