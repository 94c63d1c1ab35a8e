"""The moving average against the sum written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slidevlm.errors import CheckpointError
from slidevlm.train.average import Average


def linear() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_written_out(decay: float) -> None:
    model = linear()
    average = Average(model, decay)
    expected = model.weight.detach().double()
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.add_(0.1 * step)
        average.update(step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach().double()
    assert average.state().keys() == {"weight"}, "frozen weights are not averaged"
    torch.testing.assert_close(average.state()["weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_in_place_and_back_to_the_bit_also_after_an_error() -> None:
    model = linear()
    average = Average(model, 0.5)
    with torch.no_grad():
        model.weight.mul_(1.1)
    weight, mean = model.weight.detach().clone(), average.state()["weight"].clone()
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert torch.equal(model.weight, mean)
        raise ZeroDivisionError
    assert torch.equal(model.weight, weight) and torch.equal(average.state()["weight"], mean)
    average.put()
    assert torch.equal(model.weight, mean)


def test_an_average_of_other_weights_is_refused() -> None:
    average = Average(linear(), 0.5)
    with pytest.raises(CheckpointError, match="same --lock"):
        average.load_state({"bias": torch.zeros(2)})
