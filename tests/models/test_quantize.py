"""Layers of bitsandbytes in a real training step: what moves, how near, and what a file holds."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags, Batch
from slidevlm.config import BNB_LINEAR
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, build_model, zoo
from slidevlm.models.lora import LoRAConfig, merge_lora
from slidevlm.models.quantize import (
    FrozenLinear,
    Int8Linear,
    bitsandbytes,
    quantise_linears,
)
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra bnb is not installed"
)
CPU = torch.device("cpu")
FROZEN = ("int8-frozen", "nf4", "fp4")
# Greatest error of a product, in units of its standard deviation.
ERRORS = {"int8": 0.03, "int8-frozen": 0.03, "nf4": 0.35, "fp4": 0.5}


def coca(*lora: LoRAConfig) -> CoCa:
    torch.manual_seed(0)
    config = dataclasses.replace(zoo.load("coca_tiny"), tile_width=6, lora=lora)
    model = build_model(config, 20)
    with torch.no_grad():  # branches that start at 0 would hide mistakes
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


LORA = LoRAConfig("text", ["project", "inner"], rank=2)


def batch_of(first: int = 0, size: int = 4) -> Batch:
    numbers = range(first, first + size)
    draws = [torch.Generator().manual_seed(n) for n in numbers]
    bags = [torch.randn(2 + n % 5, 6, generator=g) for n, g in zip(numbers, draws, strict=True)]
    tokens = torch.stack([torch.randint(3, 20, (6,), generator=g) for g in draws])
    names = tuple(f"s{n}" for n in numbers)
    return Batch(
        Bags(torch.cat(bags), tuple(len(b) for b in bags)),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.tensor(list(numbers)),
        names,
        names,
    )


def step_for(model: CoCa) -> Step:
    objective = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.99), eps=1e-8
    )
    return Step(model, optimizer, objective, resolve("fp32", CPU), None)


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in model.state_dict().items()}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["int8", *FROZEN])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_near_the_plain_one(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    holder = nn.ModuleDict({"layer": copy.deepcopy(plain)})
    assert quantise_linears(holder, kind, training=False) == 1
    layer = holder["layer"].train(training)
    x = torch.randn(2, 5, 64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = layer(mine), plain(theirs)
    assert output.shape == expected.shape and output.dtype == expected.dtype
    assert not torch.equal(output, expected), "it is quantised"
    assert (output - expected).abs().max() < ERRORS[kind] * expected.std()
    weight = torch.randn_like(expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (mine.grad - theirs.grad).abs().max() < ERRORS[kind] * theirs.grad.std()
    if kind == "int8":
        close = (layer.weight.grad - plain.weight.grad).abs().max()
        assert close < 0.05 * plain.weight.grad.std()
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, atol=1e-5, rtol=0)
        assert layer.weight.grad.dtype == torch.float32


@needs_bitsandbytes
def test_int8_sees_every_change_of_its_weights() -> None:
    """With a gradient still there, and in evaluation, where bitsandbytes keeps the old codes."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": nn.Linear(16, 8)})
    quantise_linears(holder, "int8", training=True)
    layer, x = holder["layer"], torch.randn(3, 16)
    for training in (True, False):
        layer.train(training)
        layer(x).sum().backward()
        with torch.no_grad():
            layer.weight.mul_(2)
        expected = x @ layer.weight.T + layer.bias
        assert (layer(x) - expected).abs().max() < 0.1 * expected.std()


