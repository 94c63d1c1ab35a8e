"""The attention and transformer layers that everything is built of.

Dropout acts on what a branch adds, never on attention weights: that would forbid the fused
kernels and need the whole matrix. How bags of different lengths are attended to is known to
`slidevlm.models.ragged` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.models.graphs import outside_autograd
from slidevlm.models.linear import (
    geglu_linear,
    gelu_linear,
    is_plain,
    is_replaced,
    norm_linear,
    normalised_linear,
)
from slidevlm.models.ragged import ragged_cross_attention

# query, key and value [H, T, d] -> [H, T, d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class OwnStart(nn.Module):
    """A part with first values of its own, which `initialise` asks it to set."""

    def reset(self) -> None:
        """Set them; what is not set here is as `initialise` sets it anywhere."""
        raise NotImplementedError


class GEGLU(nn.Module):
    """Gated feed-forward layer: `W_out(a * gelu(b))` with `a, b = W_in x` (Shazeer, 2020)."""

    def __init__(self, width: int, dropout: float, hidden: int = 0) -> None:
        super().__init__()
        # Two thirds of 4 times the width keep the parameters of an ungated layer.
        hidden = hidden or int(width * 8 / 3 + 7) // 8 * 8
        self.inner = nn.Linear(width, 2 * hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.inner(x).chunk(2, dim=-1)
        return self.dropout(self.outer(a * F.gelu(b)))

    def after(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """`self(norm(x))`, of which only x and one product are kept."""
        if outside_autograd() or is_replaced(self):
            y: Tensor = self(norm(x))
            return y
        return self.dropout(geglu_linear(norm_linear(x, norm, self.inner), self.outer))


class FeedForward(nn.Module):
    """Feed-forward layer without a gate: `W_out gelu(W_in x)`."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.outer(F.gelu(self.inner(x))))

    def after(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """`self(norm(x))`, of which only x and one product are kept."""
        if outside_autograd() or is_replaced(self):
            y: Tensor = self(norm(x))
            return y
        return self.dropout(gelu_linear(norm_linear(x, norm, self.inner), self.outer))


class _Projecting(nn.Module):
    """What is normalised and projected before anything else."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.project = nn.Linear(inputs, outputs, bias=False)

    def _projected(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            projected = self.project(self.norm(x))
        else:
            projected = norm_linear(x, self.norm, self.project)
        return projected


class KeyValues(_Projecting):
    """Normalise and project a context to keys and values."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__(context_width, 2 * width)
        self.heads = heads

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[..., N, C] -> key and value, each [..., H, N, d]."""
        key, value = self._projected(context).chunk(2, dim=-1)
        key = key.unflatten(-1, (self.heads, -1))
        value = value.unflatten(-1, (self.heads, -1))
        return key.transpose(-2, -3), value.transpose(-2, -3)

    def of_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` of tile features [T, C] of any float type, which need no gradient.

        No normalised copy of the features is kept, and keys and values are apart in memory. A
        projection that is more than its weight (LoRA, quantised) is called as any other.
        """
        if not is_plain(self.project):
            narrow = features.to(self.norm.weight.dtype)
            key, value = self(narrow)
            return key, value
        key, value = normalised_linear(features, self.norm, self.project.weight.chunk(2))
        shape = (features.shape[0], self.heads, -1)
        return key.view(shape).transpose(0, 1), value.view(shape).transpose(0, 1)


class CrossAttention(nn.Module):
    """Residual branch in which queries attend to keys and values computed elsewhere."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def _queries(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if torch.jit.is_scripting():
            query = self.query(self.norm(x))
        else:
            query = norm_linear(x, self.norm, self.query)
        return query.view(batch, length, self.heads, -1).transpose(1, 2)

    def _merge(self, attended: Tensor) -> Tensor:
        """[B, H, L, d] -> [B, L, width]."""
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """x [B, L, width]; key, value [B, H, N, d] -> [B, L, width].

        x may also be n B sequences, n after each other for each context (the beams of a slide):
        they are n L queries of one context, whose keys and values are not copied.
        """
        query, beams = self._queries(x), len(x) // len(key)
        if beams == 1:
            return self._merge(F.scaled_dot_product_attention(query, key, value))
        batch, heads, length = len(key), self.heads, x.shape[1]
        together = query.view(batch, beams, heads, length, -1).transpose(1, 2).flatten(2, 3)
        attended = F.scaled_dot_product_attention(together, key, value)
        apart = attended.view(batch, heads, beams, length, -1).transpose(1, 2).flatten(0, 1)
        return self._merge(apart)

    def ragged(self, x: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
        """x [B, L, width]; key, value [H, T, d] of bags end to end -> [B, L, width]."""
        return self._merge(ragged_cross_attention(self._queries(x), key, value, lengths))


class LayerCache:
    """Keys and values of the tokens so far, [B, H, capacity, d], of which `length` are filled.

    After `place_next`, sequences may have different lengths: then `places` [B, n] is where the next
    tokens go, `mask` [B, 1, n, length] what each of them sees, and `length` counts them too.
    """

    # Written out, as torch.jit.script has no source of what @dataclass makes.
    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key = key
        self.value = value
        self.length = 0
        self.places: Tensor | None = None
        self.mask: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new [B, H, n, d] and return all so far."""
        places = self.places
        if places is not None:
            rows = torch.arange(key.shape[0], device=key.device)[:, None]
            self.key[rows, :, places] = key.transpose(1, 2)
            self.value[rows, :, places] = value.transpose(1, 2)
            return self.key[:, :, : self.length], self.value[:, :, : self.length]
        new = key.shape[2]
        self.key.narrow(2, self.length, new).copy_(key)
        self.value.narrow(2, self.length, new).copy_(value)
        self.length += new
        return self.key.narrow(2, 0, self.length), self.value.narrow(2, 0, self.length)

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch, in this order; one may be there twice."""
        self.key, self.value = self.key[rows], self.value[rows]

    def reorder(self, rows: Tensor, since: int) -> None:
        """Sequence i becomes a copy of sequence `rows[i]`, which it equals before place `since`."""
        for stored in (self.key, self.value):
            part = stored[:, :, since : self.length]
            part.copy_(part.index_select(0, rows))


def place_next(caches: Sequence[LayerCache], lengths: Sequence[int], count: int) -> None:
    """The next `count` tokens of sequence i go after its first `lengths[i]`.

    What stands there, of tokens that were not kept, is written over.
    """
    end, device = max(lengths), caches[0].key.device
    places: Tensor | None = None
    mask: Tensor | None = None
    if count > 1 or min(lengths) < end:
        end += count
        places = torch.tensor(lengths, device=device)[:, None] + torch.arange(count, device=device)
        mask = (torch.arange(end, device=device) <= places[..., None])[:, None]
    for cache in caches:
        cache.length, cache.places, cache.mask = end, places, mask


def next_places(tokens: Tensor, caches: list[LayerCache] | None) -> Tensor:
    """Where tokens [B, n] stand in their sequences: [n], or [B, n] after `place_next`."""
    start = 0
    if caches is not None and len(caches) > 0:
        places = caches[0].places
        if places is not None:
            return places
        start = caches[0].length
    return torch.arange(start, start + tokens.shape[1], device=tokens.device)


class SelfAttention(_Projecting):
    """Residual branch of self-attention, causal or full, with a cache for generation."""

    def __init__(self, width: int, heads: int, dropout: float, *, causal: bool) -> None:
        super().__init__(width, 3 * width)
        self.heads, self.causal = heads, causal
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x [B, L, width] -> [B, L, width].

        With a cache, x are the tokens after those cached; more than one only when it is empty or
        has been told their places.
        """
        batch, length, width = x.shape
        projected = self._projected(x).view(batch, length, 3, self.heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        causal = self.causal and (cache is None or length > 1)
        mask: Tensor | None = None
        if cache is not None:
            mask = cache.mask
            causal = causal and mask is None
            assert not causal or cache.length == 0, "a prompt goes into an empty cache"
            key, value = cache.append(key, value)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal
        )
        return self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))

    def new_cache(self, batch: int, capacity: int, like: Tensor) -> LayerCache:
        """An empty cache of `like`'s type and device; zeros, as what is masked must be finite."""
        shape = (batch, self.heads, capacity, self.project.in_features // self.heads)
        return LayerCache(like.new_zeros(shape), like.new_zeros(shape))


class SelfAttentionLayer(nn.Module):
    """Pre-norm transformer layer: self-attention, then a feed-forward layer (GEGLU by default)."""

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        *,
        causal: bool,
        feed_forward: GEGLU | FeedForward | None = None,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, dropout, causal=causal)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward or GEGLU(width, dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(x, cache)
        if torch.jit.is_scripting():
            added = self.feed_forward(self.norm(x))
        else:
            added = self.feed_forward.after(self.norm, x)
        return x + added


class TileAttention(_Projecting):
    """Residual branch in which the tiles of a bag attend to each other.

    How they do is a function of the caller's: whole bags, windows, by distance, dilated.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, 3 * width)
        self.heads = heads
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """x [T, width]; `attend` takes query, key, value [H, T, d] -> [T, width]."""
        projected = self._projected(x).view(x.shape[0], 3, self.heads, -1)
        attended = attend(*projected.permute(1, 2, 0, 3))
        return self.dropout(self.out(attended.transpose(0, 1).flatten(1)))


class TileLayer(nn.Module):
    """Pre-norm transformer layer over tiles [T, width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = TileAttention(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = GEGLU(width, dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(x, attend)
        return x + self.feed_forward.after(self.norm, x)


class AttentionPooler(nn.Module):
    """Learned queries attend to a sequence: [B, N, C] -> [B, Q, width] (Yu et al., CoCa, 2022)."""

    def __init__(self, queries: int, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.key_values = KeyValues(width, context_width, heads)
        self.attention = CrossAttention(width, heads, 0.0)
        self.norm = nn.LayerNorm(width)

    def forward(self, context: Tensor) -> Tensor:
        queries = self.queries.expand(len(context), -1, -1)
        return self.norm(self.attention(queries, *self.key_values(context)))

    def ragged(self, context: Tensor, lengths: Sequence[int]) -> Tensor:
        """context [T, C] of bags end to end -> [B, Q, width]."""
        return self._read(self.key_values(context), lengths)

    def of_features(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        """`ragged` of tile features of any float type, which need no gradient."""
        return self._read(self.key_values.of_features(features), lengths)

    def _read(self, context: tuple[Tensor, Tensor], lengths: Sequence[int]) -> Tensor:
        key, value = context
        queries = self.queries.expand(len(lengths), -1, -1)
        return self.norm(self.attention.ragged(queries, key, value, lengths))


def initialise(module: nn.Module) -> None:
    """Set every parameter below `module`, so that nothing depends on uninitialised memory.

    Matrices and convolutions: normal, standard deviation 1/sqrt(inputs), but 0 where a residual
    branch ends, so that every layer starts as the identity at any depth; biases 0; norms 1 and 0;
    learned queries, latents and embeddings: normal, 0.02. An `OwnStart` then sets its own.
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(child.weight, std=child.weight[0].numel() ** -0.5)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.BatchNorm1d):
            child.reset_parameters()
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)
        else:
            for parameter in child.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)
    for child in module.modules():
        if isinstance(child, (GEGLU, FeedForward)):
            nn.init.zeros_(child.outer.weight)
        elif isinstance(child, (CrossAttention, SelfAttention, TileAttention)):
            nn.init.zeros_(child.out.weight)
    for child in module.modules():
        if isinstance(child, AttentionPooler):  # no residual sum: at 0 nothing would pass
            nn.init.normal_(child.attention.out.weight, std=child.attention.out.in_features**-0.5)
    for child in module.modules():
        if isinstance(child, OwnStart):
            child.reset()
