"""A joint space that is there before training: what tiles and words of reports tell of each other.

Canonical correlation analysis (Hotelling, 1936), regularised on both sides (Vinod, 1976), finds
the directions of a bag's statistics and of a report's words that correlate over the training
split. It has a closed form, needs seconds, and a few hundred pairs suffice, where contrastive
training of the same maps overfits. What is learned is added to it through gates that start at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slidevlm.errors import ConfigError
from slidevlm.models.attention import OwnStart
from slidevlm.models.graphs import outside_autograd
from slidevlm.models.ragged import bags_of
from slidevlm.models.slide.base import Standardise
from slidevlm.models.tile_rows import rows_of
from slidevlm.precision import wide

_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no power of it is 0 modulo 2**64
_LETTERS = 256  # of a word; what follows is read as if it stood at that place
_NO_WORD = 2**63 - 1


@dataclass(frozen=True)
class AlignmentConfig:
    """The `alignment` part of a model configuration; rank 0: there is none."""

    rank: int = 0  # dimensions of the joint space, at most embed_dim
    words: int = 8192  # at most so many of the training reports' words are known
    shortest_word: int = 3  # letters
    most_reports: float = 0.3  # words in a larger share of the reports tell them not apart
    components: int = 300  # of the reports' latent semantic analysis, which the words enter through
    # Random Fourier features of a tile, averaged over the bag beside mean and deviation: a kernel
    # mean embedding (Muandet et al., 2017; Rahimi and Recht, 2007). 0: mean and deviation alone.
    random_features: int = 1024
    frequency: float = 0.7  # their standard deviation, times the square root of the tile width
    image_penalty: float = 2.0  # ridge on statistics scaled to a mean squared length of 1
    text_penalty: float = 0.15  # ridge on words, in shares of their largest eigenvalue
    power: float = 1.25  # directions count by their squared correlation to this power
    dropout: float = 0.5  # of a bag's statistics, in training: they fit the training split too well

    def __post_init__(self) -> None:
        if not self.rank:
            return
        for name in ("words", "components"):
            if getattr(self, name) < 1:
                raise ConfigError(f"alignment.{name} must be at least 1")
        for name in ("image_penalty", "text_penalty", "frequency", "most_reports"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"alignment.{name} must be above 0")


@dataclass(frozen=True)
class Aligned:
    """What the analysis gives; S statistics of a bag, W words, V tokens, r the rank."""

    centre: Tensor  # [S], subtracted from a bag's statistics
    directions: Tensor  # [S, r]
    hashes: Tensor  # [W] int64, ascending
    idf: Tensor  # [W]
    vectors: Tensor  # [W, r]
    text_centre: Tensor  # [r]
    pieces: Tensor  # [V, r]


class Alignment(OwnStart):
    """Both sides of the joint space, and a gate on each for what is learned beside it.

    Silent (gates at 1, nothing known) until `set`; then the gates are 0, and an embedding is
    `normalise(known) + gate * normalise(learned)`. What is known is never trained.

    A word is a run of letters, whatever tokens it is cut into, upper and lower case alike. Its
    number is a polynomial of its letters modulo 2**64, which sums over its tokens give.

    Args:
        config: its rank above 0.
        tile_width: D.
        vocab_size: V.
        embed_dim: E, at least the rank: the known part has zeros behind it.
    """

    centre: Tensor
    directions: Tensor
    hashes: Tensor
    idf: Tensor
    vectors: Tensor
    text_centre: Tensor
    pieces: Tensor
    frequencies: Tensor
    phases: Tensor
    powers: Tensor
    letters: Tensor
    lengths: Tensor
    begins: Tensor

    def __init__(
        self, config: AlignmentConfig, tile_width: int, vocab_size: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.config, self.embed_dim = config, embed_dim
        width = 2 * tile_width + config.random_features
        rank, words = config.rank, config.words
        self.standardise = Standardise(tile_width)
        self.dropout = nn.Dropout(config.dropout)
        self.image_gate = nn.Parameter(torch.empty(()))
        self.text_gate = nn.Parameter(torch.empty(()))
        for name, value in (
            ("frequencies", torch.zeros(tile_width, config.random_features)),
            ("phases", torch.zeros(config.random_features)),
            ("centre", torch.zeros(width)),
            ("directions", torch.zeros(width, rank)),
            ("hashes", torch.full((words,), _NO_WORD)),
            ("idf", torch.zeros(words)),
            ("vectors", torch.zeros(words, rank)),
            ("text_centre", torch.zeros(rank)),
            ("pieces", torch.zeros(vocab_size, rank)),
            ("letters", torch.zeros(vocab_size, dtype=torch.int64)),
            ("lengths", torch.zeros(vocab_size, dtype=torch.int64)),
            ("begins", torch.ones(vocab_size, dtype=torch.bool)),
        ):
            self.register_buffer(name, value)
        powers = [_signed(pow(_FACTOR, n, 2**64)) for n in range(_LETTERS)]
        self.register_buffer("powers", torch.tensor(powers), persistent=False)

    def reset(self) -> None:
        """Random features are drawn; nothing else is known yet."""
        nn.init.ones_(self.image_gate)
        nn.init.ones_(self.text_gate)
        width = self.frequencies.shape[0]
        self.frequencies.normal_(std=self.config.frequency / math.sqrt(width))
        self.phases.uniform_(0, 2 * math.pi)

    def set_pieces(self, pieces: Sequence[str]) -> None:
        """Take what each of V tokens reads as, its spaces kept.

        Raises:
            ConfigError: no token begins with a space, so that words could not be told apart.
        """
        if not any(p[:1].isspace() and p.strip().isalpha() for p in pieces):
            raise ConfigError(
                "the model's alignment counts words, and the tokenizer's tokens do not tell where "
                'a word begins; set text.tokenizer to "train" or alignment.rank to 0'
            )
        for number, piece in enumerate(pieces):
            text = piece.strip().casefold()
            known = text if text.isalpha() else ""
            value = sum(ord(c) * pow(_FACTOR, n, 2**64) for n, c in enumerate(known))
            self.letters[number] = _signed(value)
            self.lengths[number] = len(known)
            self.begins[number] = not known or piece[:1].isspace()

    def set(self, found: Aligned) -> None:
        """Take the analysis; at most as many words as the configuration has."""
        count = len(found.hashes)
        for name in ("centre", "directions", "text_centre", "pieces"):
            getattr(self, name).copy_(getattr(found, name))
        for name in ("hashes", "idf", "vectors"):
            getattr(self, name)[:count] = getattr(found, name)
        nn.init.zeros_(self.image_gate)
        nn.init.zeros_(self.text_gate)

    @torch.no_grad()
    def statistics(self, features: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Mean, deviation and mean random features of each bag: [T, D] -> [B, S]."""
        found = self.standardise.moments(features, lengths)
        if not self.config.random_features:
            return found
        means = [self._random_features(bag) for bag in bags_of(features, lengths)]
        return torch.cat([found, torch.stack(means)], 1)

    def _random_features(self, tiles: Tensor) -> Tensor:
        """[N, D] -> [F], the mean over tiles."""

        def total(rows: Tensor) -> Tensor:
            rows = self.standardise(rows)
            return (
                (F.layer_norm(rows, rows.shape[1:]) @ self.frequencies + self.phases).cos().sum(0)
            )

        if outside_autograd():  # a trace would repeat the number of pieces
            return total(tiles) / tiles.shape[0]
        sums = [total(rows) for rows in rows_of(tiles)]
        return torch.stack(sums).sum(0) / len(tiles)

    def image(self, features: Tensor, lengths: tuple[int, ...], learned: Tensor) -> Tensor:
        """features [T, D], learned [B, E] -> [B, E], not normalised."""
        with torch.autocast(features.device.type, enabled=False):
            known = self.dropout(self.statistics(features, lengths) - self.centre) @ self.directions
        return self._join(known, self.image_gate, learned)

    def text(self, tokens: Tensor, mask: Tensor, learned: Tensor) -> Tensor:
        """tokens, mask [B, L], learned [B, E] -> [B, E], not normalised."""
        with torch.autocast(tokens.device.type, enabled=False):
            known = self._known(tokens, mask)
        return self._join(known, self.text_gate, learned)

    def _join(self, known: Tensor, gate: Tensor, learned: Tensor) -> Tensor:
        known = F.pad(F.normalize(wide(known), dim=-1), (0, self.embed_dim - known.shape[1]))
        return known + gate * F.normalize(wide(learned), dim=-1)

    def _known(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tf-idf over the known words, normalised and centred, in the joint space: [B, r]."""
        hashes, ends, _ = self.word_hashes(tokens, mask)
        rows = torch.searchsorted(self.hashes, hashes).clamp_max(len(self.hashes) - 1)
        here = ends & (self.hashes[rows] == hashes)
        same = (rows[:, :, None] == rows[:, None, :]) & here[:, None, :]
        count = same.sum(-1).clamp_min(1).to(self.idf.dtype)  # [B, L]
        # Each of the c occurrences carries its c-th part of 1 + log c.
        weight = (1 + count.log()) / count * here
        pooled = (weight[:, :, None] * self.vectors[rows]).sum(1)
        squares = (count * (weight * self.idf[rows]).square()).sum(1, keepdim=True)
        return pooled / squares.sqrt().clamp_min(1e-6) - self.text_centre

    def word_hashes(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The word up to each token, whether a word ends there, and where it began: [B, L] each.

        A word is told by its number. Those with fewer letters than `shortest_word` are none.
        """
        lengths = self.lengths[tokens] * mask
        letters = lengths > 0
        before = F.pad(letters[:, :-1], (1, 0))
        joins = letters & before & ~self.begins[tokens]
        place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        start = torch.where(joins, 0, place).cummax(1).values
        past = lengths.cumsum(1) - lengths  # letters before this token
        offset = past - past.gather(1, start)
        value = self.letters[tokens] * letters * self.powers[offset.clamp_max(_LETTERS - 1)]
        through = value.cumsum(1)
        hashes = through - (through - value).gather(1, start)
        ends = letters & ~F.pad(joins[:, 1:], (0, 1))
        return hashes, ends & (offset + lengths >= self.config.shortest_word), start

    def words(self, embedding: Tensor) -> Tensor:
        """How far each token's words point the way of an embedding: [B, E] -> [B, V]."""
        known = embedding[:, : self.pieces.shape[1]]
        return known.to(self.pieces.dtype) @ self.pieces.T


def _signed(value: int) -> int:
    """An integer modulo 2**64, as int64 has it."""
    return (value + 2**63) % 2**64 - 2**63
