"""The language only baseline: a report's next token from the report alone.

What a model of the family coca writes beyond this it must have seen in the slide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slidevlm.batch import Bags, Output
from slidevlm.models.attention import initialise
from slidevlm.models.mode import Resting
from slidevlm.models.schema import ModelConfig
from slidevlm.models.text import DECODERS, TEXT_ENCODERS, DecoderCache, GenerationCache


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

    def start(self, bags: Bags, capacity: int) -> tuple[None, GenerationCache]:
        """An empty cache for as many reports as there are bags."""
        batch, like = len(bags), self.decoder.vocabulary.weight
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        return None, GenerationCache(
            self.text.new_caches(batch, capacity, like),
            DecoderCache(self.decoder.new_caches(batch, capacity, like), []),
        )

    def step(self, tokens: Tensor, cache: GenerationCache) -> Tensor:
        """tokens [R, n] after those in the cache -> logits [R, V] of the next token."""
        logits: Tensor = self.decoder.vocabulary(self._read_on(tokens, cache)[:, -1])
        return logits

    def steps(self, tokens: Tensor, cache: GenerationCache) -> Tensor:
        """tokens [R, n] after those in the cache -> logits [R, n, V] after each of them."""
        logits: Tensor = self.decoder.vocabulary(self._read_on(tokens, cache))
        return logits

    def _read_on(self, tokens: Tensor, cache: GenerationCache) -> Tensor:
        hidden = self.text(tokens, caches=cache.encoder)
        return self.decoder.states(hidden, (), cache.decoder.text)

    def clamp_scale(self) -> None:
        """There is no scale to clamp."""
