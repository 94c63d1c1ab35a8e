"""The whole model: what it depends on, what it must not depend on, how it starts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.losses import caption_loss_sum
from slidevlm.models import CoCa, build_model, create_model, from_dict, tile_rows, zoo
from slidevlm.models.attention import initialise
from slidevlm.models.slide.base import FourierPositions, Standardise
from slidevlm.models.slide.perceiver import Perceiver, PerceiverConfig
from slidevlm.models.tile_rows import Moments

LENGTHS = (7, 1, 30, 3)
NAMES = [
    name
    for name in zoo.names()
    if zoo.load(name).text_type == "scratch"
    and zoo.load(name).family != "lm"
    and "large" not in name
]


def model_for(name: str = "coca_tiny", width: int = 12, vocab: int = 50) -> CoCa:
    torch.manual_seed(0)
    model = create_model(name, tile_width=width, vocab_size=vocab).eval()
    with torch.no_grad():  # branches that start at 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def bags_for(lengths: tuple[int, ...] = LENGTHS, width: int = 12, seed: int = 1) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return Bags(
        torch.randn(total, width, generator=generator),
        lengths,
        2e4 * torch.rand(total, 2, generator=generator),
        None,
        "um",
    )


def alone(bags: Bags, b: int) -> Bags:
    start = sum(bags.lengths[:b])
    rows = slice(start, start + bags.lengths[b])
    return Bags(bags.features[rows], (bags.lengths[b],), bags.positions[rows], None, bags.unit)


@pytest.mark.parametrize("name", NAMES)
def test_batch_composition_never_changes_an_embedding(name: str) -> None:
    model, bags = model_for(name), bags_for()
    with torch.no_grad():
        together = model.encode_image(bags)
        for b in range(len(bags)):
            torch.testing.assert_close(
                model.encode_image(alone(bags, b))[0], together[b], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("name", NAMES)
def test_right_padding_never_changes_a_text_embedding_or_logits(name: str) -> None:
    model, bags = model_for(name), bags_for()
    tokens = torch.randint(3, 50, (4, 9))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.int64)], 1)
    longer = torch.cat([mask, torch.zeros(4, 5, dtype=torch.bool)], 1)
    with torch.no_grad():
        short, long = model(bags, tokens, mask), model(bags, padded, longer)
    torch.testing.assert_close(short.text_embedding, long.text_embedding, atol=1e-5, rtol=0)
    if short.logits is not None:
        torch.testing.assert_close(short.logits, long.logits[:, :8], atol=1e-5, rtol=1e-5)


def test_shapes_and_norms() -> None:
    model, bags = model_for(), bags_for()
    tokens = torch.randint(3, 50, (4, 9))
    output = model(bags, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert output.image_embedding.shape == output.text_embedding.shape == (4, 32)
    assert output.logits.shape == (4, 8, 50)
    assert output.logit_bias is None
    torch.testing.assert_close(output.image_embedding.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(output.text_embedding.norm(dim=-1), torch.ones(4))
    assert model(bags, tokens, tokens > 0, with_logits=False).logits is None


def test_logits_depend_on_the_slide_and_only_on_earlier_tokens() -> None:
    model = model_for()
    tokens = torch.randint(3, 50, (4, 9))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        first = model(bags_for(), tokens, mask).logits
        other = model(bags_for(seed=2), tokens, mask).logits
        changed = tokens.clone()
        changed[:, 5] = 3 + (changed[:, 5] - 2) % 47
        later = model(bags_for(), changed, mask).logits
    assert (first - other).abs().max() > 1e-3
    torch.testing.assert_close(first[:, :5], later[:, :5])
    assert (first[:, 5:] - later[:, 5:]).abs().max() > 1e-3


def test_the_gist_reaches_the_logits_without_the_slide_tokens() -> None:
    tiny = zoo.load("coca_tiny")
    decoder = dataclasses.replace(tiny.decoder, gist=True)
    model = build_model(dataclasses.replace(tiny, tile_width=12, decoder=decoder), 50).eval()
    model.decoder.view = lambda tokens: [(torch.zeros(2, 4, 1, 8),) * 2]  # all slides look alike
    tokens = torch.tensor([[1, 5, 6, 2]] * 2)
    with torch.no_grad():
        logits = model(bags_for((4, 9)), tokens, tokens > 0).logits
        assert not torch.allclose(logits[0], logits[1], atol=1e-4)
        model.gist.weight.zero_()
        logits = model(bags_for((4, 9)), tokens, tokens > 0).logits
    torch.testing.assert_close(logits[0], logits[1])


def test_words_of_the_slides_embedding_are_more_likely() -> None:
    tiny = zoo.load("coca_tiny")
    decoder = dataclasses.replace(tiny.decoder, words=3.0)
    model = build_model(dataclasses.replace(tiny, tile_width=12, decoder=decoder), 50).eval()
    table = torch.zeros(50, 8)
    model.prior.set_table(table)
    tokens = torch.tensor([[1, 5, 6, 2]] * 4)
    with torch.no_grad():
        output = model(bags_for(), tokens, tokens > 0)
        # Token 7 says just what the first slide's embedding says, as far as the prior can.
        table[7] = output.image_embedding[0] @ model.prior.project.weight
        model.prior.set_table(table)
        told = model(bags_for(), tokens, tokens > 0)
    gain = told.logits - output.logits
    expected = 3 * output.image_embedding @ model.prior.project.weight @ table[7]  # [B]
    torch.testing.assert_close(gain[:, :, 7], expected[:, None].expand(4, 3), atol=1e-5, rtol=1e-4)
    assert expected[0] > 0.01 and gain[:, :, :7].abs().max() < 1e-5


def test_words_without_a_prior_are_refused() -> None:
    content = zoo.load("coca_tiny").to_dict()
    content["decoder"]["words"] = 1.0
    content["text"]["prior_rank"] = 0
    with pytest.raises(ConfigError, match="decoder.words needs a text prior"):
        from_dict(content, "mine.json")


def test_clip_has_no_decoder() -> None:
    model = model_for("clip_stage_1")
    assert model.decoder is None
    tokens = torch.randint(3, 50, (4, 9))
    assert model(bags_for(), tokens, tokens > 0).logits is None


def test_order_of_tiles_does_not_matter_but_their_positions_do() -> None:
    model, bags = model_for(), bags_for((20,))
    order = torch.randperm(20)
    shuffled = Bags(bags.features[order], (20,), bags.positions[order], None, "um")
    swapped = Bags(bags.features, (20,), bags.positions[order], None, "um")
    without = Bags(bags.features, (20,))
    with torch.no_grad():
        plain = model.encode_image(bags)
        torch.testing.assert_close(model.encode_image(shuffled), plain, atol=1e-5, rtol=0)
        assert (model.encode_image(swapped) - plain).abs().max() > 1e-3
        assert (model.encode_image(without) - plain).abs().max() > 1e-3


def test_positions_carry_what_features_do_not() -> None:
    """Bags whose classes differ only in where the marked tiles lie: beside each other or far
    apart. With positions the classes are learned, without them they cannot be."""
    accuracy = {}
    for kind in ("fourier", "none"):
        torch.manual_seed(0)
        config = zoo.load("coca_tiny")
        config = dataclasses.replace(
            config, tile_width=4, slide=dataclasses.replace(config.slide, positions=kind)
        )
        model = CoCa(config, 20)
        head = nn.Linear(32, 2)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
        for _ in range(150):
            bags, labels = marked(64)
            loss = nn.functional.cross_entropy(head(model.encode_image(bags)) * 10, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bags, labels = marked(400)
        with torch.no_grad():
            accuracy[kind] = (
                (head(model.eval().encode_image(bags)).argmax(1) == labels).float().mean()
            )
    assert accuracy["fourier"] > 0.9
    assert accuracy["none"] < 0.6


def marked(count: int) -> tuple[Bags, torch.Tensor]:
    """16 tiles a bag at random places, two of them marked: left (0) or right (1) half."""
    labels = torch.randint(0, 2, (count,))
    features = 0.1 * torch.randn(count, 16, 4)
    positions = 1e4 * (torch.rand(count, 16, 2) - 0.5)
    features[:, :2, 0] += 1.0
    positions[:, :2, 0] = positions[:, :2, 0].abs() * torch.where(labels == 1, 1.0, -1.0)[:, None]
    return Bags(features.flatten(0, 1), (16,) * count, positions.flatten(0, 1), None, "um"), labels


def test_fourier_positions_have_physical_wavelengths() -> None:
    module = FourierPositions(8)
    assert module.wavelengths.min().item() == pytest.approx(500, rel=1e-4)
    assert module.wavelengths.max().item() == pytest.approx(100_000, rel=1e-4)
    nn.init.normal_(module.project.weight)
    here = torch.tensor([[1234.0, 777.0]])
    shifted = here + torch.tensor([[500.0, 0.0]])  # a whole shortest wave, part of the others
    assert not torch.allclose(module(here), module(shifted))


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_moments_are_those_of_standardised_tiles(
    needs_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are made some rows at a time, and of a single tile."""
    monkeypatch.setitem(tile_rows.BYTES_AT_ONCE, "cpu", 4 * 3 * 2)
    standardise = Standardise(3).double()
    standardise.set(torch.tensor([5.0, -2.0, 0.0]), torch.tensor([0.1, 3.0, 1.0]))
    features = 5 + torch.randn(9, 3, dtype=torch.float64)
    features.requires_grad_(needs_gradient)
    rows = standardise.moments(features, (5, 1, 3))
    for row, bag in zip(rows, standardise(features).split([5, 1, 3]), strict=True):
        torch.testing.assert_close(row[:3], bag.mean(0))
        torch.testing.assert_close(row[3:], bag.std(0, unbiased=False), atol=2e-6, rtol=0)
    if needs_gradient:
        rows.sum().backward()
        assert features.grad is not None and features.grad.isfinite().all()


