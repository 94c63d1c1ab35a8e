"""Attention of a trained model over the tiles of a bag: exact weights, composed by rollout.

The slide encoder's cross-attentions are softmaxes over tiles; what comes after them mixes tokens.
Weights are followed backwards from what is asked for (the embedding, or words of a report) to the
tiles, as attention rollout does (Abnar and Zuidema, 2020): heads are averaged, and a residual
branch counts half, what it is added to the other half. What reaches no tile through attention (the
latents' own start, the moments of the bag) is left out and the rest scaled to a sum of 1.

Only the rows asked for are kept: memory grows with the tiles, never with latents times tiles.
Attention says where a model reads, not why it decides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.attention import (
    AttentionPooler,
    CrossAttention,
    SelfAttention,
    SelfAttentionLayer,
)
from slidevlm.models.coca import CoCa
from slidevlm.models.mode import evaluation_mode
from slidevlm.models.slide.abmil import ABMIL
from slidevlm.models.slide.base import SLIDE_ENCODERS
from slidevlm.models.slide.perceiver import Perceiver
from slidevlm.models.slide.pooler import Pooler
from slidevlm.models.slide.transformer import Transformer
from slidevlm.models.text.gpt import GptAttention, GptLayer

_SCORES = 1 << 24  # held at a time


@dataclass(frozen=True)
class _Over:
    """Tokens read tiles."""

    query: Tensor  # [H, N, d]
    key: Tensor  # [H, T, d]
    residual: bool  # what is read is added to the tokens; else it takes their place


@dataclass(frozen=True)
class _Given:
    """Tokens are weighted sums of tiles."""

    weights: Tensor  # [N, T], rows sum to 1


@dataclass(frozen=True)
class _Mix:
    """Tokens read each other, added to themselves."""

    weights: Tensor  # [N, N], rows sum to 1


_Step = _Over | _Given | _Mix


def followed(name: str) -> bool:
    """Whether the attention of slide encoders of this name can be followed to single tiles."""
    return name in SLIDE_ENCODERS and issubclass(SLIDE_ENCODERS[name], tuple(_TRACES))


def slide_attention(model: CoCa, bags: Bags) -> Tensor:
    """How much of the slide embedding's attention each tile has: [T] float32 whose sum is 1.

    Args:
        model: any CoCa whose slide encoder has attention over single tiles.
        bags: one bag.

    Raises:
        ConfigError: the encoder has none.
    """
    assert len(bags) == 1, "one bag at a time"
    with evaluation_mode(model), torch.inference_mode():
        steps, tokens = _trace(model.slide, bags)
        weights = tokens.new_zeros(1, tokens.shape[1], dtype=torch.float32)
        weights[:, 0] = 1
        if model.slide_pooler is not None:
            weights = _pooled(model.slide_pooler, tokens)
        return _backwards(steps, weights, bags.lengths[0])[0]


def report_attention(model: CoCa, bags: Bags, tokens: Tensor, parts: Tensor) -> Tensor:
    """How much of the decoder's attention each tile has, for parts of a report.

    A word's weights are the mean over layers and heads of the decoder's cross-attention at the
    place that predicts it; these lead through the report pooler and the encoder to the tiles.

    Args:
        model: with a decoder.
        bags: one bag.
        tokens: [L] of the report, BOS first.
        parts: [P, L - 1], how much each of tokens 1 to L - 1 counts in a part; rows sum to 1.

    Returns:
        [P, T] float32, rows sum to 1.

    Raises:
        ConfigError: no decoder that reads the slide by cross-attention, or no such encoder.
    """
    assert len(bags) == 1, "one bag at a time"
    if model.decoder is None:
        raise ConfigError("this model has no decoder: a clip model writes no reports")
    with evaluation_mode(model), torch.inference_mode():
        steps, slide = _trace(model.slide, bags)
        seen = _decoder_weights(model, bags, slide, tokens[None])  # [L - 1, view]
        weights = parts.to(seen) @ seen
        if model.report_pooler is not None:
            of = slide[:, 1:] if _skips_first(model, slide) else slide
            weights = weights @ _pooled(model.report_pooler, of)
        if _skips_first(model, slide):
            weights = F.pad(weights, (1, 0))
        return _backwards(steps, weights, bags.lengths[0])


def _skips_first(model: CoCa, slide: Tensor) -> bool:
    """Whether the decoder does not see token 0, as in `CoCa._view`."""
    return model.slide_pooler is None and slide.shape[1] > 1


def _decoder_weights(model: CoCa, bags: Bags, slide: Tensor, tokens: Tensor) -> Tensor:
    """[L - 1, view tokens], the mean over layers and heads of the cross-attention."""
    assert model.decoder is not None
    found: list[Tensor] = []
    mine = threading.get_ident()  # others may write reports with the same model meanwhile

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() != mine:
            return
        if isinstance(module, CrossAttention):
            query = module._queries(inputs[0])
        else:  # what it is given is normalised already
            assert isinstance(module, GptAttention)
            query = module._split(module.query(inputs[0]))
        found.append(_softmax(query[0], inputs[1][0]))

    readers = _readers(model.decoder)
    if not readers:
        raise ConfigError(
            f"no layer of the decoder {type(model.decoder).__name__} reads the slide: there is no "
            "attention of words to show"
        )
    hooks = [reader.register_forward_pre_hook(note) for reader in readers]
    try:
        image = model._embed_slide(slide, bags)
        hidden = model.text(tokens, torch.ones_like(tokens, dtype=torch.bool))
        model._write(hidden[:, :-1], image, model._view(slide), None)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).mean(0)


def _readers(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The cross-attentions of a decoder."""
    found: list[torch.nn.Module] = []
    for module in decoder.modules():
        if isinstance(module, CrossAttention):
            found.append(module)
        elif isinstance(module, GptLayer) and module.cross_attention is not None:
            found.append(module.cross_attention)
    return found


