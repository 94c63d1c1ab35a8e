"""How tokens are chosen: the settings, and what they do to a row of logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slidevlm.errors import ConfigError
from slidevlm.registry import unknown

CHOICES = ("likelihood", "consensus", "similarity", "both")
_BANNED = float("-inf")


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: greedily (the default), by drawing, or by beam search.

    Tokens are drawn where `top_k` is not 1; beams are searched where `beams` is above 1.

    Raises:
        ConfigError: a value out of range, or one that would have no effect beside the others.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    max_tokens: int = 100  # generated at most, EOS included
    min_tokens: int = 0  # before EOS; the end of the room goes first
    top_k: int | None = 1  # 1 is greedy; k draws among the k most likely; None among all
    top_p: float = 1.0  # draw among the fewest most likely tokens that have this share together
    temperature: float = 1.0  # of the draws
    repetition_penalty: float = 1.0  # of tokens that are there already (Keskar et al., 2019)
    no_repeat_ngram: int = 0  # no run of so many tokens occurs twice; 0: any may
    beams: int = 1
    groups: int = 1  # of beams, each kept from what those before it have chosen
    diversity: float = 0.5  # logarithm taken off for each earlier group that chose the token
    length_penalty: float = 1.0  # score = log-probability / tokens ** length_penalty
    best: int = 1  # reports returned of each slide
    candidates: int = 1  # reports written of each slide to choose the best from, where above `best`
    choose: str = "likelihood"  # how they are ranked: see `slidevlm.models.choosing`
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.beams == 1:
            self._check_alone()
        else:
            self._check_beams()

    @property
    def draws(self) -> bool:
        """Whether chance decides."""
        return self.top_k != 1

    @property
    def written(self) -> int:
        """Reports written of each slide."""
        return max(self.best, self.candidates)

    @property
    def settings(self) -> dict[str, Any]:
        """Those that have an effect on what is written, by name, for a record."""
        mine = ["max_tokens", "min_tokens", "repetition_penalty", "no_repeat_ngram"]
        mine += ["length_penalty", "best"]
        if self.written > 1:
            mine += ["candidates", "choose"]
        if self.beams > 1:
            form = "beams"
            mine += ["beams", "groups", *(["diversity"] if self.groups > 1 else [])]
        elif self.draws:
            form = "draws"
            mine += ["top_k", "top_p", "temperature", "seed"]
        else:
            form = "greedy"
        return {"form": form, **{k: v for k, v in asdict(self).items() if k in mine}}

    def _check_ranges(self) -> None:
        least = {
            "max_tokens": (self.max_tokens, 1),
            "min_tokens": (self.min_tokens, 0),
            "top_k": (self.top_k, 1),
            "no_repeat_ngram": (self.no_repeat_ngram, 0),
            "beams": (self.beams, 1),
            "groups": (self.groups, 1),
            "best": (self.best, 1),
            "candidates": (self.candidates, 1),
            "diversity": (self.diversity, 0.0),
        }
        for name, (value, minimum) in least.items():
            if value is not None and not value >= minimum:
                raise ConfigError(f"{name} must be at least {minimum}, not {value}")
        # Beyond these limits single precision makes infinity or 0 of them.
        for name in ("temperature", "repetition_penalty"):
            if not 1e-30 <= getattr(self, name) <= 1e30:
                raise ConfigError(f"{name} must be from 1e-30 to 1e+30, not {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not self.diversity <= 1e30:
            raise ConfigError(f"diversity must be at most 1e+30, not {self.diversity}")
        if not -10 <= self.length_penalty <= 10:
            raise ConfigError(f"length_penalty must be from -10 to 10, not {self.length_penalty}")
        if self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if 1 < self.candidates < self.best:
            raise ConfigError(f"{self.candidates} candidates are fewer than the {self.best} best")
        if self.choose not in CHOICES:
            raise ConfigError(unknown("choose", self.choose, CHOICES))
        if self.choose != "likelihood" and self.written == 1:
            raise ConfigError(
                f"choose {self.choose} needs several reports to choose from; give candidates, "
                "such as 16"
            )

    def _check_alone(self) -> None:
        if self.groups > 1:
            raise ConfigError(f"{self.groups} groups need beams; give a multiple of them")
        if not self.draws:
            if self.top_p != 1 or self.temperature != 1:
                raise ConfigError(
                    "top_p and temperature decide draws, and top_k 1 is greedy; give another top_k"
                )
            if self.written > 1:
                what = "candidates" if self.candidates > self.best else "best"
                raise ConfigError(
                    f"greedy decoding writes one report, not the {self.written} {what}; use beams "
                    "or draws (top_k)"
                )

    def _check_beams(self) -> None:
        if self.draws or self.top_p != 1 or self.temperature != 1:
            raise ConfigError(
                "beam search draws nothing; leave top_k, top_p and temperature out, or the beams"
            )
        if self.beams % self.groups:
            raise ConfigError(f"{self.beams} beams do not divide into {self.groups} groups")
        if self.groups > 1 and self.diversity == 0:
            raise ConfigError("groups without diversity are all the same; give it above 0")
        if self.written > self.beams:
            what = "candidates" if self.candidates > self.best else "best"
            raise ConfigError(f"the {self.written} {what} need as many beams, not {self.beams}")

    def score(self, log_probability: float, tokens: int) -> float:
        """Of a report of so many generated tokens, EOS included."""
        return float(log_probability / tokens**self.length_penalty)


@dataclass(frozen=True)
class Draft:
    """One generated report.

    `score` is its log-probability under the model (penalties and bans applied, draws as likely as
    before temperature, top_k and top_p) over its length to the power of the length penalty.
    """

    tokens: tuple[int, ...]  # without BOS, prompt and EOS
    score: float
    ended: bool  # by EOS; otherwise cut off at the greatest length
    times: int = 1  # it came up
    merit: float | None = None  # what it was chosen by, where that is not the score


Finished = Callable[[int, list[Draft]], None]  # is told of a slide, by its number, when it is done


def ranked(drafts: Iterable[Draft]) -> list[Draft]:
    """The best first, each text once."""
    once: dict[tuple[int, ...], Draft] = {}
    for each in sorted(drafts, key=lambda d: (-d.score, d.tokens)):
        known = once.get(each.tokens)
        once[each.tokens] = each if known is None else replace(known, times=known.times + 1)
    return list(once.values())


def log_probabilities(
    logits: Tensor, seen: Tensor, written: int | Sequence[int], decoding: Decoding
) -> Tensor:
    """What the next token may be, and how likely.

    Args:
        logits: [R, V].
        seen: [R, t] the tokens so far, BOS left out; where some rows have fewer, BOS on the left.
        written: how many of them are generated; R numbers where that differs.
        decoding: penalties and bans.

    Returns:
        [R, V] float32 logarithms; -inf for what may not be. Where nothing else may, EOS may.
    """
    logits = logits.float().nan_to_num(nan=_BANNED, neginf=_BANNED)  # a copy
    logits[:, decoding.bos_id] = logits[:, decoding.pad_id] = _BANNED
    if decoding.repetition_penalty != 1 and seen.shape[1]:
        there, penalty = logits.gather(1, seen), decoding.repetition_penalty
        logits.scatter_(1, seen, torch.where(there > 0, there / penalty, there * penalty))
    if decoding.no_repeat_ngram and seen.shape[1] >= decoding.no_repeat_ngram:
        _ban_repeats(logits, seen, decoding.no_repeat_ngram)
    early = [n < decoding.min_tokens for n in ([written] if isinstance(written, int) else written)]
    if all(early):
        logits[:, decoding.eos_id] = _BANNED
    elif any(early):
        rows = torch.tensor(early, device=logits.device)
        logits[:, decoding.eos_id].masked_fill_(rows, _BANNED)
    stuck = logits.amax(1) == _BANNED
    logits[:, decoding.eos_id].masked_fill_(stuck, 0.0)
    return logits.log_softmax(1)


def _ban_repeats(logits: Tensor, seen: Tensor, n: int) -> None:
    """Ban in [R, V] what would end an n-gram that [R, t >= n] has already."""
    grams = seen.unfold(1, n, 1)  # [R, t - n + 1, n]
    now = seen[:, seen.shape[1] - n + 1 :]
    again = (grams[:, :, :-1] == now[:, None]).all(2)
    row, place = again.nonzero(as_tuple=True)
    logits[row, grams[row, place, -1]] = _BANNED


def choose(log_probabilities: Tensor, draws: Tensor | None, decoding: Decoding) -> Tensor:
    """Next tokens.

    Args:
        log_probabilities: [R, V].
        draws: [R] uniform numbers in [0, 1); None where nothing is drawn.
        decoding: top_k 1 takes the most likely token, otherwise the draw decides among the k,
            or the fewest of these that have `top_p` of the probability together.

    Returns:
        [R] token ids.
    """
    if not decoding.draws:
        return log_probabilities.argmax(-1)
    assert draws is not None
    most = log_probabilities.shape[1]
    values, candidates = log_probabilities.topk(min(decoding.top_k or most, most), dim=-1)
    chances = (values / decoding.temperature).softmax(-1)
    cumulated = chances.cumsum(-1)
    # A token is within top_p while those before it have not reached it.
    kept = chances * (cumulated - chances < decoding.top_p)
    cumulated = kept.cumsum(-1)
    place = (cumulated <= draws[:, None] * cumulated[:, -1:]).sum(-1)
    # Rounding can leave the last sum at a draw near 1: then it is the last one with any chance.
    place = torch.minimum(place, (kept > 0).sum(-1) - 1)
    return candidates.gather(1, place[:, None])[:, 0]


def draws_for(specimen_ids: Sequence[str], steps: int, decoding: Decoding) -> Tensor:
    """Uniform numbers that depend on the seed and on each name: [B * written, steps] float32."""
    rows = []
    for specimen in specimen_ids:
        for i in range(decoding.written):
            key = f"{decoding.seed}/{specimen}" + (f"/{i}" if i else "")
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            rows.append(torch.rand(steps, generator=generator))
    return torch.stack(rows)
