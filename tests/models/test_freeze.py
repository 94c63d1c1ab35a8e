"""Locked towers in real training steps: what moves, what does not, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags, Batch
from slidevlm.errors import ConfigError
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.models.freeze import (
    image_groups,
    lock_image,
    lock_text,
    nothing_to_train,
    text_groups,
)
from slidevlm.models.lora import LoRAConfig, add_lora
from slidevlm.models.slide import SLIDE_ENCODERS
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

CPU = torch.device("cpu")
ABMIL = {"type": "abmil", "width": 16, "input_norm": "batch"}
SMALL: dict[str, dict[str, Any]] = {
    "longnet": {"segments": [4, 8], "dilations": [1, 2]},
    "transmil": {"landmarks": 4},
}
IMAGE = ("slide.", "slide_pooler.", "slide_project.")
TEXT = ("text.", "text_project.", "prior.")


def model_of(family: str = "coca", dropout: float = 0.0, **parts: Any) -> CoCa:
    """coca_tiny with two text layers, away from the zeros that it starts at."""
    content = zoo.load("coca_tiny").to_dict() | {"tile_width": 6, "family": family}
    content["text"] = content["text"] | {"layers": 2, "dropout": dropout}
    content["slide"] = parts.get("slide") or content["slide"] | {
        "dropout": dropout,
        "moments_dropout": dropout,
    }
    if family == "clip":
        del content["decoder"]
    torch.manual_seed(0)
    model = build_model(from_dict(content, "here"), 20)
    assert isinstance(model, CoCa)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(first: int = 0, size: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    numbers = range(first, first + size)
    draws = [torch.Generator().manual_seed(n) for n in numbers]
    bags = [torch.randn(3 + n % 5, 6, generator=g) for n, g in zip(numbers, draws, strict=True)]
    places = [1e4 * torch.rand(len(b), 2, generator=g) for b, g in zip(bags, draws, strict=True)]
    tokens = torch.stack([torch.randint(3, 20, (6,), generator=g) for g in draws])
    names = tuple(f"s{n}" for n in numbers)
    return Batch(
        Bags(torch.cat(bags).to(dtype), tuple(map(len, bags)), torch.cat(places), None, "um"),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.tensor(list(numbers)),
        names,
        names,
    )


def step_for(model: CoCa) -> Step:
    objective = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.5), lr=1e-2, betas=(0.9, 0.99), eps=1e-8
    )
    return Step(model, optimizer, objective, resolve("fp32", CPU), None)


def moved_by_steps(model: CoCa, steps: int = 2) -> set[str]:
    """Names of parameters and buffers that steps have changed by as much as a bit."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    step = step_for(model)
    held = [p for group in step.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    for i in range(steps):
        step([batch_of(4 * i)], 1e-2)
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


def parameters(model: CoCa, prefixes: tuple[str, ...]) -> set[str]:
    # Tied to the token embedding, which belongs to the text tower.
    return {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


def of_groups(model: CoCa, groups: list[Any]) -> set[str]:
    held = {
        id(p)
        for _, parts in groups
        for part in parts
        for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    }
    return {n for n, p in model.named_parameters() if id(p) in held}


@pytest.mark.parametrize("kind", list(SLIDE_ENCODERS))
def test_groups_hold_every_parameter_of_a_tower_once(kind: str) -> None:
    slide = {"type": kind, "width": 16, **SMALL.get(kind, {})}
    if kind not in ("abmil", "mean"):
        slide["heads"] = 2
    model = model_of(slide=slide)
    for groups, prefixes in ((image_groups(model), IMAGE), (text_groups(model), TEXT)):
        names = [name for group in groups for name in of_groups(model, [group])]
        assert len(names) == len(set(names))
        assert set(names) == parameters(model, prefixes)
        assert len({name for name, _ in groups}) == len(groups)


def test_lock_image_moves_nothing_of_the_image_tower() -> None:
    model = model_of()
    lock_image(model, 0, freeze_statistics=False)
    moved = moved_by_steps(model)
    assert not {n for n in moved if n.startswith(IMAGE)}
    assert parameters(model, TEXT) <= moved
    assert {"log_scale", "report_pooler.queries", "decoder.norm.weight"} <= moved


@pytest.mark.parametrize("unlocked", [1, 2, 3])
def test_the_last_image_groups_train(unlocked: int) -> None:
    model = model_of()
    groups = image_groups(model)
    lock_image(model, unlocked, freeze_statistics=False)
    moved = {n for n in moved_by_steps(model) if n.startswith(IMAGE)}
    assert moved == of_groups(model, groups[-unlocked:])
    assert "slide_project.weight" in moved and "slide.latents" not in moved


@pytest.mark.parametrize("freeze_layer_norm", [False, True])
def test_lock_text_and_its_layer_norms(freeze_layer_norm: bool) -> None:
    model = model_of()
    lock_text(model, 0, freeze_layer_norm=freeze_layer_norm)
    moved = moved_by_steps(model)
    of_norms = {
        f"{name}.{p}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and name.startswith(TEXT)
        for p in ("weight", "bias")
    }
    assert len(of_norms) == 10
    assert {n for n in moved if n.startswith(TEXT)} == (set() if freeze_layer_norm else of_norms)
    assert parameters(model, IMAGE) <= moved
    # The vocabulary projection is the frozen token embedding.
    assert "decoder.vocabulary.weight" not in moved
    assert {n for n in moved if n.startswith("decoder.layers")}


@pytest.mark.parametrize("unlocked", [1, 2])
def test_the_last_text_layers_train(unlocked: int) -> None:
    model = model_of()
    assert [name for name, _ in text_groups(model)] == [
        "embeddings",
        "layer_0",
        "layer_1, final_norm, projection",
    ]
    lock_text(model, unlocked, freeze_layer_norm=True)
    moved = {n for n in moved_by_steps(model) if n.startswith(TEXT)}
    layers = {n for n in parameters(model, TEXT) if n.startswith("text.layers.")}
    expected = {n for n in layers if int(n.split(".")[2]) >= 2 - unlocked}
    ends = {n for n in parameters(model, TEXT) if n.startswith(("text.norm", "text_pro", "prior."))}
    assert moved == expected | ends


@pytest.mark.parametrize("freeze_statistics", [False, True])
def test_statistics_of_batch_norm(freeze_statistics: bool) -> None:
    model = model_of(slide=ABMIL)
    lock_image(model, 0, freeze_statistics=freeze_statistics)
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    moved = {n for n in moved_by_steps(model) if n.startswith(IMAGE)}
    expected = set() if freeze_statistics else {f"slide.input_norm.{s}" for s in statistics}
    assert moved == expected
    model.train()
    assert model.slide.get_submodule("input_norm").training != freeze_statistics
    model.eval()
    assert not model.slide.get_submodule("input_norm").training


def test_kept_statistics_are_what_normalises() -> None:
    """In training mode a bag's embedding then does not depend on the others of its batch."""
    model = model_of(slide=ABMIL)
    lock_image(model, 0, freeze_statistics=True)
    model.train()
    alone = model.encode_image(batch_of(0, 1).bags)
    together = model.encode_image(batch_of(0, 4).bags)
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=0)
    other = model_of(slide=ABMIL)
    other.train()
    lock_image(other, 0, freeze_statistics=False)
    together = other.encode_image(batch_of(0, 4).bags)
    assert (together[:1] - other.encode_image(batch_of(0, 1).bags)).abs().max() > 1e-3


def test_frozen_layers_run_without_dropout() -> None:
    model = model_of(dropout=0.5)
    batch = batch_of()
    reads = (
        lambda: model.encode_image(batch.bags),
        lambda: model.read(batch.tokens, batch.token_mask)[1],
    )
    model.train()
    assert all(not torch.equal(read(), read()) for read in reads)
    lock_image(model, 0, freeze_statistics=False)
    lock_text(model, 0, freeze_layer_norm=False)
    for _ in range(2):
        model.train()
        assert all(torch.equal(read(), read()) for read in reads)
        model.eval()
    assert model.decoder is not None
    model.train()
    assert model.training and model.decoder.training and model.slide.training is False


def test_layers_left_trainable_keep_their_dropout() -> None:
    model = model_of(dropout=0.5)
    batch = batch_of()
    lock_text(model, 1, freeze_layer_norm=False)
    model.train()
    first, second = model.text.layers
    assert not any(m.training for m in first.modules())
    assert all(m.training for m in second.modules())
    x = torch.randn(2, 6, 32)
    assert torch.equal(first(x), first(x)) and not torch.equal(second(x), second(x))
    assert not model.text.dropout.training, "of the embeddings, which are frozen"
    assert model.text.training, "the tower itself still trains"
    assert not torch.equal(*(model.encode_text(batch.tokens, batch.token_mask) for _ in range(2)))


def test_accumulation_is_exact_with_a_frozen_tower() -> None:
    gradients = []
    for sizes in [(8,), (4, 4), (2, 2, 2, 2)]:
        model = model_of().double()
        lock_image(model, 1, freeze_statistics=False)
        lock_text(model, 0, freeze_layer_norm=False)
        model.train()
        step = step_for(model)
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        step.gradients([batch_of(f, s, torch.float64) for f, s in zip(firsts, sizes, strict=True)])
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0]["slide.latents"] is None
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            if gradient is None:
                assert other[name] is None
            else:
                torch.testing.assert_close(other[name], gradient, atol=1e-7, rtol=1e-4, msg=name)
                assert gradient.any() or name == "decoder.vocabulary.weight"


