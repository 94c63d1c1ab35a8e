"""How models start: from no uninitialised memory, at sane scales, tied as configured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.models.slide import SLIDE_ENCODERS

VOCABULARY, TILE_WIDTH = 60, 24
# Where a model of the zoo is large, fewer layers of the same kind say as much.
FEW = {"layers": 2, "latents": 16, "tokens": 16, "blocks": 3, "self_layers": 1}
ENCODERS: dict[str, dict[str, Any]] = {
    "abmil": {"input_norm": "batch"},
    "longnet": {"layers": 2, "segments": [16, 64], "dilations": [1, 4]},
    "mean": {},
    "perceiver": {"positions": "none", "read": "features", "moments": False},
    "pooler": {},
    "transformer": {"layers": 2},
    "transmil": {},
}


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Whatever is allocated without being set holds NaN, as any memory may."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = filled


def smaller(name: str) -> Any:
    """A zoo configuration, narrow tiles, a large one with fewer and narrower layers."""
    config = dataclasses.replace(zoo.load(name), tile_width=TILE_WIDTH)
    content = config.to_dict()
    kind = content["text"]["type"]
    if kind == "scratch" and config.text.width < 512:
        return config
    if "slide" in content:
        content["slide"] |= {k: v for k, v in FEW.items() if hasattr(config.slide, k)}
    if kind == "scratch":
        few: dict[str, Any] = {"layers": 2}
        content["text"] |= few
    elif kind in ("biogpt", "gpt2"):
        few = {"inner": 128, "start": 2, "end": 4}
        content["text"] |= {**few, "start": 0, "end": 2}
    else:
        pytest.importorskip("transformers")
        content["text"]["architecture"] |= {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
    if "decoder" in content:
        content["decoder"] |= few
    for lora in content.get("lora") or ():
        lora["rank"] = 2
    return from_dict(content, name)


def with_encoder(slide_type: str) -> Any:
    content = zoo.load("coca_tiny").to_dict()
    content |= {"tile_width": TILE_WIDTH}
    content["slide"] = {"type": slide_type, "width": 32, **ENCODERS[slide_type]}
    return from_dict(content, slide_type)


def build(config: Any, *, siglip: bool = False) -> CoCa:
    torch.manual_seed(0)
    return build_model(config, VOCABULARY, siglip=siglip)


def bags_for() -> Bags:
    generator = torch.Generator().manual_seed(1)
    lengths = (40, 3, 90)
    features = 2.0 * torch.randn(sum(lengths), TILE_WIDTH, generator=generator)
    kinds = torch.randn(3, TILE_WIDTH, generator=generator)  # of tissue, one a slide
    features = features + kinds.repeat_interleave(torch.tensor(lengths), 0)
    positions = 2e4 * torch.rand(sum(lengths), 2, generator=generator)
    return Bags(features, lengths, positions, None, "um")


def inputs() -> tuple[Bags, Tensor, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
    return bags_for(), tokens, torch.ones_like(tokens, dtype=torch.bool)


def assert_nothing_is_left_to_chance(config: Any) -> None:
    models = [build(config, siglip=True) for _ in range(2)]
    for (name, value), again in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert value.isfinite().all(), f"{name} holds uninitialised memory"
        assert torch.equal(value, again), f"{name} does not follow from the seed"
    for name, buffer in models[0].named_buffers():  # those not in the state dict, too
        assert buffer.isfinite().all(), name
    output = models[0](*inputs())
    found = [output.image_embedding, output.text_embedding, output.logits]
    assert all(tensor.isfinite().all() for tensor in found if tensor is not None)


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("name", zoo.names())
def test_no_model_of_the_zoo_starts_from_uninitialised_memory(name: str) -> None:
    assert_nothing_is_left_to_chance(smaller(name))


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("slide_type", ENCODERS)
def test_no_encoder_starts_from_uninitialised_memory(slide_type: str) -> None:
    assert_nothing_is_left_to_chance(with_encoder(slide_type))


def scales(model: CoCa) -> dict[str, float]:
    """Standard deviation of what each part gives on."""
    found: dict[str, float] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: found.__setitem__(name, float(output.detach().std()))

    if hasattr(model, "slide"):
        model.slide.register_forward_hook(keep("slide"))
    for i, layer in enumerate(getattr(model.text, "layers", ())):
        layer.register_forward_hook(keep(f"text.{i}"))
    if model.decoder is not None:
        for i, layer in enumerate(model.decoder.layers):
            layer.register_forward_hook(keep(f"decoder.{i}"))
    output = model.eval()(*inputs())
    if output.logits is not None:
        # The median: with tied embeddings a token makes its own logit large, one of 60 here.
        found["logits"] = float(1.48 * output.logits.detach().abs().median())
    return found


@pytest.mark.parametrize("name", zoo.names())
def test_activations_neither_grow_nor_vanish_with_depth(name: str) -> None:
    config = smaller(name)
    model = build(config)
    found = scales(model)
    # Without tiles of a bag in it, the slide would be the same for all.
    if "slide" in found:
        slides = model.slide(bags_for())
        assert 0.05 < (slides - slides.mean(0)).std() < 5 and 0.05 < found["slide"] < 5
    for part in ("text", "decoder"):
        values = [value for key, value in found.items() if key.startswith(part)]
        assert all(0.005 < value < 5 for value in values)
        assert max(values, default=0) <= 3 * min(values, default=0)  # branches start small
    if "logits" in found:  # a guess at first is near uniform: its loss near log V
        assert found["logits"] < 2


@pytest.mark.parametrize("slide_type", ENCODERS)
def test_every_encoder_starts_at_a_sane_scale_and_tells_slides_apart(slide_type: str) -> None:
    model = build(with_encoder(slide_type)).eval()
    slides = model.slide(bags_for())
    assert 0.01 < (slides - slides.mean(0)).std() < 5
    image = model.encode_image(bags_for())
    assert (image[0] - image[1]).norm() > 0.01


def test_forty_layers_start_as_gently_as_two() -> None:
    content = zoo.load("coca_tiny").to_dict() | {"tile_width": TILE_WIDTH}
    found = []
    for layers in (2, 40):
        content["text"]["layers"] = content["decoder"]["layers"] = layers
        content["slide"] |= {"blocks": layers, "self_layers": 3}
        model = build(from_dict(content, "deep"))
        output = model(*inputs())
        output.logits.square().mean().backward()
        gradient = model.text.tokens.weight.grad.norm()
        found.append((output.logits.std().item(), gradient.item()))
    assert found[1] == pytest.approx(found[0], rel=0.5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_projection_is_tied_as_configured(tied: bool) -> None:
    content = zoo.load("coca_tiny").to_dict() | {"tile_width": TILE_WIDTH}
    content["decoder"]["tied"] = tied
    model = build(from_dict(content, "test"))
    assert model.decoder is not None
    same = model.decoder.vocabulary.weight is model.text.tokens.weight
    assert same == tied
    count = sum(p.numel() for p in model.parameters())
    expected = 0 if tied else VOCABULARY * model.text.width
    content["decoder"]["tied"] = True
    assert count - sum(p.numel() for p in build(from_dict(content, "")).parameters()) == expected
    # After an optimizer step, too.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*inputs()).logits.square().mean().backward()
    optimizer.step()
    assert torch.equal(model.decoder.vocabulary.weight, model.text.tokens.weight) == tied


@pytest.mark.parametrize("slide_type", ENCODERS)
def test_a_model_with_any_encoder_learns(slide_type: str) -> None:
    model = build(with_encoder(slide_type))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    bags, tokens, mask = inputs()
    losses = []
    for _ in range(25):
        output = model(bags, tokens, mask)
        scores = output.logit_scale * output.image_embedding @ output.text_embedding.T
        loss = nn.functional.cross_entropy(scores, torch.arange(3))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses[-5:]) < 0.5 * losses[0]


def test_every_encoder_is_here() -> None:
    assert {*ENCODERS, "vit"} == {*SLIDE_ENCODERS}