def test_moments_seen_on_the_way_are_those_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bags that begin and end within the rows taken at a time, one of a single tile."""
    monkeypatch.setitem(tile_rows.BYTES_AT_ONCE, "cpu", 4 * 3 * 4)  # four rows
    lengths = (5, 1, 2, 9, 3)
    encoder = Perceiver(PerceiverConfig(width=8, heads=2, latents=2), 3)
    initialise(encoder)
    encoder.eval().double()
    assert encoder.standardise is not None and encoder.moments is not None
    encoder.standardise.set(torch.tensor([5.0, -2.0, 0.0]), torch.tensor([0.1, 3.0, 1.0]))
    torch.nn.init.normal_(encoder.moments.weight)
    features = (5 + torch.randn(sum(lengths), 3)).double()
    alone = encoder.moments(encoder.standardise.moments(features, lengths))
    apart, made = encoder.standardise.moments, []

    def moments(features: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        made.append(features.requires_grad)
        return apart(features, lengths)

    monkeypatch.setattr(encoder.standardise, "moments", moments)
    for data in (features, features.clone().requires_grad_()):
        latents, tiles = encoder.begin(Bags(data, lengths))
        torch.testing.assert_close(latents - encoder.latents, alone[:, None].expand_as(latents))
        assert tiles.shape == (sum(lengths), 8)
    assert made == [True], "those of data are seen on the way"


def test_moments_do_not_depend_on_the_bags_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tile_rows.BYTES_AT_ONCE, "cpu", 4 * 3 * 4)
    first, second = torch.randn(7, 3), torch.randn(9, 3)
    standardise = Standardise(3)
    both = standardise.moments(torch.cat([first, second]), (7, 9))
    assert torch.equal(both[1:], standardise.moments(second, (9,)))


@pytest.mark.parametrize("lengths", [(2, 9), (2, 3), (6, 0), ()])
def test_moments_of_other_lengths_than_the_tiles_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tiles"):
        watched = Moments(lengths)
        watched.add(torch.randn(6, 3))
        watched.found()


def test_moments_of_a_large_mean_lose_no_digits() -> None:
    """A channel of 1000 with a deviation of a hundredth, not standardised; parts of 8 rows."""
    features = 1000 + 0.01 * torch.randn(64, 2)
    watched = Moments((64,))
    for rows in features.split(8):
        watched.add(rows)
    mean, deviation = watched.found().view(2, 2)
    exact = features.double()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(deviation.double(), exact.std(0, unbiased=False), rtol=0.02, atol=0)


def test_moments_of_half_precision_have_32_bits() -> None:
    """70,000 tiles of about 1 have a sum beyond float16, and a deviation of a hundredth."""
    features = (1 + 0.01 * torch.randn(70_000, 2)).half()
    mean, deviation = Standardise(2).moments(features, (70_000,)).view(2, 2)
    torch.testing.assert_close(mean, features.float().mean(0))
    torch.testing.assert_close(deviation, features.float().std(0), atol=1e-5, rtol=1e-3)


def test_prior_makes_untrained_texts_comparable() -> None:
    """With a table the untrained text tower is that table's space."""
    model = create_model("coca_tiny", tile_width=4, vocab_size=10).eval()
    table = torch.zeros(10, 8)
    table[3, 0] = table[4, 0] = table[5, 1] = 1.0  # 3 and 4 mean the same
    model.prior.set_table(table)
    tokens = torch.tensor([[1, 3, 2, 0], [1, 4, 4, 2], [1, 5, 2, 0]])
    with torch.no_grad():
        text = model.encode_text(tokens, tokens > 0)
    cosine = text @ text.T
    assert cosine[0, 1].item() == pytest.approx(1.0, abs=1e-5)
    assert cosine[0, 2].item() == pytest.approx(0.0, abs=1e-5)
    assert model.prior.gate.item() == 0.0