def test_what_a_lock_cannot_do() -> None:
    model = model_of()
    count = len(image_groups(model))
    for unlocked in (count, count + 5):
        with pytest.raises(
            ConfigError, match=f"groups {unlocked} leaves nothing locked.*{count} gr"
        ):
            lock_image(model, unlocked, freeze_statistics=False)
    with pytest.raises(ConfigError, match="layers 3 leaves nothing locked: the text tower has 3"):
        lock_text(model, 3, freeze_layer_norm=False)
    with pytest.raises(ConfigError, match="freeze-bn-stats: the locked groups have no BatchNorm"):
        lock_image(model, 0, freeze_statistics=True)


def test_when_nothing_is_left_to_train() -> None:
    clip = model_of("clip")
    lock_image(clip, 0, freeze_statistics=False)
    assert not nothing_to_train(clip, with_captions=True)
    lock_text(clip, 0, freeze_layer_norm=True)
    assert nothing_to_train(clip, with_captions=True)
    coca = model_of()
    lock_image(coca, 0, freeze_statistics=False)
    lock_text(coca, 0, freeze_layer_norm=True)
    assert not nothing_to_train(coca, with_captions=True)
    assert nothing_to_train(coca, with_captions=False)


def test_lora_in_a_locked_tower_is_frozen_too() -> None:
    model = model_of()
    add_lora(model, [LoRAConfig("slide", ["query"])])
    lock_image(model, 0, freeze_statistics=False)
    assert not {n for n in moved_by_steps(model) if n.startswith(IMAGE)}


def test_a_lock_is_copied_with_the_model() -> None:
    model = model_of(dropout=0.5)
    lock_image(model, 0, freeze_statistics=False)
    copied = copy.deepcopy(model)
    copied.train()
    assert not copied.slide.training and not any(p.requires_grad for p in copied.slide.parameters())
    assert embedding(copied).equal(embedding(copied))


def embedding(model: CoCa) -> Tensor:
    return model.encode_image(batch_of().bags)
