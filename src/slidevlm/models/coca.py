"""CoCa: contrastive image-text learning and report generation in one model (Yu et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.batch import Bags, Output
from slidevlm.models.attention import AttentionPooler, LayerCache, initialise
from slidevlm.models.mode import Resting
from slidevlm.models.schema import ModelConfig
from slidevlm.models.slide import SLIDE_ENCODERS
from slidevlm.models.slide.base import FourierPositions, Standardise
from slidevlm.models.text import (
    DECODERS,
    TEXT_ENCODERS,
    DecoderCache,
    ReportDecoder,
    TextPrior,
)
from slidevlm.models.text.gpt import GptLayer

MAX_LOG_SCALE = math.log(100.0)


class CoCa(Resting):
    """Slide encoder, causal text encoder, and (family coca) a decoder that reads the slide.

    Args:
        config: the configuration, its tile width resolved.
        vocab_size: V, the tokenizer's.
        init_log_scale: logarithm of the first contrastive scale.
        init_bias: first bias of the sigmoid loss; None for the softmax loss, which has none.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        init_log_scale: float = math.log(1 / 0.07),
        init_bias: float | None = None,
    ) -> None:
        super().__init__()
        assert config.tile_width is not None, "the tile width must be known by now"
        width = config.text.width
        self.slide: nn.Module = SLIDE_ENCODERS[config.slide_type](config.slide, config.tile_width)
        slide_width = config.slide.width
        self.slide_pooler = AttentionPooler(1, slide_width, slide_width, config.slide.heads)
        self.slide_project = nn.Linear(slide_width, config.embed_dim, bias=False)
        self.text = TEXT_ENCODERS[config.text_type](config.text, vocab_size)
        self.text_project: nn.Linear | None = None
        if config.project_text:
            self.text_project = nn.Linear(width, config.embed_dim, bias=False)
        self.prior: TextPrior | None = None
        if config.text.prior_rank:
            self.prior = TextPrior(vocab_size, config.text.prior_rank, config.embed_dim)
        self.decoder: ReportDecoder | None = None
        if config.decoder is not None:
            pooled = config.decoder.slide_tokens > 0
            self.decoder = DECODERS[config.decoder_type](
                config.decoder, width, vocab_size, width if pooled else slide_width
            )
            self.report_pooler: AttentionPooler | None = None
            if pooled:
                self.report_pooler = AttentionPooler(
                    config.decoder.slide_tokens, width, slide_width, config.decoder.heads
                )
            self.gist: nn.Linear | None = None
            if config.decoder.gist:
                self.gist = nn.Linear(config.embed_dim, width, bias=False)
            self.words = nn.Parameter(torch.empty(())) if config.decoder.words else None
        self.log_scale = nn.Parameter(torch.empty(()))
        self.bias = None if init_bias is None else nn.Parameter(torch.empty(()))
        self._reset(init_log_scale, init_bias)
        if config.decoder is not None and self.words is not None:
            nn.init.constant_(self.words, config.decoder.words)
        if self.decoder is not None and config.decoder is not None and config.decoder.tied:
            self.decoder.tie(self.text.embedding)

    def _reset(self, init_log_scale: float, init_bias: float | None) -> None:
        initialise(self)
        for module in self.modules():
            if isinstance(module, (FourierPositions, TextPrior, GptLayer)):
                module.reset()
        nn.init.constant_(self.log_scale, init_log_scale)
        if self.bias is not None and init_bias is not None:
            nn.init.constant_(self.bias, init_bias)

    def start_from(self, mean: Tensor, deviation: Tensor, table: Tensor | None) -> None:
        """Take statistics of the training split before training begins.

        Args:
            mean: [D] of every tile channel.
            deviation: [D], likewise.
            table: [V, prior rank] token vectors, where the configuration has a prior.
        """
        for module in self.slide.modules():
            if isinstance(module, Standardise):
                module.set(mean, deviation)
        if self.prior is not None:
            assert table is not None, "this model's text tower starts from a table"
            self.prior.set_table(table)

    def forward(
        self, bags: Bags, tokens: Tensor, token_mask: Tensor, *, with_logits: bool = True
    ) -> Output:
        """One pass over a batch.

        Args:
            bags: B bags.
            tokens: [B, L], BOS ... EOS and padding.
            token_mask: [B, L], True on real tokens.
            with_logits: skip the decoder where its output is not wanted.
        """
        slide, image = self.see(bags)
        hidden, text = self.read(tokens, token_mask)
        logits = None
        if with_logits and self.decoder is not None:
            # The state at EOS predicts nothing.
            logits = self._write(hidden[:, :-1], image, self._view(slide))
        return Output(
            image_embedding=image,
            text_embedding=text,
            logits=logits,
            logit_scale=self.log_scale.exp(),
            logit_bias=self.bias,
        )

    def encode_image(self, bags: Bags) -> Tensor:
        """Bags -> [B, E], L2-normalised."""
        return self.see(bags)[1]

    def encode_text(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """tokens, mask [B, L] -> [B, E], L2-normalised."""
        return self.read(tokens, token_mask)[1]

    def see(self, bags: Bags) -> tuple[Tensor, Tensor]:
        """Bags -> the encoder's tokens [B, N, slide width], and the embedding [B, E]."""
        slide = self.slide(bags)
        return slide, self._embed_slide(slide)

    def read(self, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, mask [B, L] -> hidden states [B, L, width], and the embedding [B, E]."""
        hidden = self.text(tokens, token_mask)
        return hidden, self._embed_text(hidden, tokens, token_mask)

    def start(self, bags: Bags, capacity: int) -> tuple[Tensor, CoCaCache]:
        """Encode the slides for generation: embeddings [B, E] and an empty cache."""
        assert self.decoder is not None, "a clip model has no decoder"
        slide, image = self.see(bags)
        view = self._view(slide)
        batch, like = len(bags), view[0][0]
        return image, CoCaCache(
            image,
            self.text.new_caches(batch, capacity, like),
            DecoderCache(self.decoder.new_caches(batch, capacity, like), view),
        )

    def step(self, tokens: Tensor, cache: CoCaCache) -> Tensor:
        """tokens [B, n] after those in the cache -> logits [B, V] of the next token."""
        assert self.decoder is not None, "a clip model has no decoder"
        hidden = self.text(tokens, caches=cache.encoder)
        seen = cache.decoder
        return self._write(hidden, cache.image, seen.slide, seen.text)[:, -1]

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the contrastive scale within 1 and 100 after an optimizer step."""
        self.log_scale.clamp_(0.0, MAX_LOG_SCALE)

    def _embed_slide(self, slide: Tensor) -> Tensor:
        pooled = self.slide_pooler(slide)[:, 0]
        return F.normalize(self.slide_project(pooled).float(), dim=-1)

    def _embed_text(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        embedding = self.text.pool(hidden, mask)
        if self.text_project is not None:
            embedding = self.text_project(embedding)
        if self.prior is not None:
            embedding = self.prior(tokens, mask, embedding)
        return F.normalize(embedding.float(), dim=-1)

    def _write(
        self,
        hidden: Tensor,
        image: Tensor,
        view: list[tuple[Tensor, Tensor]],
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """hidden [B, L, width], image embedding [B, E], `_view`'s result -> logits [B, L, V]."""
        assert self.decoder is not None
        if self.gist is not None:
            hidden = hidden + self.gist(image)[:, None]
        logits: Tensor = self.decoder(hidden, view, caches)
        if self.words is not None:
            assert self.prior is not None, "the schema has made sure of a prior"
            logits = logits + self.words * self.prior.words(image)[:, None]
        return logits

    def _view(self, slide: Tensor) -> list[tuple[Tensor, Tensor]]:
        assert self.decoder is not None
        return self.decoder.view(slide if self.report_pooler is None else self.report_pooler(slide))


@dataclass
class CoCaCache:
    """All that generation keeps between two tokens."""

    image: Tensor  # [B, E]
    encoder: list[LayerCache]
    decoder: DecoderCache

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch."""
        self.image = self.image[rows]
        for cache in self.encoder:
            cache.keep(rows)
        self.decoder.keep(rows)
