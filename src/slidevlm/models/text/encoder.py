"""The causal text encoder, trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from slidevlm.errors import ConfigError
from slidevlm.models.attention import LayerCache, SelfAttentionLayer, next_places
from slidevlm.models.mode import Group, Unit
from slidevlm.models.text.base import TEXT_ENCODERS, TextTower


@dataclass(frozen=True)
class TextConfig:
    """The `text` part of a model configuration of type scratch."""

    width: int = 256
    layers: int = 4
    heads: int = 8
    context_length: int = 128  # tokens of a report at most, BOS and EOS included
    vocab_size: int = 4096  # at most: a tokenizer trained on few reports has fewer
    tokenizer: str = "train"  # on the training reports; or a folder with a tokenizer.json, whose
    # vocabulary then is the size
    dropout: float = 0.1
    prior_rank: int = 0  # width of the fixed table of token vectors; 0: none

    def __post_init__(self) -> None:
        if self.width < 1 or self.heads < 1 or self.width % self.heads:
            raise ConfigError(f"text.width {self.width} does not divide by {self.heads} heads")

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer comes from, or "train"."""
        return self.tokenizer


@TEXT_ENCODERS.register("scratch")
class TextEncoder(TextTower):
    """Causal transformer. A report's embedding is read at its last real token, EOS.

    Causality makes every output independent of what stands to the right, so padding changes
    nothing and a prefix can be cached.
    """

    Config = TextConfig

    def __init__(self, config: TextConfig, vocab_size: int) -> None:
        super().__init__()
        self.width, self.context_length = config.width, config.context_length
        self.tokens = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(config.context_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            SelfAttentionLayer(config.width, config.heads, config.dropout, causal=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def position_tables(self) -> list[nn.Embedding]:
        return [self.positions]

    @property
    def embedding(self) -> nn.Embedding:
        return self.tokens

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, caches: list[LayerCache] | None = None
    ) -> Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions(next_places(tokens, caches)))
        for i, layer in enumerate(self.layers):
            x = self.run(layer, x, caches[i] if caches else None)
        return x

    def new_caches(self, batch: int, capacity: int, like: Tensor) -> list[LayerCache]:
        layers = cast("list[SelfAttentionLayer]", list(self.layers))
        return [layer.attention.new_cache(batch, capacity, like) for layer in layers]

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        last = mask.sum(1) - 1
        return self.norm(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])

    def units(self) -> list[Unit]:
        return [(layer, ()) for layer in self.layers]

    def groups(self) -> list[Group]:
        return [
            ("embeddings", [self.tokens, self.positions]),
            *((f"layer_{i}", [layer]) for i, layer in enumerate(self.layers)),
            ("final_norm", [self.norm]),
        ]
