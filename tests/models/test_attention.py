"""Attention layers against float64 references."""

from __future__ import annotations

import pytest
import torch

from slidevlm.models.attention import (
    AttentionPooler,
    CrossAttention,
    KeyValues,
    SelfAttention,
    SelfAttentionLayer,
    initialise,
)

LENGTHS = (5, 1, 17, 3)


def test_cross_attention_ragged_equals_one_bag_at_a_time() -> None:
    torch.manual_seed(0)
    to_kv, attention = KeyValues(16, 10, 4).double(), CrossAttention(16, 4, 0.0).double()
    x = torch.randn(4, 3, 16, dtype=torch.float64)
    context = torch.randn(sum(LENGTHS), 10, dtype=torch.float64)
    together = attention.ragged(x, *to_kv(context), LENGTHS)
    for b, bag in enumerate(context.split(LENGTHS)):
        alone = attention(x[b : b + 1], *to_kv(bag[None]))
        torch.testing.assert_close(together[b : b + 1], alone)


@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_written_out(causal: bool) -> None:
    torch.manual_seed(0)
    module = SelfAttention(12, 3, 0.0, causal=causal).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = module.project(module.norm(x)).view(2, 5, 3, 3, 4).unbind(2)
    expected = torch.zeros(2, 5, 3, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                seen = range(i + 1) if causal else range(5)
                scores = torch.stack([q[b, i, h] @ k[b, j, h] / 2.0 for j in seen])
                for w, j in zip(scores.softmax(0), seen, strict=True):
                    expected[b, i, h] += w * v[b, j, h]
    torch.testing.assert_close(module(x), module.out(expected.reshape(2, 5, 12)))


def test_cache_equals_recomputing() -> None:
    torch.manual_seed(0)
    layer = SelfAttentionLayer(16, 4, 0.0, causal=True).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    cache = layer.attention.new_cache(3, 7, x)
    pieces = [layer(x[:, :4], cache)] + [layer(x[:, i : i + 1], cache) for i in range(4, 7)]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x))


def test_every_layer_starts_as_the_identity_and_poolers_do_not() -> None:
    layer = SelfAttentionLayer(16, 4, 0.0, causal=False)
    pooler = AttentionPooler(2, 16, 16, 4)
    initialise(layer)
    initialise(pooler)
    x = torch.randn(3, 5, 16)
    assert torch.equal(layer(x), x)
    assert pooler(x).std(0).max() > 0.01, "the pooled value must depend on the input"