def _pooled(pooler: AttentionPooler, tokens: Tensor) -> Tensor:
    """Weights [Q, N] of a pooler's queries over tokens [1, N, C]."""
    query = pooler.attention._queries(pooler.queries[None])
    return _softmax(query[0], pooler.key_values(tokens)[0][0])


def _softmax(query: Tensor, key: Tensor) -> Tensor:
    """[H, Q, d], [H, N, d] -> the mean over heads of the weights: [Q, N] float32."""
    scores = query.float() @ key.float().transpose(1, 2) * query.shape[-1] ** -0.5
    return scores.softmax(-1).mean(0)


def _backwards(steps: list[_Step], weights: Tensor, tiles: int) -> Tensor:
    """Weights [Q, N] of the last tokens -> [Q, T] of the tiles."""
    found = weights.new_zeros(len(weights), tiles)
    for step in reversed(steps):
        if isinstance(step, _Mix):
            weights = (weights + weights @ step.weights) / 2
        elif isinstance(step, _Given):
            found += weights @ step.weights
        else:
            share = 0.5 if step.residual else 1.0
            found += share * spread(step.query, step.key, weights)
            weights = weights * (1 - share)
    return found / found.sum(1, keepdim=True)


def spread(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    """`weights @ softmax(query key / sqrt(d))`, heads averaged, a few tiles at a time.

    Args:
        query: [H, N, d].
        key: [H, T, d].
        weights: [Q, N].

    Returns:
        [Q, T] float32.
    """
    heads, count, width = query.shape
    query = query.float() * width**-0.5
    size = max(1, _SCORES // (heads * count))
    starts = range(0, key.shape[1], size)
    total = query.new_full((heads, count), float("-inf"))
    for start in starts:
        part = query @ key[:, start : start + size].float().transpose(1, 2)
        total = torch.logaddexp(total, part.logsumexp(-1))
    rows = []
    for start in starts:
        part = query @ key[:, start : start + size].float().transpose(1, 2)
        rows.append(weights @ (part - total[:, :, None]).exp().mean(0))
    return torch.cat(rows, 1)


def _trace(encoder: torch.nn.Module, bags: Bags) -> tuple[list[_Step], Tensor]:
    """How the encoder's tokens come of the tiles, and the tokens [1, N, width] themselves."""
    for kind, follow in _TRACES.items():
        if isinstance(encoder, kind):
            return follow(encoder, bags)
    known = ", ".join(sorted(kind.__name__.lower() for kind in _TRACES))
    raise ConfigError(
        f"the slide encoder {type(encoder).__name__.lower()} has no attention over single tiles "
        f"to show; these have: {known}"
    )


def _perceiver(encoder: Perceiver, bags: Bags) -> tuple[list[_Step], Tensor]:
    """`Perceiver.forward`, step by step."""
    steps: list[_Step] = []
    latents, tiles = encoder.begin(bags)
    further = [encoder.further] * (encoder.blocks - 1)
    for read in (read for read in (encoder.first, *further) if read is not None):
        key, value = encoder._context(read, tiles)
        steps.append(_Over(read.attention._queries(latents)[0], key, read.residual))
        latents = read(latents, key, value, bags.lengths)
        for layer in encoder.self_attention:
            assert isinstance(layer, SelfAttentionLayer)
            steps.append(_Mix(_self_weights(layer.attention, latents)))
            latents = layer(latents)
    if not steps:
        raise ConfigError("a perceiver of 0 blocks reads no tiles: there is no attention to show")
    if encoder.norm is not None:
        latents = encoder.norm(latents)
    return steps, latents if encoder.output is None else encoder.output(latents)


def _self_weights(attention: SelfAttention, x: Tensor) -> Tensor:
    """[N, N] of tokens [1, N, width]."""
    query, key, _ = attention._projected(x)[0].unflatten(-1, (3, attention.heads, -1)).unbind(1)
    return _softmax(query.transpose(0, 1), key.transpose(0, 1))


def _pooler(encoder: Pooler, bags: Bags) -> tuple[list[_Step], Tensor]:
    pool = encoder.pool
    query = pool.attention._queries(pool.queries[None])[0]
    key, _ = pool.key_values.of_features(bags.features)
    return [_Over(query, key, residual=False)], encoder(bags)


def _transformer(encoder: Transformer, bags: Bags) -> tuple[list[_Step], Tensor]:
    """The tiles as they are after the last layer, which have seen each other."""
    attends = encoder._attends(bags)
    x = encoder.tiles(bags.features)
    for i, layer in enumerate(encoder.layers):
        x = layer(x, attends[i % len(attends)])
    pool = encoder.pool
    query = pool.attention._queries(pool.queries[None])[0]
    return [_Over(query, pool.key_values(x)[0], residual=False)], pool.ragged(x, bags.lengths)


def _abmil(encoder: ABMIL, bags: Bags) -> tuple[list[_Step], Tensor]:
    _, scores = encoder.read(bags.features)
    return [_Given(scores.float().softmax(0).T)], encoder(bags)


_TRACES: dict[type, Callable[..., tuple[list[_Step], Tensor]]] = {
    Perceiver: _perceiver,
    Pooler: _pooler,
    Transformer: _transformer,
    ABMIL: _abmil,
}
