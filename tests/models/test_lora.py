"""LoRA: against peft, against its formula, and what a training step moves."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags, Batch
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.models.attention import KeyValues
from slidevlm.models.lora import LoRAConfig, LoRALinear, add_lora, merge_lora, plain_names
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

TEXT = LoRAConfig("text", ["project", "inner"], rank=3, alpha=6.0)


def shaken(model: nn.Module) -> None:
    """Away from 0, where residual branches and B start and would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def coca(*lora: LoRAConfig) -> CoCa:
    torch.manual_seed(0)
    config = dataclasses.replace(zoo.load("coca_tiny"), tile_width=6, lora=lora)
    return build_model(config, 20)


def batch_of(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = tuple(range(2, 2 + size))
    tokens = torch.randint(3, 20, (size, 6), generator=generator)
    names = tuple(f"s{i}" for i in range(size))
    return Batch(
        Bags(torch.randn(sum(lengths), 6, generator=generator), lengths),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.arange(size),
        names,
        names,
    )


def test_the_layer_is_that_of_peft(tmp_path) -> None:
    """Names and scaling are peft's: weights copied over, outputs and gradients equal."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.ModuleDict({"q_proj": nn.Linear(8, 5)}).double()
    theirs = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], lora_dropout=0.0),
    ).double()
    add_lora(plain, [])
    holder = nn.ModuleDict({"part": plain})
    add_lora(holder, [LoRAConfig("part", ["q_proj"], rank=3, alpha=7.0)])
    ours = holder["part"]["q_proj"]
    assert isinstance(ours, LoRALinear)
    shaken(theirs)
    other = theirs.base_model.model["q_proj"]
    with torch.no_grad():
        ours.lora_a.copy_(other.lora_A["default"].weight)
        ours.lora_b.copy_(other.lora_B["default"].weight)
        ours.base.load_state_dict(other.base_layer.state_dict())
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), other(x), atol=1e-12, rtol=0)
    ours(x).square().sum().backward()
    other(x).square().sum().backward()
    torch.testing.assert_close(ours.lora_a.grad, other.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_b.grad, other.lora_B["default"].weight.grad)
    assert ours.base.weight.grad is None and other.base_layer.weight.grad is None


def test_a_model_with_lora_starts_as_the_plain_one() -> None:
    plain, adapted, batch = coca().eval(), coca(TEXT).eval(), batch_of()
    for a, b in zip(outputs(plain, batch), outputs(adapted, batch), strict=True):
        assert torch.equal(a, b)
    names = plain_names(adapted)
    assert {names.get(n, n) for n in plain.state_dict()} < set(adapted.state_dict())
    assert "text.layers.0.attention.project.base.weight" in names.values()


def outputs(model: CoCa, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    out = model(batch.bags, batch.tokens, batch.token_mask)
    assert out.image_embedding is not None and out.text_embedding is not None
    assert out.logits is not None
    return out.image_embedding, out.text_embedding, out.logits


def test_a_step_moves_the_products_and_the_other_parts_and_no_base() -> None:
    model = coca(TEXT)
    shaken(model)  # where a frozen branch ends in zeros, nothing before it has a gradient
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.5), lr=1e-2, betas=(0.9, 0.99), eps=1e-8
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    objective = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    step = Step(model, optimizer, objective, resolve("fp32", torch.device("cpu")), None)
    step([batch_of()], 1e-2)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    of_text = {n for n in before if n.startswith("text.")}
    products = {n for n in of_text if n.rpartition(".")[2] in ("lora_a", "lora_b")}
    assert len(products) == 4
    assert moved & of_text == products
    assert {"slide.latents", "text_project.weight"} <= moved
    # The vocabulary projection is the frozen token embedding.
    assert "decoder.vocabulary.weight" not in moved
    assert any(n.startswith("decoder.layers") for n in moved)


def test_merging_gives_a_plain_model_of_the_same_outputs() -> None:
    everywhere = (
        TEXT,
        LoRAConfig("decoder", ["query", "outer"]),
        LoRAConfig("slide", ["key_values.project"]),
    )
    model, batch = coca(*everywhere).double().eval(), batch_of()
    shaken(model)
    batch.bags.features = batch.bags.features.double()
    expected = outputs(model, batch)
    changed = merge_lora(model)
    assert changed == 6
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert model.state_dict().keys() == coca().state_dict().keys()
    for a, b in zip(outputs(model, batch), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_dropout_acts_on_the_product_alone() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 4), 2, 2.0, 0.5)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base(x)), "B is 0"
    shaken(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_configuration_keeps_it() -> None:
    content = zoo.load("coca_tiny").to_dict() | {
        "lora": [{"part": "text", "targets": ["project"], "rank": 2, "alpha": 4}]
    }
    config = from_dict(content, "here")
    assert config.lora == (LoRAConfig("text", ["project"], rank=2, alpha=4),)
    assert from_dict(config.to_dict(), "again") == config
    assert "lora" not in zoo.load("coca_tiny").to_dict()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"part": "txt", "targets": ["project"]}, "no part 'txt'.*slide, "),
        ({"part": "text", "targets": ["q_proj"]}, "no linear layer named q_proj.*project"),
        ({"part": "text", "targets": ["project"], "rank": 0}, "rank must be at least 1"),
        ({"part": "text", "targets": ["project"], "alpha": 0}, "alpha must be greater than 0"),
        ({"part": "text", "targets": ["project"], "dropout": 1.0}, "dropout must be from 0"),
        ({"part": "text", "targets": []}, "targets must be names"),
        ({"part": "text", "targets": "project"}, "targets must be a list"),
        ({"part": "text"}, "missing key 'targets'"),
        ({"part": "text", "targets": ["project"], "r": 4}, "unknown key 'r'"),
        ({"part": "decoder", "targets": ["vocabulary"]}, "vocabulary is shared"),
        ("text", "must be a mapping"),
    ],
)
def test_what_cannot_be_is_refused(entry: object, message: str) -> None:
    content = zoo.load("coca_tiny").to_dict() | {"tile_width": 6, "lora": [entry]}
    with pytest.raises(ConfigError, match=message):
        build_model(from_dict(content, "here"), 20)


def test_two_entries_about_one_part_are_refused() -> None:
    with pytest.raises(ConfigError, match="two entries are about text.layers"):
        coca(TEXT, LoRAConfig("text.layers", ["outer"]))


def test_tile_features_read_as_they_are_pass_through_the_product() -> None:
    """The path that reads features without a copy knows a projection's weight alone."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"part": KeyValues(8, 6, 2)})
    adapted = copy.deepcopy(plain)
    add_lora(adapted, [LoRAConfig("part", ["project"])])
    features = torch.randn(7, 6).half()
    for a, b in zip(*(m["part"].of_features(features) for m in (plain, adapted)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    shaken(adapted["part"].project)
    expected = adapted["part"](features.float())
    for a, b in zip(adapted["part"].of_features(features), expected, strict=True):
        assert torch.equal(a, b)
    key, _ = adapted["part"].of_features(features)
    key.sum().backward()
    assert adapted["part"].project.lora_b.grad.abs().sum() > 0
