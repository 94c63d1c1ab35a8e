"""The language only baseline: a report's next token from the report alone.

What a model of the family coca writes beyond this it must have seen in the slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slidevlm.batch import Bags, Output
from slidevlm.models.attention import LayerCache, initialise, place_next
from slidevlm.models.mode import Resting
from slidevlm.models.schema import ModelConfig
from slidevlm.models.text import DECODERS, TEXT_ENCODERS, DecoderCache


class LanguageModel(Resting):
    """A text tower and a decoder that reads no slide; called and trained as a `CoCa` is.

    Its embeddings are None, and its contrastive scale is a constant.

    Args:
        config: a configuration of the family lm.
        vocab_size: V, the tokenizer's.
    """

    log_scale: Tensor
    prior: None = None

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        assert config.decoder is not None, "the schema has made sure of a decoder"
        self.text = TEXT_ENCODERS[config.text_type](config.text, vocab_size)
        self.decoder = DECODERS[config.decoder_type](
            config.decoder, config.text.width, vocab_size, None
        )
        self.bias: None = None
        self.register_buffer("log_scale", torch.zeros(()), persistent=False)
        initialise(self)
        if config.decoder.tied:
            self.decoder.tie(self.text.embedding)

    def forward(
        self,
        bags: Bags,
        tokens: Tensor,
        token_mask: Tensor,
        *,
        with_logits: bool = True,
        only_real: bool = False,
    ) -> Output:
        """tokens, mask [B, L] -> logits [B, L - 1, V]; the bags are not read."""
        logits = None
        if with_logits:
            states = self.decoder.states(self.text(tokens, token_mask)[:, :-1], ())
            logits = self.decoder.vocabulary(states[token_mask[:, 1:]] if only_real else states)
        return Output(None, None, logits, self.log_scale.exp(), None)

    def start(self, bags: Bags, capacity: int) -> tuple[None, LanguageCache]:
        """An empty cache for as many reports as there are bags."""
        batch, like = len(bags), self.decoder.vocabulary.weight
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        return None, LanguageCache(
            self.text.new_caches(batch, capacity, like),
            DecoderCache(self.decoder.new_caches(batch, capacity, like), []),
        )

    def step(self, tokens: Tensor, cache: LanguageCache) -> Tensor:
        """tokens [R, n] after those in the cache -> logits [R, V] of the next token."""
        logits: Tensor = self.decoder.vocabulary(self._read_on(tokens, cache)[:, -1])
        return logits

    def steps(self, tokens: Tensor, cache: LanguageCache) -> Tensor:
        """tokens [R, n] after those in the cache -> logits [R, n, V] after each of them."""
        logits: Tensor = self.decoder.vocabulary(self._read_on(tokens, cache))
        return logits

    def _read_on(self, tokens: Tensor, cache: LanguageCache) -> Tensor:
        hidden = self.text(tokens, caches=cache.encoder)
        return self.decoder.states(hidden, (), cache.decoder.text)

    def clamp_scale(self) -> None:
        """There is no scale to clamp."""


@dataclass
class LanguageCache:
    """All that generation keeps between two tokens."""

    encoder: list[LayerCache]
    decoder: DecoderCache

    def keep(self, rows: Tensor, slides: Tensor | None = None) -> None:
        """Keep only these sequences."""
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
