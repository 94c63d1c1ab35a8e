"""Perceiver: a few latents read a bag of any size, again and again (Jaegle et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.attention import (
    GEGLU,
    CrossAttention,
    FeedForward,
    KeyValues,
    OwnStart,
    SelfAttentionLayer,
)
from slidevlm.models.linear import is_plain, normalised_linear
from slidevlm.models.mode import Group
from slidevlm.models.pieces import are_shared, share
from slidevlm.models.slide.base import (
    SLIDE_ENCODERS,
    FourierPositions,
    SlideEncoder,
    Standardise,
    check_heads,
    check_least,
    check_one_of,
)
from slidevlm.models.tile_rows import Moments, are_data, are_in_pieces

ACTIVATIONS = ("geglu", "gelu")
PLACES = 512  # of tiles that a thread takes at a time
HEAVY = 4  # times the products of the latents are to be fewer than those of the tiles


@dataclass(frozen=True)
class PerceiverConfig:
    """The `slide` part of a model configuration of type perceiver.

    The form published for PRISM and MOSAIC is: `cross_heads` 1, `read` features, `positions` none,
    `moments` false, `query_residual` false, `cross_hidden` and `self_hidden` equal to the width,
    `self_activation` gelu, `final_norm` false, `output_width` the width of the embedding; the
    model's `pooling` is then none: latent 0 is the embedding, the others are what is read.
    """

    width: int = 256
    latents: int = 64
    blocks: int = 4
    self_layers: int = 2  # self-attention layers of a block, shared by all blocks
    heads: int = 8
    dropout: float = 0.0
    positions: str = "fourier"  # or none
    moments: bool = True  # latents start from the bag's mean and deviation, not from nothing
    moments_dropout: float = 0.3  # of the moments' channels; the cure for a few hundred slides
    cross_heads: int = 0  # heads of the cross-attentions; 0: `heads`
    # What the cross-attentions read: tiles standardised over the training split and projected to
    # the width (projected), or the tile features as they are (features: the least memory).
    read: str = "projected"
    query_residual: bool = True  # latents + what they read; or only what they read
    cross_hidden: int = 0  # hidden units after a cross-attention (GEGLU); 0: 8/3 of the width
    self_hidden: int = 0  # hidden units of a self-attention layer; 0: 8/3 of the width
    self_activation: str = "geglu"  # of a self-attention layer's feed-forward part; or gelu
    final_norm: bool = True  # a LayerNorm of the latents at the end
    output_width: int = 0  # tokens are projected to this width at the end; 0: they are not

    def __post_init__(self) -> None:
        check_one_of("positions", self.positions, ("fourier", "none"))
        check_one_of("read", self.read, ("projected", "features"))
        check_one_of("self_activation", self.self_activation, ACTIVATIONS)
        check_least(1, latents=self.latents)
        check_heads(self.width, self.heads)
        check_heads(self.width, self.cross_heads or self.heads)
        if self.read == "features" and self.positions != "none":
            raise ConfigError(
                "slide.positions are added to projected tiles; with slide.read features, which "
                "projects none, set slide.positions to none"
            )


class _Read(OwnStart):
    """Cross-attention from latents to tiles, and a feed-forward layer."""

    def __init__(self, config: PerceiverConfig, context_width: int) -> None:
        super().__init__()
        heads = config.cross_heads or config.heads
        self.residual = config.query_residual
        self.silent = config.query_residual and config.moments
        self.key_values = KeyValues(config.width, context_width, heads)
        self.attention = CrossAttention(config.width, heads, config.dropout)
        self.norm = nn.LayerNorm(config.width)
        self.feed_forward = GEGLU(config.width, config.dropout, config.cross_hidden)

    def reset(self) -> None:
        """At 0 the latents would be the same for all bags, unless they have the moments."""
        if not self.silent:
            nn.init.normal_(self.attention.out.weight, std=self.attention.out.in_features**-0.5)

    def forward(
        self, latents: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        attended = self.attention.ragged(latents, key, value, lengths)
        latents = latents + attended if self.residual else attended
        return latents + self.feed_forward.after(self.norm, latents)


def _self_layer(config: PerceiverConfig) -> SelfAttentionLayer:
    width, hidden, dropout = config.width, config.self_hidden, config.dropout
    gated = config.self_activation == "geglu"
    return SelfAttentionLayer(
        width,
        config.heads,
        dropout,
        causal=False,
        feed_forward=(
            GEGLU(width, dropout, hidden)
            if gated
            else FeedForward(width, hidden or 4 * width, dropout)
        ),
    )


@SLIDE_ENCODERS.register("perceiver")
class Perceiver(SlideEncoder):
    """Blocks of one cross-attention to the tiles and some self-attention among the latents.

    The first cross-attention has weights of its own, the others share theirs, so the bag is
    projected to keys and values twice, however many blocks there are. All blocks share their
    self-attention layers. By default every residual branch starts at 0, and the latents at the
    bag's moments: before training the encoder is a linear map of them, which few slides suffice
    to teach, and attention enters as far as it helps.
    """

    Config = PerceiverConfig

    def __init__(self, config: PerceiverConfig, tile_width: int) -> None:
        super().__init__()
        width = config.width
        self.width, self.heads = config.output_width or width, config.heads
        self.blocks = config.blocks
        self.projects = config.read == "projected"
        self.standardise: Standardise | None = None
        if self.projects or config.moments:
            self.standardise = Standardise(tile_width)
        self.moments = nn.Linear(2 * tile_width, width) if config.moments else None
        self.moments_dropout = nn.Dropout(config.moments_dropout)
        self.tile_norm = nn.LayerNorm(tile_width) if self.projects else None
        self.tile_project = nn.Linear(tile_width, width) if self.projects else None
        self.positions = FourierPositions(width) if config.positions == "fourier" else None
        self.reads_positions = self.positions is not None
        self.latents = nn.Parameter(torch.empty(config.latents, width))
        context = width if self.projects else tile_width
        self.first = _Read(config, context) if config.blocks > 0 else None
        self.further = _Read(config, context) if config.blocks > 1 else None
        self.self_attention = nn.ModuleList(_self_layer(config) for _ in range(config.self_layers))
        self.norm = nn.LayerNorm(width) if config.final_norm else None
        self.output = nn.Linear(width, config.output_width) if config.output_width else None

    def forward(self, bags: Bags) -> Tensor:
        """Bags -> latents [B, latents, width]."""
        latents, tiles = self.begin(bags)
        if self.first is not None:  # without blocks nothing reads the tiles one by one
            latents = self._block(self.first, latents, *self._context(self.first, tiles), bags)
            if self.further is not None:
                key, value = self._context(self.further, tiles)
                for _ in range(self.blocks - 1):
                    latents = self._block(self.further, latents, key, value, bags)
        if self.norm is not None:
            latents = self.norm(latents)
        return latents if self.output is None else self.output(latents)

    def is_light(self, bags: Bags) -> bool:
        """Where what is done with the latents, which is in no pieces, is far less than the rest."""
        if not are_in_pieces(bags.features):
            return False
        reads = [read for read in (self.first, self.further) if read is not None]
        projections = [read.key_values.project for read in reads]
        if self.tile_project is not None and reads:
            projections.append(self.tile_project)
        if any(not is_plain(p) for p in projections) or any(r.key_values.heads < 2 for r in reads):
            return False
        of_tiles = sum(p.weight.numel() for p in projections)
        block = [part for read in reads[:1] for part in (read.attention, read.feed_forward)]
        of_latents = sum(p.numel() for m in (*block, *self.self_attention) for p in m.parameters())
        latents = len(bags) * len(self.latents) * self.blocks * of_latents
        return HEAVY * latents <= len(bags.features) * of_tiles

    def groups(self) -> list[Group]:
        """Tiles, latents, the two kinds of cross-attention, self-attention, output."""
        parts: list[tuple[str, list[nn.Module | nn.Parameter | None]]] = [
            ("tiles", [self.tile_norm, self.tile_project, self.positions]),
            ("latents", [self.moments, self.latents]),
            ("first_read", [self.first]),
            ("further_reads", [self.further]),
            ("self_attention", [self.self_attention]),
            ("output", [self.norm, self.output]),
        ]
        groups = [(name, [p for p in part if p is not None]) for name, part in parts]
        return [(name, part) for name, part in groups if part]

    def begin(self, bags: Bags) -> tuple[Tensor, Tensor]:
        """Latents [B, latents, width] that have read no single tile yet, and what they will read.

        That is [T, width], or the features [T, D]; the bags' moments are seen in the same pass.
        """
        latents = self.latents.expand(len(bags), -1, -1)
        if self.moments is None or self.standardise is None:
            return latents, self._tiles(bags, None)
        tile_project = self.tile_project if self.first is not None else None
        if tile_project is not None and is_plain(tile_project) and are_data(bags.features):
            watched = Moments(bags.lengths)
            tiles = self._tiles(bags, watched)
            known = watched.found().to(self.standardise.mean.dtype)  # [B, 2 D]
            return latents + self.moments(self.moments_dropout(known))[:, None], tiles
        known = self.standardise.moments(bags.features, bags.lengths)
        latents = latents + self.moments(self.moments_dropout(known))[:, None]
        return latents, self._tiles(bags, None)

    def _tiles(self, bags: Bags, moments: Moments | None) -> Tensor:
        tile_norm, project, standard = self.tile_norm, self.tile_project, self.standardise
        if tile_norm is None or project is None or standard is None or self.first is None:
            return bags.features
        if is_plain(project):
            (tiles,) = normalised_linear(
                bags.features,
                tile_norm,
                (project.weight,),
                project.bias,
                (standard.mean, standard.deviation),
                moments,
            )
        else:
            tiles = project(tile_norm(standard(bags.features)))
        if self.positions is None or bags.positions is None:
            return tiles
        places, add = bags.positions, self.positions
        if not are_shared(tiles):
            return tiles + add(places)
        some = range(0, len(tiles), PLACES)

        def work(number: int) -> None:
            piece = slice(some[number], some[number] + PLACES)
            tiles[piece] += add(places[piece])

        share(work, len(some))
        return tiles

    def _context(self, read: _Read, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, T, d]."""
        context = read.key_values if self.projects else read.key_values.of_features
        key, value = context(tiles)
        return key, value

    def _block(
        self, read: _Read, latents: Tensor, key: Tensor, value: Tensor, bags: Bags
    ) -> Tensor:
        latents = self.run(read, latents, key, value, bags.lengths)
        for layer in self.self_attention:
            latents = self.run(layer, latents)
        return latents