def test_prior_weighs_a_repeated_token_by_the_logarithm_of_its_count() -> None:
    model = create_model("coca_tiny", tile_width=4, vocab_size=10)
    table = torch.zeros(10, 8)
    table[3, 0] = table[4, 1] = 1.0
    model.prior.set_table(table)
    tokens = torch.tensor([[1, 3, 3, 3, 4, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]).bool()  # the last 3 is padding
    row = model.prior(tokens, mask, torch.zeros(1, 32))
    x, y = (model.prior.project.weight.T @ row[0])[:2]  # back through the isometry
    assert (x / y).item() == pytest.approx(1 + math.log(3), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_uninitialised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory handed out is NaN; what the initialisation forgets stays NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):  # type: ignore[no-untyped-def]
        result = empty(*args, **kwargs)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", poisoned)
    for reset in (nn.Linear, nn.LayerNorm, nn.Embedding):
        monkeypatch.setattr(reset, "reset_parameters", lambda self: None)
    model = create_model(name, tile_width=8, vocab_size=30)
    bad = [n for n, p in model.state_dict().items() if not p.isfinite().all()]
    assert bad == []


def test_half_precision_features_are_read_as_they_are() -> None:
    model, bags = model_for(), bags_for()
    half = Bags(bags.features.half(), bags.lengths, bags.positions, None, "um")
    same = Bags(bags.features.half().float(), bags.lengths, bags.positions, None, "um")
    with torch.no_grad():
        assert torch.equal(model.encode_image(half), model.encode_image(same))


@pytest.mark.parametrize("name", ["coca_tiny", "coca_small_cohort"])
def test_logits_of_real_tokens_are_those_of_all_at_their_places(name: str) -> None:
    model, bags = model_for(name), bags_for()
    tokens = torch.randint(3, 50, (4, 9))
    mask = torch.arange(9) < torch.tensor([9, 2, 5, 1])[:, None]
    output = model(bags, tokens, mask)
    packed = model(bags, tokens, mask, only_real=True)
    assert packed.logits.shape == (8 + 1 + 4, 50)
    torch.testing.assert_close(packed.logits, output.logits[mask[:, 1:]])
    torch.testing.assert_close(
        caption_loss_sum(packed.logits, tokens, mask), caption_loss_sum(output.logits, tokens, mask)
    )


def pooled(pooling: str, slide_tokens: int, embed_dim: int = 32) -> CoCa:
    content = zoo.load("coca_tiny").to_dict()
    content |= {"pooling": pooling, "embed_dim": embed_dim, "tile_width": 12}
    content["decoder"]["slide_tokens"] = slide_tokens
    config = from_dict(content, "test")
    assert from_dict(config.to_dict(), "test") == config
    torch.manual_seed(0)
    model = build_model(config, 50).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("slide_tokens", [0, 8])
@pytest.mark.parametrize("pooling", ["attentional", "cls", "none"])
def test_pooling_decides_which_tokens_are_embedded_and_which_are_read(
    pooling: str, slide_tokens: int
) -> None:
    model, bags = pooled(pooling, slide_tokens), bags_for()
    tokens = torch.randint(3, 50, (4, 9))
    seen: list[torch.Tensor] = []
    model.slide.register_forward_hook(lambda *a: seen.append(a[2]) or a[2].retain_grad())
    for of_embedding in (True, False):
        output = model(bags, tokens, torch.ones_like(tokens, dtype=torch.bool))
        (output.image_embedding[:, 0] if of_embedding else output.logits).sum().backward()
        used = seen[-1].grad.abs().sum((0, 2)) > 0  # [8], of the encoder's tokens
        if pooling == "attentional":
            assert used.all()
        else:
            assert used.tolist() == [of_embedding] + [not of_embedding] * 7
    if pooling == "none":
        torch.testing.assert_close(
            output.image_embedding, nn.functional.normalize(seen[-1][:, 0], dim=-1)
        )


def test_pooling_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="width is 32 and embed_dim 16"):
        pooled("none", 8, embed_dim=16)
    with pytest.raises(ConfigError, match="unknown pooling 'max'"):
        pooled("max", 8)
