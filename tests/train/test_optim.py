"""Which parameters decay, and that AdamW is AdamW with the numbers it was given."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from slidevlm.config import OPTIMIZERS
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models import CoCa, build_model, create_model, zoo
from slidevlm.models.freeze import image_groups, text_groups
from slidevlm.models.text import BioGptTower, Gpt2Tower, TextConfig, TextEncoder, TextTower
from slidevlm.models.text.gpt import BioGptConfig, Gpt2Config
from slidevlm.train.optim import (
    describe,
    layer_factors,
    load_state,
    make_optimizer,
    parameter_groups,
    set_rate,
)

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


class Relative(TextEncoder):
    """With another table, as a tower from elsewhere may have it."""

    def __init__(self, config: TextConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.distances = nn.Embedding(9, 2)

    def position_tables(self) -> list[nn.Embedding]:
        return [*super().position_tables(), self.distances]


@pytest.mark.parametrize(
    ("tower", "expected"),
    [
        (TextEncoder(TextConfig(8, 1, 2), 20), {"positions.weight"}),
        (Relative(TextConfig(8, 1, 2), 20), {"positions.weight", "distances.weight"}),
        (Gpt2Tower(Gpt2Config(end=1, width=8, heads=2, pool_heads=2), 20), {"positions.weight"}),
        (BioGptTower(BioGptConfig(end=1, width=8, heads=2), 20), {"positions.weight"}),
    ],
)
def test_each_tower_says_which_tables_are_spared(tower: TextTower, expected: set[str]) -> None:
    _, others = parameter_groups(tower, 0.1)
    spared = {n for n in names(tower, others) if tower.get_parameter(n).ndim >= 2}
    assert spared == expected


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
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=1.0, betas=(0.9, 0.99), eps=1e-8
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(id(p) for p in model.text.parameters())
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_numbers_reach_adamw() -> None:
    optimizer = make_optimizer(
        "adamw", parameter_groups(model_of("clip"), 0.125), lr=0.25, betas=(0.5, 0.75), eps=1e-3
    )
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
    optimizer = make_optimizer("adamw", parameter_groups(model, 0.3), lr=9.0, **settings)  # type: ignore[arg-type]
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
    old = make_optimizer(
        "adamw", parameter_groups(Small(), 0.2), lr=0.1, betas=(0.9, 0.999), eps=1e-8
    )
    for group in old.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    old.step()
    new = make_optimizer(
        "adamw", parameter_groups(Small(), 0.5), lr=0.3, betas=(0.8, 0.9), eps=1e-6
    )
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
        return make_optimizer(
            "adamw", parameter_groups(model, 0.1), lr=0.1, betas=(0.9, 0.99), eps=1e-8
        )

    whole, locked = optimizer("none"), optimizer("text.")
    with pytest.raises(CheckpointError, match=r"no longer are, such as text\..*same --lock-\*"):
        load_state(locked, whole.state_dict())
    with pytest.raises(CheckpointError, match="are trained now that were not, such as text"):
        load_state(whole, locked.state_dict())
    same_count = make_optimizer(
        "adamw", parameter_groups(model_of("coca"), 0.1), lr=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    state = same_count.state_dict()
    state["param_groups"][0]["names"][0] = "another"
    with pytest.raises(CheckpointError, match="1 no longer are, such as another"):
        load_state(whole, state)
    for group in state["param_groups"]:
        del group["names"]  # as in a checkpoint of before
    load_state(whole, state)


# --- other optimizers -------------------------------------------------------------------------


def made(name: str, model: nn.Module, *, decay: float = 0.0, **options: object):
    if name in ("lion", "lamb", "adopt"):
        pytest.importorskip("pytorch_optimizer")
    settings = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, **options}
    return make_optimizer(name, parameter_groups(model, decay), **settings)  # type: ignore[arg-type]


def walk(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.grad = 2 * parameter.detach() + 0.1 * noise
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name: str) -> None:
    model = Small()
    before = sum(float(p.square().sum()) for p in model.parameters())
    walk(made(name, model), model, 40)
    assert sum(float(p.square().sum()) for p in model.parameters()) < before / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes_to_the_bit(name: str, tmp_path) -> None:
    whole = Small()
    optimizer = made(name, whole, decay=0.1)
    walk(optimizer, whole, 3)
    torch.save({"optimizer": optimizer.state_dict(), "model": whole.state_dict()}, tmp_path / "c")
    walk(optimizer, whole, 3, seed=1)
    saved = torch.load(tmp_path / "c", weights_only=True)
    resumed = Small()
    resumed.load_state_dict(saved["model"])
    other = made(name, resumed, decay=0.1)
    load_state(other, saved["optimizer"])
    walk(other, resumed, 3, seed=1)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_how_every_optimizer_decays(name: str) -> None:
    """Off the weights: without a gradient they shrink by rate times decay, and exactly so."""
    model = Small()
    before = model.matrix.detach().clone(), model.vector.detach().clone()
    optimizer = made(name, model, decay=0.5, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.vector, before[1]), "vectors do not decay"
    expected = before[0] * (1 - 0.1 * 0.5)
    apart = name not in ("adam", "adamax", "sgd")
    if name == "sgd":
        torch.testing.assert_close(model.matrix, expected)  # the same, without momentum of before
    elif apart:
        torch.testing.assert_close(model.matrix, expected)
    else:
        assert not torch.allclose(model.matrix, expected)
        torch.testing.assert_close(  # a first step of the size of the rate, against the sign
            model.matrix, before[0] - 0.1 * before[0].sign(), rtol=0, atol=1e-6
        )


def test_sgd_with_momentum_by_hand() -> None:
    model = Small()
    optimizer = made("sgd", model, betas=(0.5, 0.0), lr=1.0)
    before = model.vector.detach().clone()
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    torch.testing.assert_close(model.vector, before - (1 + 1.5 + 1.75))


def test_lion_by_hand() -> None:
    """Chen et al. 2023, algorithm 2."""
    model = Small()
    optimizer = made("lion", model, betas=(0.9, 0.99), lr=0.1, decay=0.2)
    rng = np.random.default_rng(3)
    weight = model.matrix.detach().numpy().copy()
    momentum = np.zeros_like(weight)
    for _ in range(4):
        gradient = rng.normal(size=weight.shape)
        update = np.sign(0.9 * momentum + 0.1 * gradient)
        weight = weight - 0.1 * (update + 0.2 * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
        model.matrix.grad = torch.from_numpy(gradient)
        optimizer.step()
    np.testing.assert_allclose(model.matrix.detach().numpy(), weight, rtol=1e-12)


def test_an_optimizer_of_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r"--opt lion needs .* 'slidevlm\[opt\]'"):
        make_optimizer("lion", parameter_groups(Small(), 0.0), lr=1, betas=(0.9, 0.9), eps=1)


def test_moments_of_another_optimizer_are_refused() -> None:
    with pytest.raises(CheckpointError, match="with --opt radam, not adamw; resume with the same"):
        load_state(made("adamw", Small()), made("radam", Small()).state_dict())


# --- rates that fall with depth ---------------------------------------------------------------


def test_the_rate_falls_from_the_output_of_either_tower() -> None:
    model = model_of("coca")
    factors = layer_factors(model, 0.5)
    optimizer = make_optimizer(
        "sgd", parameter_groups(model, 0.1, factors), lr=1.0, betas=(0.0, 0.0), eps=1.0
    )
    set_rate(optimizer, 0.25)
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["names"]}
    decays = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["names"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    plain = parameter_groups(model, 0.1)
    assert decays == {n: g["weight_decay"] for g in plain for n in g["names"]}  # type: ignore
    by_id = {id(p): n for n, p in model.named_parameters()}
    for groups in (image_groups(model), text_groups(model)):
        for depth, (_, parts) in enumerate(reversed(groups)):
            for part in parts:
                for p in part.parameters() if isinstance(part, nn.Module) else [part]:
                    assert rates[by_id[id(p)]] == 0.25 * 0.5**depth, (depth, by_id[id(p)])
    assert rates["log_scale"] == 0.25 and rates["slide_project.weight"] == 0.25
    own = [n for n in rates if n.startswith("decoder.") and "vocabulary" not in n]
    assert own and all(rates[n] == 0.25 for n in own)
    assert rates["text.tokens.weight"] == min(v for n, v in rates.items() if n.startswith("text."))
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(moved[name] - parameter, torch.full_like(parameter, rates[name]))


def test_a_group_of_a_language_model_has_its_factor() -> None:
    model = build_model(zoo.load("lm_tiny"), 20)
    factors = layer_factors(model, 0.5)
    groups = text_groups(model)
    (first, *_) = [p for part in groups[0][1] for p in part.parameters()]  # type: ignore
    assert factors[id(first)] == 0.5 ** (len(groups) - 1)


def test_another_layer_decay_on_resume_keeps_the_moments() -> None:
    def optimizer(model: CoCa, layer_decay: float) -> torch.optim.Optimizer:
        factors = layer_factors(model, layer_decay) if layer_decay < 1 else None
        groups = parameter_groups(model, 0.1, factors)
        return make_optimizer("adamw", groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8)

    model = model_of("coca")
    old = optimizer(model, 1.0)
    walk(old, model, 2)
    moments = {n: old.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    new = optimizer(model, 0.5)
    load_state(new, old.state_dict())
    assert len(new.param_groups) > 2
    assert {g["rate_factor"] for g in new.param_groups} > {1.0, 0.5}
    for name, parameter in model.named_parameters():
        assert torch.equal(new.state[parameter]["exp_avg"], moments[name]), name
        assert new.state[parameter]["step"] == 2
    back = optimizer(model, 1.0)
    load_state(back, new.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(back.state[parameter]["exp_avg"], moments[name]), name


def test_the_groups_to_read() -> None:
    model = model_of("coca")
    told = describe(
        make_optimizer("adamw", parameter_groups(model, 0.3), lr=1.0, betas=(0.9, 0.9), eps=1.0)
    )
    lines = told.splitlines()
    heads = [x for x in lines if x.startswith("group")]
    assert heads[0].startswith("group 0: rate x 1, decay 0.3, ")
    assert heads[1].startswith("group 1: rate x 1, decay 0, ")
    assert len(lines) - 2 == len(list(model.named_parameters()))
    assert "  text.tokens.weight [20, 32]" in lines or "  text.tokens.weight [20," in told