@needs_bitsandbytes
def test_int8_training_moves_every_weight_and_evaluates_what_it_learnt() -> None:
    model = coca()
    changed = quantise_linears(model, "int8", training=True)
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert linears == ["decoder.vocabulary"], "tied to the token embedding"
    assert changed == sum(isinstance(m, Int8Linear) for m in model.modules()) > 10
    before = state(model)
    assert before.keys() == coca().state_dict().keys()
    step = step_for(model)
    losses = [step([batch_of()], 1e-2).loss.item() for _ in range(12)]
    weights = {n for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert {f"{n}.weight" for n in weights} <= moved(model, before) | {
        "slide.positions.project.weight"
    }
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    plain = coca().eval()
    plain.load_state_dict(model.state_dict())
    batch = batch_of()
    for mine, theirs in zip(embeddings(model, batch), embeddings(plain, batch), strict=True):
        assert (mine - theirs).abs().max() < 0.05


def embeddings(model: CoCa, batch: Batch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(batch.bags), model.encode_text(batch.tokens, batch.token_mask)


@needs_bitsandbytes
def test_int8_accumulates_exactly() -> None:
    """Both passes over a micro-batch see the same codes, and a later step sees new ones."""
    gradients = []
    for sizes in [(8,), (4, 4), (2, 2, 2, 2)]:
        model = coca()
        quantise_linears(model, "int8", training=True)
        step = step_for(model)
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        batches = [batch_of(f, s) for f, s in zip(firsts, sizes, strict=True)]
        step(batches, 1e-2)
        step.optimizer.zero_grad()
        step.gradients(batches)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_forms_hold_lora_bases_alone(kind: str) -> None:
    model = coca(LORA)
    changed = quantise_linears(model, kind, training=True)
    frozen = {n for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    assert changed == len(frozen) and all(n.startswith("text.layers.0.") for n in frozen)
    assert frozen >= {"text.layers.0.attention.project.base", "text.layers.0.attention.out"}
    assert not any(p.ndim == 2 for n in frozen for p in model.get_submodule(n).parameters())
    before = state(model)
    step = step_for(model)
    losses = [step([batch_of()], 1e-2).loss.item() for _ in range(8)]
    assert losses[-1] < losses[0]
    changed_names = moved(model, before)
    assert {n for n in changed_names if n.startswith("text.")} == {
        n for n in before if n.startswith("text.") and n.endswith(("lora_a", "lora_b"))
    }
    assert any(n.startswith("slide.") for n in changed_names)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", FROZEN)
def test_files_are_plain_and_give_the_same_codes_again(kind: str) -> None:
    model = coca(LORA)
    quantise_linears(model, kind, training=True)
    saved = state(model)
    assert saved.keys() == coca(LORA).state_dict().keys()
    assert {v.dtype for v in saved.values()} == {torch.float32}
    again = coca(LORA)
    again.load_state_dict(saved)  # a plain model; no bitsandbytes needed
    batch = batch_of()
    quantise_linears(again, kind, training=True)
    for a, b in zip(embeddings(again, batch), embeddings(model, batch), strict=True):
        assert torch.equal(a, b), "the codes are the same"
    other = coca(LORA)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    quantise_linears(other, kind, training=True)
    other.load_state_dict(saved)  # into layers that are quantised already
    assert all(torch.equal(v, saved[n]) for n, v in other.state_dict().items())
    copied = copy.deepcopy(model)
    for a, b in zip(embeddings(copied, batch), embeddings(model, batch), strict=True):
        assert torch.equal(a, b)


@needs_bitsandbytes
def test_damaged_state_is_told_by_name() -> None:
    model = coca(LORA)
    quantise_linears(model, "nf4", training=True)
    name = "text.layers.0.attention.out.weight"
    lacking = {n: v for n, v in state(model).items() if n != name}
    with pytest.raises(RuntimeError, match=f"Missing.*{name}"):
        model.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict({**state(model), name: torch.zeros(2, 2)})


@needs_bitsandbytes
def test_a_quantised_base_merges() -> None:
    model = coca(LORA).eval()
    quantise_linears(model, "nf4", training=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    batch = batch_of()
    expected = embeddings(model, batch)
    assert merge_lora(model) == 2
    for a, b in zip(embeddings(model, batch), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@needs_bitsandbytes
def test_evaluation_needs_no_frozen_layer() -> None:
    model, batch = coca().eval(), batch_of()
    expected = embeddings(model, batch)
    with pytest.raises(ConfigError, match="is for frozen layers, and none is"):
        quantise_linears(model, "nf4", training=True)
    assert quantise_linears(model, "int8-frozen", training=False) > 10
    for a, b in zip(embeddings(model, batch), expected, strict=True):
        assert 0 < (a - b).abs().max() < 0.05


@needs_bitsandbytes
def test_names_of_bitsandbytes_classes() -> None:
    classes = set(BNB_LINEAR) - set(BNB_LINEAR.values())
    assert all(hasattr(bitsandbytes().nn, name) for name in classes)
    assert set(BNB_LINEAR.values()) == {"int8", *FROZEN}


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"needs the extra bnb: pip install 'slidevlm\[bnb\]'"):
        quantise_linears(coca(), "int8", training=True)
