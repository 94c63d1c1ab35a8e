"""What holds for every slide encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError, DataError
from slidevlm.models.attention import initialise
from slidevlm.models.slide import SLIDE_ENCODERS, SlideEncoder

LENGTHS = (7, 1, 30, 3)
TILE_WIDTH = 12
SMALL: dict[str, dict[str, Any]] = {
    "perceiver": {"latents": 3, "blocks": 3, "self_layers": 1, "heads": 2},
    "transformer": {"layers": 2, "heads": 2, "tokens": 3},
    "longnet": {
        "layers": 2,
        "heads": 4,
        "tokens": 3,
        "segments": [4, 8, 16],
        "dilations": [1, 2, 4],
    },
    "transmil": {"heads": 2},
    "pooler": {"tokens": 3, "heads": 2},
    "abmil": {"hidden": 5, "branches": 2},
    "mean": {},
}
PUBLISHED = {"read": "features", "positions": "none", "moments": False, "query_residual": False}
# Name of the case -> encoder, further options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SMALL},
    "perceiver published": ("perceiver", {**PUBLISHED, "output_width": 8}),
    "transformer alibi": ("transformer", {"positions": "alibi"}),
    "transformer without positions": ("transformer", {"positions": "none"}),
    "transformer windows": ("transformer", {"window": 5000.0}),
    "transformer windows alibi": ("transformer", {"window": 5000.0, "positions": "alibi"}),
    "transmil rows": ("transmil", {"order": "rows"}),
    "abmil batch norm": ("abmil", {"input_norm": "batch"}),
    "abmil without norm": ("abmil", {"input_norm": "none"}),
}
NEED_POSITIONS = {
    "transformer",
    "transformer alibi",
    "transformer windows",
    "transformer windows alibi",
    "longnet",
    "transmil rows",
}
every_case = pytest.mark.parametrize("case", CASES)


def encoder_for(case: str, **options: Any) -> SlideEncoder:
    name, more = CASES[case]
    cls = SLIDE_ENCODERS[name]
    torch.manual_seed(0)
    encoder = cls(cls.Config(width=16, **{**SMALL[name], **more, **options}), TILE_WIDTH)
    initialise(encoder)
    with torch.no_grad():  # branches that start at 0 would hide mistakes
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.double().eval()


def bags_for(lengths: tuple[int, ...] = LENGTHS) -> Bags:
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    features = torch.randn(total, TILE_WIDTH, generator=generator, dtype=torch.float64)
    # Distinct, on a grid of tiles.
    places = torch.randperm(10_000, generator=generator)[:total]
    positions = 256.0 * torch.stack([places % 100, places // 100], 1)
    slides = (torch.arange(total) % 2).long()
    return Bags(features, lengths, positions, slides, "um")


def rows(bags: Bags, order: Tensor, lengths: tuple[int, ...]) -> Bags:
    assert bags.positions is not None and bags.slides is not None
    features, positions, slides = bags.features[order], bags.positions[order], bags.slides[order]
    return Bags(features, lengths, positions, slides, bags.unit)


def test_every_registered_encoder_is_tested() -> None:
    assert {*SLIDE_ENCODERS} == {*SMALL, "vit"}
    assert SLIDE_ENCODERS["vit"] is SLIDE_ENCODERS["transformer"]


@every_case
def test_a_bag_alone_or_in_any_batch_gives_the_same_tokens(case: str) -> None:
    encoder, bags = encoder_for(case), bags_for()
    together = encoder(bags)
    assert together.shape[0] == len(LENGTHS) and together.shape[2] == encoder.width
    starts = [sum(LENGTHS[:b]) for b in range(len(LENGTHS))]
    for b, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
        alone = encoder(rows(bags, torch.arange(start, start + length), (length,)))
        torch.testing.assert_close(alone[0], together[b], atol=1e-9, rtol=1e-9)
    backwards = [torch.arange(s, s + n) for s, n in zip(starts, LENGTHS, strict=True)][::-1]
    turned = encoder(rows(bags, torch.cat(backwards), LENGTHS[::-1]))
    torch.testing.assert_close(turned.flip(0), together, atol=1e-9, rtol=1e-9)


@every_case
def test_order_of_tiles_has_no_effect(case: str) -> None:
    encoder, bags = encoder_for(case), bags_for()
    order = torch.cat([s + torch.randperm(n) for s, n in zip((0, 7, 8, 38), LENGTHS, strict=True)])
    before, after = encoder(bags), encoder(rows(bags, order, LENGTHS))
    if case == "transmil":  # as published: the image of tiles is made in the order they come
        assert not torch.allclose(before, after)
    else:
        torch.testing.assert_close(after, before, atol=1e-9, rtol=1e-9)


@every_case
def test_every_tile_and_every_parameter_has_an_influence(case: str) -> None:
    encoder, bags = encoder_for(case), bags_for()
    encoder.train()
    bags.features.requires_grad_()
    torch.manual_seed(3)
    tokens = encoder(bags)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert (bags.features.grad.abs().sum(1) > 0).all()
    without = [name for name, p in encoder.named_parameters() if not p.grad.abs().sum() > 1e-6]
    assert without == []


@every_case
def test_groups_hold_each_parameter_once(case: str) -> None:
    encoder = encoder_for(case)
    seen: list[int] = []
    for name, parts in encoder.groups():
        assert name and parts
        for part in parts:
            own = [part] if isinstance(part, nn.Parameter) else part.parameters()
            seen += [id(p) for p in own]
    assert sorted(seen) == sorted(id(p) for p in encoder.parameters())
    names = [name for name, _ in encoder.groups()]
    assert len(set(names)) == len(names)


@every_case
def test_checkpointing_changes_no_gradient_and_saves_memory(case: str) -> None:
    bags = bags_for()
    gradients, kept = [], []
    for checkpointing in (False, True):
        encoder = encoder_for(case).train()  # with dropout, which must be replayed
        encoder.checkpointing = checkpointing
        sizes: list[int] = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            tokens = encoder(bags)
        (tokens * torch.arange(tokens.numel()).view_as(tokens)).sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
        kept.append(sum(sizes))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
    assert kept[1] < kept[0] or case == "mean"  # which has no block


def kept_bytes(case: str, tiles: int) -> int:
    """Bytes kept for the backward pass of a bag on a grid of 20 columns."""
    encoder = encoder_for(case, **({"landmarks": 4} if case.startswith("transmil") else {}))
    bags = bags_for((tiles,))
    places = torch.arange(tiles)
    bags.positions = 256.0 * torch.stack([places % 20, places // 20], 1)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens = encoder.train()(bags)
    assert tokens.requires_grad
    return sum(kept.values())


@every_case
def test_what_is_kept_grows_with_the_tiles_and_not_with_their_square(case: str) -> None:
    few, more, many = (kept_bytes(case, tiles) for tiles in (900, 1800, 3600))
    assert few <= more  # mean keeps no more than its moments
    assert many - more == pytest.approx(2 * (more - few), rel=0.15)


@every_case
def test_half_precision_features_are_read(case: str) -> None:
    encoder = encoder_for(case).float()
    bags = bags_for()
    bags.features = bags.features.half()
    tokens = encoder(bags)
    assert tokens.dtype == torch.float32 and tokens.isfinite().all()
    bags.features = bags.features.float()
    torch.testing.assert_close(tokens, encoder(bags), atol=2e-3, rtol=1e-3)


@every_case
def test_one_tile_trains(case: str) -> None:
    encoder = encoder_for(case).train()
    encoder(rows(bags_for(), torch.tensor([0]), (1,))).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@every_case
def test_positions_are_demanded_where_they_are_needed(case: str) -> None:
    encoder, bags = encoder_for(case), bags_for()
    bags.positions = bags.slides = bags.unit = None
    if case in NEED_POSITIONS:
        with pytest.raises(DataError, match=f"'{CASES[case][0]}' needs the positions of tiles"):
            encoder(bags)
    else:
        encoder(bags)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mean", {"width": 0}, "slide.width must be at least 1, not 0"),
        ("pooler", {"tokens": 0}, "slide.tokens must be at least 1"),
        ("pooler", {"width": 10, "heads": 3}, "slide.width 10 does not divide by 3 heads"),
        ("abmil", {"input_norm": "group"}, "slide.input_norm 'group' is not one of layer, batch"),
        ("abmil", {"branches": 0}, "slide.branches"),
        ("transformer", {"positions": "fourier"}, "slide.positions 'fourier'"),
        ("transformer", {"width": 12, "heads": 6}, "the width of a head, 2, must divide by 4"),
        ("transformer", {"window": -1.0}, "slide.window must be 0 or more"),
        ("transformer", {"layers": 0}, "slide.layers"),
        ("longnet", {"segments": [8]}, "must be equally many"),
        ("longnet", {"segments": [8, 16], "dilations": [1, 3]}, "16 does not divide by its dil"),
        ("longnet", {"segments": [8], "dilations": [2]}, "first of slide.dilations must be 1"),
        ("longnet", {"segments": ["8"], "dilations": [1]}, "must be whole numbers above 0"),
        ("longnet", {"segments": [], "dilations": []}, "at least 1"),
        ("transmil", {"order": "columns"}, "slide.order 'columns' is not one of file, rows"),
        ("transmil", {"iterations": 0}, "slide.iterations"),
    ],
)
def test_what_cannot_work_is_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SLIDE_ENCODERS[name].Config(**options)
