"""CoCa: contrastive image-text learning and report generation in one model (Yu et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.batch import Bags, Output
from slidevlm.errors import ConfigError
from slidevlm.models.alignment import Alignment
from slidevlm.models.attention import AttentionPooler, initialise
from slidevlm.models.linear import narrowed
from slidevlm.models.mode import Resting
from slidevlm.models.pieces import are_many, calmly
from slidevlm.models.schema import ModelConfig
from slidevlm.models.slide import SLIDE_ENCODERS
from slidevlm.models.slide.base import SlideEncoder, Standardise
from slidevlm.models.text import (
    DECODERS,
    TEXT_ENCODERS,
    DecoderCache,
    GenerationCache,
    ReportDecoder,
    TextPrior,
)
from slidevlm.precision import wide

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
        assert config.slide_type is not None, "a model without a slide encoder is a LanguageModel"
        width = config.text.width
        self.slide: SlideEncoder = SLIDE_ENCODERS[config.slide_type](
            config.slide, config.tile_width
        )
        slide_width, heads = self.slide.width, self.slide.heads
        self.slide_pooler: AttentionPooler | None = None
        self.slide_project: nn.Linear | None = None
        if config.pooling == "attentional":
            self.slide_pooler = AttentionPooler(1, slide_width, slide_width, heads)
        if config.pooling == "none":
            _check_same_width(slide_width, config.embed_dim)
        else:
            self.slide_project = nn.Linear(slide_width, config.embed_dim, bias=False)
        self.text = TEXT_ENCODERS[config.text_type](config.text, vocab_size)
        self.text_project: nn.Linear | None = None
        if config.project_text:
            self.text_project = nn.Linear(width, config.embed_dim, bias=False)
        self.prior: TextPrior | None = None
        if config.text.prior_rank:
            self.prior = TextPrior(vocab_size, config.text.prior_rank, config.embed_dim)
        self.alignment: Alignment | None = None
        if config.alignment.rank:
            self.alignment = Alignment(
                config.alignment, config.tile_width, vocab_size, config.embed_dim
            )
        self.decoder: ReportDecoder | None = None
        if config.decoder is not None:
            queries = config.decoder.slide_tokens
            self.decoder = DECODERS[config.decoder_type](
                config.decoder, width, vocab_size, width if queries else slide_width
            )
            self.report_pooler: AttentionPooler | None = None
            if queries:
                self.report_pooler = AttentionPooler(
                    queries, width, slide_width, config.decoder.heads
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
        for module in self.modules():
            if isinstance(module, Standardise):
                module.set(mean, deviation)
        if self.prior is not None:
            assert table is not None, "this model's text tower starts from a table"
            self.prior.set_table(table)

    def forward(
        self,
        bags: Bags,
        tokens: Tensor,
        token_mask: Tensor,
        *,
        with_logits: bool = True,
        only_real: bool = False,
    ) -> Output:
        """One pass over a batch.

        Args:
            bags: B bags.
            tokens: [B, L], BOS ... EOS and padding.
            token_mask: [B, L], True on real tokens.
            with_logits: skip the decoder where its output is not wanted.
            only_real: logits only where the next token is real, [n, V], row by row. The projection
                to the vocabulary is a large part of a step, and most of a batch is padding.
        """
        slide, image = self.see(bags)
        hidden, text = self.read(tokens, token_mask)
        logits = None
        if with_logits and self.decoder is not None:
            # The state at EOS predicts nothing.
            real = token_mask[:, 1:] if only_real else None
            logits = self._write(hidden[:, :-1], image, self._view(slide), real)
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
        if are_many(bags.features) and self.slide.is_light(bags):
            return calmly(lambda: self._see(bags))
        return self._see(bags)

    def _see(self, bags: Bags) -> tuple[Tensor, Tensor]:
        slide = self.slide(bags)
        return slide, self._embed_slide(slide, bags)

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
            self.text.new_caches(batch, capacity, like),
            DecoderCache(self.decoder.new_caches(batch, capacity, like), view),
            image,
            self._words(image),
        )

    def step(self, tokens: Tensor, cache: CoCaCache) -> Tensor:
        """tokens [R, n] after those in the cache -> logits [R, V] of the next token."""
        return self._predict(self._read_on(tokens, cache)[:, -1:], cache)[:, 0]

    def steps(self, tokens: Tensor, cache: CoCaCache) -> Tensor:
        """tokens [R, n] after those in the cache -> logits [R, n, V] after each of them."""
        return self._predict(self._read_on(tokens, cache), cache)

    def _read_on(self, tokens: Tensor, cache: CoCaCache) -> Tensor:
        """tokens [R, n] after those in the cache -> the decoder's states [R, n, width]."""
        assert self.decoder is not None, "a clip model has no decoder"
        hidden = self.text(tokens, caches=cache.encoder)
        beams = len(tokens) // len(cache.image)
        if self.gist is not None:
            gist = self.gist(narrowed(cache.image, self.gist.weight)).repeat_interleave(beams, 0)
            hidden = hidden + gist[:, None]
        seen = cache.decoder
        return self.decoder.states(hidden, seen.slide, seen.text)

    def _predict(self, states: Tensor, cache: CoCaCache) -> Tensor:
        """States [R, n, width] -> logits [R, n, V]."""
        assert self.decoder is not None, "a clip model has no decoder"
        logits: Tensor = self.decoder.vocabulary(states)
        if cache.words is not None:
            beams = len(states) // len(cache.image)
            logits = logits + cache.words.repeat_interleave(beams, 0)[:, None]
        return logits

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the contrastive scale within 1 and 100 after an optimizer step."""
        self.log_scale.clamp_(0.0, MAX_LOG_SCALE)

    def _embed_slide(self, slide: Tensor, bags: Bags) -> Tensor:
        pooled = slide[:, 0] if self.slide_pooler is None else self.slide_pooler(slide)[:, 0]
        if self.slide_project is not None:
            pooled = self.slide_project(pooled)
        if self.alignment is not None:
            pooled = self.alignment.image(bags.features, bags.lengths, pooled)
        return F.normalize(wide(pooled), dim=-1)

    def _embed_text(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        embedding = self.text.pool(hidden, mask)
        if self.text_project is not None:
            embedding = self.text_project(embedding)
        if self.prior is not None:
            embedding = self.prior(tokens, mask, embedding)
        if self.alignment is not None:
            embedding = self.alignment.text(tokens, mask, embedding)
        return F.normalize(wide(embedding), dim=-1)

    def _write(
        self,
        hidden: Tensor,
        image: Tensor,
        view: list[tuple[Tensor, Tensor]],
        real: Tensor | None,
    ) -> Tensor:
        """Logits from hidden [B, L, width], the image embedding [B, E] and `_view`'s result.

        [B, L, V]; or [n, V] at the n places where `real` [B, L] is True.
        """
        assert self.decoder is not None
        if self.gist is not None:
            hidden = hidden + self.gist(narrowed(image, self.gist.weight))[:, None]
        states = self.decoder.states(hidden, view)
        if real is not None:
            states = states[real]
        logits: Tensor = self.decoder.vocabulary(states)
        words = self._words(image)
        if words is None:
            return logits
        words = words[:, None] if real is None else words.repeat_interleave(real.sum(1), 0)
        return logits + words

    def _words(self, image: Tensor) -> Tensor | None:
        """What the slide's embedding [B, E] adds to every token's logits: [B, V], or nothing."""
        if self.words is None:
            return None
        knows = self.prior or self.alignment
        assert knows is not None, "the schema has made sure of one of them"
        return self.words * knows.words(image)

    def _view(self, slide: Tensor) -> list[tuple[Tensor, Tensor]]:
        assert self.decoder is not None
        if self.slide_pooler is None and slide.shape[1] > 1:
            slide = slide[:, 1:]  # token 0 stands for the whole slide
        return self.decoder.view(slide if self.report_pooler is None else self.report_pooler(slide))


def _check_same_width(slide_width: int, embed_dim: int) -> None:
    if slide_width != embed_dim:
        raise ConfigError(
            f"pooling none takes token 0 of the slide encoder as the embedding, but its width is "
            f"{slide_width} and embed_dim {embed_dim}; make them equal, or set pooling to cls"
        )


@dataclass
class CoCaCache(GenerationCache):
    """What generation keeps of R sequences, and of the B slides that they are of.

    R is a multiple of B: the sequences of a slide stand together and share what is kept of it.
    """

    image: Tensor  # [B, E]
    words: Tensor | None  # [B, V], added to the logits

    def keep(self, rows: Tensor, slides: Tensor | None = None) -> None:
        """Keep only these sequences, and only these slides; None: all of them."""
        if slides is not None:
            self.image = self.image[slides]
            self.words = None if self.words is None else self.words[slides]
        super().keep(rows, slides)
