"""Float32 copies of 16-bit weights: small steps count, a run goes on exactly, losses are those of
float32 within a few per cent."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from slidevlm.batch import Bags, Batch
from slidevlm.models import create_model
from slidevlm.models.cast import cast_weights
from slidevlm.precision import resolve
from slidevlm.train.masters import Masters
from slidevlm.train.optim import load_state, make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

CPU = torch.device("cpu")
# Largest distance of a loss from that of float32, as a part of it, over 20 steps.
TOLERANCE = {"fp32": 0.0, "amp_bf16": 0.03, "bf16": 0.03, "pure_bf16": 0.08}


def step_for(name: str) -> Step:
    torch.manual_seed(0)
    model = create_model("coca_tiny", tile_width=6, vocab_size=20)
    model.slide.moments_dropout.p = 0.0  # types do not draw alike
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key != "log_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    form = resolve(name, CPU)
    if form.weights_dtype is not None:
        cast_weights(model, form.weights_dtype, everything=form.everything)
    objective = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=3e-3, betas=(0.9, 0.98), eps=1e-6
    )
    return Step(model, optimizer, objective, form, 1.0)


def batches(number: int) -> list[Batch]:
    found = []
    for part in (0, 1):
        g = torch.Generator().manual_seed(2 * (number % 3) + part)
        lengths = (2, 5, 1, 4)
        features = torch.randn(sum(lengths), 6, generator=g)
        places = 1e4 * torch.rand(sum(lengths), 2, generator=g)
        tokens = torch.randint(3, 20, (4, 6), generator=g)
        mask = torch.arange(6) < torch.tensor([[3], [6], [4], [5]])
        names = tuple(f"{part}{i}" for i in range(4))
        bags = Bags(features, lengths, places, None, "um")
        ids = torch.arange(4) + 4 * part
        found.append(Batch(bags, tokens * mask, mask, ids, names, names))
    return found


def losses(step: Step, numbers: range) -> list[float]:
    return [step(batches(number), 3e-3).loss.item() for number in numbers]


def test_changes_below_the_weights_rounding_add_up() -> None:
    plain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    alone = torch.optim.SGD([plain], lr=1e-3)
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    masters = Masters(optimizer)
    for _ in range(20):
        plain.grad = torch.ones_like(plain)
        alone.step()
        weight.grad = torch.ones_like(weight)
        masters.take_gradients()
        optimizer.step()
        masters.give_weights()
        masters.of(weight).grad = None
    assert (plain == 1).all(), "without a copy every single change is rounded away"
    assert masters.of(weight).dtype == torch.float32
    torch.testing.assert_close(weight.detach().float(), torch.full((4,), 0.98), atol=4e-3, rtol=0)


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = Masters(torch.optim.SGD([weight], lr=1.0))
    for gradient in (256.0, 1.0, 1.0):  # in bfloat16 256 + 1 is 256
        weight.grad = torch.tensor([gradient], dtype=torch.bfloat16)
        masters.take_gradients()
        assert weight.grad is None
    assert masters.of(weight).grad.item() == 258.0


@pytest.mark.parametrize("name", list(TOLERANCE))
def test_losses_follow_those_of_float32(name: str) -> None:
    expected, found = losses(step_for("fp32"), range(20)), losses(step_for(name), range(20))
    assert expected[-1] < expected[0] / 2, "there is something to learn"
    far = max(abs(f - e) / e for f, e in zip(found, expected, strict=True))
    assert far <= TOLERANCE[name]
    assert (far > 0) == (name != "fp32"), "it really computes in another type"


@pytest.mark.parametrize("name", ["bf16", "pure_bf16"])
def test_moments_and_copies_are_float32_and_a_run_goes_on_exactly(name: str) -> None:
    whole = step_for(name)
    before = losses(whole, range(3))
    saved: dict[str, Any] = copy.deepcopy(whole.optimizer.state_dict())
    weights = copy.deepcopy(whole.model.state_dict())
    assert any("master" in entry for entry in saved["state"].values())
    assert all(
        tensor.dtype == torch.float32
        for entry in saved["state"].values()
        for tensor in entry.values()
        if isinstance(tensor, torch.Tensor)
    )
    expected = losses(whole, range(3, 6))
    again = step_for(name)
    again.model.load_state_dict(weights)
    load_state(again.optimizer, saved)
    assert losses(again, range(3, 6)) == expected
    assert before[0] != expected[0]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_a_float32_run_takes_the_copies_of_a_16_bit_run() -> None:
    narrow, wide = step_for("pure_bf16"), step_for("fp32")
    losses(narrow, range(2))
    load_state(wide.optimizer, copy.deepcopy(narrow.optimizer.state_dict()))
    parameter = wide.model.slide_project.weight
    copied = narrow.masters.of(narrow.model.slide_project.weight)
    assert torch.equal(parameter, copied)
    assert not any("master" in entry for entry in wide.optimizer.state_dict()["state"].values())
