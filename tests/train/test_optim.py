"""Which parameters decay, and that AdamW is AdamW with the numbers it was given."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from slidevlm.errors import CheckpointError
from slidevlm.models import CoCa, build_model, create_model, zoo
from slidevlm.train.optim import adamw, load_state, parameter_groups

# Of coca_tiny: matrices, and nothing else, decay; positions are a matrix that does not.
SPARED_MATRICES = {"text.positions.weight"}


def model_of(family: str) -> CoCa:
    torch.manual_seed(0)
    if family == "coca":
        return create_model("coca_tiny", tile_width=6, vocab_size=20, siglip=True)
    config = zoo.load("coca_tiny")
    return build_model(
        dataclasses.replace(config, family="clip", decoder=None, tile_width=6), 20, siglip=True
    )


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    members = {id(p) for p in group["params"]}  # type: ignore[attr-defined]
    return {n for n, p in model.named_parameters() if id(p) in members}


@pytest.mark.parametrize("family", ["coca", "clip"])
def test_matrices_decay_and_nothing_else(family: str) -> None:
    model = model_of(family)
    decayed, others = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    every = dict(model.named_parameters())
    expected = {n for n, p in every.items() if p.ndim >= 2} - SPARED_MATRICES
    assert names(model, decayed) == expected
    assert names(model, others) == every.keys() - expected
    assert names(model, others) >= SPARED_MATRICES
    for name in ("log_scale", "bias", "text.norm.weight", "text.norm.bias"):
        assert name in names(model, others), name
    assert "text.tokens.weight" in names(model, decayed)
    of_decoder = {n for n in names(model, decayed) if n.startswith("decoder.")}
    assert bool(of_decoder) == (family == "coca")


def test_a_tied_weight_is_in_one_group_once() -> None:
    model = model_of("coca")
    assert model.decoder is not None
    assert model.decoder.vocabulary.weight is model.text.tokens.weight
    groups = parameter_groups(model, 0.1)
    listed = [id(p) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    model = model_of("clip")
    model.text.requires_grad_(False)
    optimizer = adamw(model, lr=1.0, betas=(0.9, 0.99), eps=1e-8, decay=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(id(p) for p in model.text.parameters())
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_numbers_reach_adamw() -> None:
    optimizer = adamw(model_of("clip"), lr=0.25, betas=(0.5, 0.75), eps=1e-3, decay=0.125)
    for group, decay in zip(optimizer.param_groups, (0.125, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-3)
        assert group["weight_decay"] == decay
        assert not group["amsgrad"] and not group["maximize"]


class Small(nn.Module):
    """A matrix that decays and a vector that does not, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))


def written_out(
    weight: np.ndarray,
    gradients: list[np.ndarray],
    rates: list[float],
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        weight = weight - rate * decay * weight
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        corrected = first / (1 - betas[0] ** t), second / (1 - betas[1] ** t)
        weight = weight - rate * corrected[0] / (np.sqrt(corrected[1]) + eps)
    return weight


def test_steps_are_those_of_adamw_written_out() -> None:
    model = Small()
    before = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    settings = {"betas": (0.8, 0.95), "eps": 1e-2}
    optimizer = adamw(model, lr=9.0, decay=0.3, **settings)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    gradients = {n: [rng.normal(size=w.shape) for _ in range(4)] for n, w in before.items()}
    rates = [0.1, 0.2, 0.05, 0.0]
    for i, rate in enumerate(rates):
        for group in optimizer.param_groups:  # as the step does, from the schedule
            group["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name][i])
        optimizer.step()
    for name, decay in (("matrix", 0.3), ("vector", 0.0)):
        expected = written_out(before[name], gradients[name], rates, (0.8, 0.95), 1e-2, decay)
        np.testing.assert_allclose(getattr(model, name).detach().numpy(), expected, rtol=1e-12)


def test_a_resumed_optimizer_has_the_moments_of_the_old_and_its_own_settings() -> None:
    """--wd, --beta1, --beta2 and --eps given with --resume are not silently those of before."""
    old = adamw(Small(), lr=0.1, betas=(0.9, 0.999), eps=1e-8, decay=0.2)
    for group in old.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    old.step()
    new = adamw(Small(), lr=0.3, betas=(0.8, 0.9), eps=1e-6, decay=0.5)
    load_state(new, old.state_dict())
    for group, decay in zip(new.param_groups, (0.5, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.9), 1e-6)
        assert group["weight_decay"] == decay
    was, now = old.state_dict()["state"], new.state_dict()["state"]
    assert was.keys() == now.keys() == {0, 1}
    for key in was:
        assert was[key]["step"] == now[key]["step"] == 1
        assert torch.equal(was[key]["exp_avg"], now[key]["exp_avg"])
        assert torch.equal(was[key]["exp_avg_sq"], now[key]["exp_avg_sq"])


def test_moments_of_other_parameters_are_refused() -> None:
    """The bare error of torch is none a user could mend, and equal counts would go unnoticed."""

    def optimizer(frozen: str) -> torch.optim.AdamW:
        model = model_of("coca")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        return adamw(model, lr=0.1, betas=(0.9, 0.99), eps=1e-8, decay=0.1)

    whole, locked = optimizer("none"), optimizer("text.")
    with pytest.raises(CheckpointError, match=r"no longer are, such as text\..*same --lock-\*"):
        load_state(locked, whole.state_dict())
    with pytest.raises(CheckpointError, match="are trained now that were not, such as text"):
        load_state(whole, locked.state_dict())
    same_count = adamw(model_of("coca"), lr=0.1, betas=(0.9, 0.99), eps=1e-8, decay=0.1)
    state = same_count.state_dict()
    state["param_groups"][0]["names"][0] = "another"
    with pytest.raises(CheckpointError, match="1 no longer are, such as another"):
        load_state(whole, state)
    for group in state["param_groups"]:
        del group["names"]  # as in a checkpoint of before
    load_state(whole, state)
