"""Decoders: they read slide tokens and write the report. Registered by name, as the towers are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from slidevlm.errors import ConfigError
from slidevlm.models.attention import (
    CrossAttention,
    KeyValues,
    LayerCache,
    SelfAttentionLayer,
    place_next,
)
from slidevlm.models.mode import Group, Recomputing, Unit
from slidevlm.registry import Registry


@dataclass(frozen=True)
class DecoderConfig:
    """The `decoder` part of a model configuration."""

    layers: int = 4
    heads: int = 8
    # Queries of the pooler that makes the decoder's view of the slide; 0: it reads the slide
    # encoder's tokens themselves.
    slide_tokens: int = 32
    dropout: float = 0.1
    tied: bool = True  # the vocabulary projection is the token embedding
    gist: bool = False  # the slide's contrastive embedding is added to every token's state
    # The text prior's `words` of that embedding are added to the logits, with a learned weight
    # that starts at this value; 0: not at all. The cure for a few hundred reports.
    words: float = 0.0

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"decoder.layers must be at least 1, not {self.layers}")


@dataclass
class DecoderCache:
    """Of each layer: the text so far, and the slide's keys and values, computed once."""

    text: list[LayerCache]
    slide: list[tuple[Tensor, Tensor]]

    def keep(self, rows: Tensor, slides: Tensor | None) -> None:
        """Keep only these sequences, and only these slides; None: all of them."""
        for cache in self.text:
            cache.keep(rows)
        if slides is not None:
            self.slide = [(key[slides], value[slides]) for key, value in self.slide]


@dataclass
class GenerationCache:
    """All that generation keeps of R sequences between two tokens."""

    encoder: list[LayerCache]
    decoder: DecoderCache

    def keep(self, rows: Tensor, slides: Tensor | None = None) -> None:
        """Keep only these sequences, and only these slides; None: all of them."""
        for cache in self.encoder:
            cache.keep(rows)
        self.decoder.keep(rows, slides)

    def place(self, lengths: Sequence[int], count: int) -> None:
        """The next `count` tokens of sequence i go after its first `lengths[i]`."""
        place_next([*self.encoder, *self.decoder.text], lengths, count)

    def reorder(self, rows: Tensor, since: int) -> None:
        """Sequence i becomes a copy of sequence `rows[i]`, which it equals before place `since`."""
        for cache in (*self.encoder, *self.decoder.text):
            cache.reorder(rows, since)


class ReportDecoder(Recomputing):
    """Base class: layers over the text tower's hidden states.

    Built from its own `Config`, the text tower's width, the vocabulary's size, and the width of
    the slide tokens it reads: None for a language model, which reads no slide.
    """

    Config: ClassVar[type[Any]]
    layers: nn.ModuleList
    vocabulary: nn.Linear

    @abstractmethod
    def new_caches(self, batch: int, capacity: int, like: Tensor) -> list[LayerCache]:
        """Empty caches of the text, one a layer."""

    @abstractmethod
    def view(self, slide_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Slide tokens [B, N, slide width] -> every layer's keys and values [B, H, N, d]."""

    @abstractmethod
    def states(
        self,
        hidden: Tensor,
        slide: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """What the vocabulary projection reads: [B, L, width]."""

    @abstractmethod
    def groups(self) -> list[Group]:
        """Name and parts of each group of weights, from input to output."""

    def forward(
        self,
        hidden: Tensor,
        slide: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """hidden [B, L, width] and `view`'s result (empty: no slide) -> logits [B, L, V]."""
        logits: Tensor = self.vocabulary(self.states(hidden, slide, caches))
        return logits

    def tie(self, embedding: nn.Embedding) -> None:
        """Use the token embedding as vocabulary projection."""
        self.vocabulary.weight = embedding.weight


DECODERS: Registry[type[ReportDecoder]] = Registry("decoder type")


class _Layer(nn.Module):
    """Cross-attention to the slide, where there is one, then a causal transformer layer."""

    def __init__(self, width: int, config: DecoderConfig, slide_width: int | None) -> None:
        super().__init__()
        self.key_values: KeyValues | None = None
        self.cross: CrossAttention | None = None
        if slide_width is not None:
            self.key_values = KeyValues(width, slide_width, config.heads)
            self.cross = CrossAttention(width, config.heads, config.dropout)
        self.causal = SelfAttentionLayer(width, config.heads, config.dropout, causal=True)

    def forward(
        self, x: Tensor, slide: tuple[Tensor, Tensor] | None, cache: LayerCache | None = None
    ) -> Tensor:
        if self.cross is not None:
            assert slide is not None, "this layer reads a slide"
            x = x + self.cross(x, slide[0], slide[1])
        return self.causal(x, cache)


@DECODERS.register("scratch")
class Decoder(ReportDecoder):
    """Layers over the text encoder's hidden states; every layer also reads the slide."""

    Config = DecoderConfig

    def __init__(
        self, config: DecoderConfig, width: int, vocab_size: int, slide_width: int | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Layer(width, config, slide_width) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, vocab_size, bias=False)

    def new_caches(self, batch: int, capacity: int, like: Tensor) -> list[LayerCache]:
        layers = cast("list[_Layer]", list(self.layers))
        return [layer.causal.attention.new_cache(batch, capacity, like) for layer in layers]

    def view(self, slide_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        projections = [layer.key_values for layer in cast("list[_Layer]", list(self.layers))]
        return [project(slide_tokens) for project in projections if project is not None]

    def states(
        self,
        hidden: Tensor,
        slide: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        x = hidden
        for i, layer in enumerate(self.layers):
            view = slide[i] if slide else None
            x = self.run(layer, x, view, caches[i] if caches else None)
        return self.norm(x)

    def units(self) -> list[Unit]:
        layers = cast("list[_Layer]", list(self.layers))
        # `view` calls them before their layers are called.
        projections = [layer.key_values for layer in layers if layer.key_values is not None]
        return [(module, ()) for module in (*projections, *layers)]

    def groups(self) -> list[Group]:
        return [
            *((f"layer_{i}", [layer]) for i, layer in enumerate(self.layers)),
            ("vocabulary", [self.norm, self.vocabulary]),
        ]
