"""Attention over tiles against a slow float64 account that keeps every matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models import attention_maps, build_model, from_dict, resolve, zoo
from slidevlm.models.attention import CrossAttention, KeyValues
from slidevlm.models.attention_maps import report_attention, slide_attention, spread
from slidevlm.models.coca import CoCa
from slidevlm.models.slide.abmil import ABMILConfig
from slidevlm.models.slide.mean import MeanConfig
from slidevlm.models.slide.perceiver import Perceiver, PerceiverConfig
from slidevlm.models.slide.pooler import PoolerConfig
from slidevlm.models.slide.transformer import TransformerConfig

WIDTH, TILES = 12, 23
ENCODERS = {
    "perceiver": ("perceiver", PerceiverConfig(width=16, latents=5, blocks=3, heads=4)),
    "published": (
        "perceiver",
        PerceiverConfig(
            width=16, latents=5, blocks=2, heads=4, cross_heads=1, read="features",
            positions="none", moments=False, query_residual=False,
        ),
    ),
    "pooler": ("pooler", PoolerConfig(width=16, tokens=5, heads=4)),
    "transformer": ("transformer", TransformerConfig(width=16, layers=2, heads=4, tokens=5)),
    "abmil": ("abmil", ABMILConfig(width=16, hidden=8, branches=3)),
}  # fmt: skip


def model_of(kind: str, pooling: str = "attentional") -> CoCa:
    slide_type, slide = ENCODERS[kind]
    return _model(slide_type, slide, pooling)


def _model(slide_type: str, slide: object, pooling: str) -> CoCa:
    config = replace(
        zoo.load("coca_tiny"), slide_type=slide_type, slide=slide, pooling=pooling, tile_width=WIDTH
    )
    torch.manual_seed(0)
    model = build_model(resolve(config), 50, siglip=False)
    assert isinstance(model, CoCa)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def bag() -> Bags:
    torch.manual_seed(1)
    return Bags(torch.randn(TILES, WIDTH), (TILES,), 3000 * torch.rand(TILES, 2), None, "um")


def weights64(module: CrossAttention, x: Tensor, key: Tensor) -> Tensor:
    """Mean over heads of softmax(q k), written out, [Q, N] float64."""
    q = (module.norm(x).double() @ module.query.weight.double().T).unflatten(-1, (module.heads, -1))
    rows = []
    for h in range(module.heads):
        scores = q[:, h] @ key[h].double().T / q.shape[-1] ** 0.5
        rows.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
    return torch.stack(rows).mean(0)


def rollout64(encoder: Perceiver, bags: Bags) -> Tensor:
    """[latents, T]: forward rollout with whole matrices, from what the modules were given."""
    found: list[Tensor] = []
    rolled = torch.zeros(len(encoder.latents), TILES, dtype=torch.float64)

    def read(module, inputs):
        nonlocal rolled
        latents, key, _, _ = inputs
        a = weights64(module.attention, latents[0], key)
        rolled = (rolled + a) / 2 if module.residual else a
        found.append(a)

    def mix(module, inputs):
        nonlocal rolled
        x = inputs[0][0]
        q, k, _ = (module.norm(x) @ module.project.weight.T).double().chunk(3, -1)
        heads = []
        for a, b in zip(q.chunk(module.heads, -1), k.chunk(module.heads, -1), strict=True):
            heads.append((a @ b.T / a.shape[-1] ** 0.5).softmax(-1))
        rolled = (rolled + torch.stack(heads).mean(0) @ rolled) / 2

    hooks = [m.register_forward_pre_hook(read) for m in (encoder.first, encoder.further) if m]
    hooks += [m.attention.register_forward_pre_hook(mix) for m in encoder.self_attention]
    with torch.no_grad():
        encoder(bags)
    for hook in hooks:
        hook.remove()
    return rolled


def pooled64(model: CoCa, tokens: Tensor) -> Tensor:
    pooler = model.slide_pooler
    assert pooler is not None
    return weights64(pooler.attention, pooler.queries, pooler.key_values(tokens)[0][0])


@pytest.mark.parametrize("kind", ["perceiver", "published"])
@pytest.mark.parametrize("pooling", ["attentional", "cls"])
@pytest.mark.parametrize("at_once", [1 << 24, 60])
def test_perceiver(kind: str, pooling: str, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(attention_maps, "_SCORES", at_once)
    model, bags = model_of(kind, pooling), bag()
    rolled = rollout64(model.slide, bags)
    with torch.no_grad():
        first = torch.eye(5, dtype=torch.float64)[:1]
        weights = pooled64(model, model.slide(bags)) if pooling == "attentional" else first
    expected = (weights @ rolled)[0]
    found = slide_attention(model, bags)
    assert found.sum() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found.double(), expected / expected.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["pooler", "transformer"])
def test_single_reads(kind: str) -> None:
    model, bags = model_of(kind), bag()
    pool = model.slide.pool
    seen: list[tuple[Tensor, Tensor]] = []
    plain = pool._read
    pool._read = lambda context, lengths: (seen.append(context), plain(context, lengths))[1]
    with torch.no_grad():
        tokens = model.slide(bags)
        a = weights64(pool.attention, pool.queries, seen[0][0])
        expected = (pooled64(model, tokens) @ a)[0]
    del pool._read
    torch.testing.assert_close(
        slide_attention(model, bags).double(), expected, rtol=1e-4, atol=1e-6
    )


def test_abmil_weights_are_those_that_make_its_tokens() -> None:
    model, bags = model_of("abmil", "cls"), bag()
    found = slide_attention(model, bags)
    with torch.no_grad():
        tiles = model.slide.attention.project(model.slide.input_norm(bags.features)).relu()
        torch.testing.assert_close(found @ tiles, model.slide(bags)[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_the_followed_tokens_are_the_encoders(kind: str) -> None:
    model, bags = model_of(kind), bag()
    with torch.no_grad():
        _, tokens = attention_maps._trace(model.slide, bags)
        torch.testing.assert_close(tokens, model.slide(bags))


@pytest.mark.parametrize("pooling", ["attentional", "cls"])
def test_words_of_a_report(pooling: str) -> None:
    model, bags = model_of("perceiver", pooling), bag()
    tokens = torch.tensor([1, 7, 9, 4, 2])
    parts = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]])
    rolled = rollout64(model.slide, bags)
    layers: list[Tensor] = []

    def note(module, inputs):
        layers.append(weights64(module, inputs[0][0], inputs[1][0]))

    readers = [m for m in model.decoder.modules() if isinstance(m, CrossAttention)]
    hooks = [m.register_forward_pre_hook(note) for m in readers]
    with torch.no_grad():
        slide = model.slide(bags)
        model(bags, tokens[None], torch.ones(1, 5, dtype=torch.bool))
        words = torch.stack(layers).mean(0)
        if pooling == "cls":
            slide, rolled = slide[:, 1:], rolled[1:]
        if model.report_pooler is not None:
            pooler = model.report_pooler
            context: KeyValues = pooler.key_values
            words = words @ weights64(pooler.attention, pooler.queries, context(slide)[0][0])
    for hook in hooks:
        hook.remove()
    expected = parts.double() @ words @ rolled
    found = report_attention(model, bags, tokens, parts)
    torch.testing.assert_close(
        found.double(), expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-6
    )
    assert (found[0] - found[1]).abs().max() > 1e-6, "words differ"


@pytest.mark.parametrize("kind", ["gpt2", "biogpt"])
@pytest.mark.parametrize("slide_tokens", [0, 6])
def test_words_of_a_gpt(kind: str, slide_tokens: int) -> None:
    part = {"type": kind, "source": "", "start": 0, "end": 2, "heads": 4, "inner": 32}
    text = {**part, "width": 16, "context_length": 32, "tokenizer": "train"}
    slide = {"type": "perceiver", "width": 16, "latents": 5, "blocks": 2, "heads": 4}
    content = {
        "family": "coca", "embed_dim": 16, "tile_width": WIDTH, "slide": slide, "text": text,
        "decoder": {**part, "slide_tokens": slide_tokens},
    }  # fmt: skip
    torch.manual_seed(0)
    model = build_model(resolve(from_dict(content, "test")), 50, siglip=False)
    assert isinstance(model, CoCa) and model.decoder is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval()
    bags, tokens = bag(), torch.tensor([1, 7, 9, 4, 2])
    parts = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]])
    rolled = rollout64(model.slide, bags)
    asked: list[Tensor] = []
    given: list[Tensor] = []
    hooks = []
    for layer in model.decoder.layers:
        read = layer.cross_attention
        hooks.append(read.query.register_forward_hook(lambda _, __, out: asked.append(out[0])))
        hooks.append(read.key.register_forward_hook(lambda _, __, out: given.append(out[0])))
    with torch.no_grad():
        model(bags, tokens[None], torch.ones(1, 5, dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    heads = [
        (q.double() @ k.double().T / 2).softmax(-1)  # heads of width 4
        for query, key in zip(asked, given, strict=True)
        for q, k in zip(query.chunk(4, -1), key.chunk(4, -1), strict=True)
    ]
    assert len(heads) == 8, "two layers of four heads"
    words = torch.stack(heads).mean(0)
    with torch.no_grad():
        if model.report_pooler is not None:
            pooler = model.report_pooler
            keys: Tensor = pooler.key_values(model.slide(bags))[0][0]
            words = words @ weights64(pooler.attention, pooler.queries, keys)
    assert (model.report_pooler is not None) == (slide_tokens > 0)
    expected = parts.double() @ words @ rolled
    found = report_attention(model, bags, tokens, parts)
    torch.testing.assert_close(
        found.double(), expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-6
    )
    assert (found[0] - found[1]).abs().max() > 1e-6, "words differ"


def test_a_tile_that_all_look_at_has_it_all() -> None:
    key = torch.zeros(1, 9, 4)
    key[0, 3] = 100.0
    found = spread(torch.ones(1, 2, 4), key, torch.tensor([[0.5, 0.5]]))
    assert found[0, 3] == pytest.approx(1.0)


def test_an_encoder_without_attention_is_refused() -> None:
    model = _model("mean", MeanConfig(), "cls")
    with pytest.raises(ConfigError, match="mean has no attention over single tiles"):
        slide_attention(model, bag())
