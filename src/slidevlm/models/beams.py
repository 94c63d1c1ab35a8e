"""Beam search, in groups that keep away from each other (Vijayakumar et al., AAAI 2018).

Each slide has `groups` groups of k beams. At each step the groups choose one after the other. A
beam's candidates are all its continuations; a token loses `diversity` for each beam of an earlier
group of the slide that has just chosen it (Hamming diversity). The loss decides what is chosen,
and is not kept in a beam's log-probability. Of the 2 k best candidates of a group, EOS among the
first k ends a report, and the k best that are not EOS go on.

A group is done when it has k reports and none of its beams scores higher now than the worst of
the k best. At the greatest length the beams that are left count as reports too. A slide's reports
are those of all its groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slidevlm.models.coca import CoCa
from slidevlm.models.decoding import Decoding, Draft, Finished, log_probabilities, ranked
from slidevlm.models.language import LanguageModel


@dataclass
class Choice:
    """What b slides have chosen at a step; parents are numbers of beams within their group."""

    tokens: Tensor  # [b, G, k]
    parents: Tensor  # [b, G, k]
    likely: Tensor  # [b, G, k] log-probabilities
    ends: Tensor  # [b, G, k] bool: the candidate of that rank ends a report
    end_parents: Tensor  # [b, G, k]
    end_likely: Tensor  # [b, G, k]


def choose_beams(logs: Tensor, likely: Tensor, done: Tensor, decoding: Decoding) -> Choice:
    """One step of all groups.

    Args:
        logs: [b, G, k, V] log-probabilities of the next token.
        likely: [b, G, k] of the beams so far; -inf where there is none yet.
        done: [b, G] groups that choose no more, and so keep nobody away.
        decoding: EOS and diversity.
    """
    slides, groups, k, vocabulary = logs.shape
    taken = logs.new_zeros(slides, vocabulary)
    parts: list[tuple[Tensor, ...]] = []
    for group in range(groups):
        total = likely[:, group, :, None] + logs[:, group]  # [b, k, V]
        wanted = total - decoding.diversity * taken[:, None]
        _, at = wanted.flatten(1).topk(2 * k, dim=1)
        value = total.flatten(1).gather(1, at)
        parent, token = at // vocabulary, at % vocabulary
        end = token == decoding.eos_id
        on = end.int().argsort(dim=1, stable=True)[:, :k]  # the best that do not end
        chosen, reached = token.gather(1, on), value.gather(1, on)
        there = reached.isfinite() & ~done[:, group, None]
        taken.scatter_add_(1, chosen, there.to(taken.dtype))
        parts.append(
            (
                chosen,
                parent.gather(1, on),
                reached,
                (end & value.isfinite())[:, :k] & ~done[:, group, None],
                parent[:, :k],
                value[:, :k],
            )
        )
    return Choice(*(torch.stack(columns, dim=1) for columns in zip(*parts, strict=True)))


def search(
    model: CoCa | LanguageModel,
    cache: Any,
    logits: Tensor,
    prompt: Tensor,
    decoding: Decoding,
    steps: int,
    finished: Finished,
) -> None:
    """The best reports of B slides.

    Args:
        model: what continues; it has seen the prompt.
        cache: of B sequences, one a slide.
        logits: [B, V] after the prompt.
        prompt: [B, P] without BOS.
        decoding: beams, groups and the rest.
        steps: tokens generated at most.
        finished: gets each slide's reports as soon as it is done.
    """
    beams, start, device = decoding.beams, prompt.shape[1], logits.device
    rows = torch.arange(len(logits), device=device).repeat_interleave(beams)
    cache.keep(rows)
    logits = logits[rows]
    front = _Front.of(prompt, steps, decoding)
    origin = _Origins(len(rows), start + 1 + steps, start + 1)
    for step in range(steps):
        logs = log_probabilities(logits, front.seen[:, : start + step], step, decoding)
        parents = front.advance(logs, start, step)
        going = [i for i, slide in enumerate(front.slides) if not all(slide.done)]
        if step + 1 == steps or not going:
            break
        since = origin.follow(parents)
        if len(going) < len(front.slides):
            for slide in (s for s in front.slides if all(s.done)):
                finished(slide.number, slide.best(decoding.written))
            kept = torch.tensor(going, device=device)
            rows = front.keep(kept)
            cache.keep(parents[rows], kept)
            origin.keep(rows)
        elif since is not None:
            cache.reorder(parents, since)
        logits = model.step(front.seen[:, start + step, None], cache)
    _take_the_rest(front.slides, front.seen[:, start : start + step + 1], front.likely)
    for slide in front.slides:
        finished(slide.number, slide.best(decoding.written))


@dataclass
class _Front:
    """The beams of the b slides that are not done; beam k of group g of slide i is a row."""

    slides: list[_Slide]
    seen: Tensor  # [b * G * k, P + steps] tokens without BOS; 0 where none is yet
    likely: Tensor  # [b, G, k] log-probabilities
    decoding: Decoding

    @staticmethod
    def of(prompt: Tensor, steps: int, decoding: Decoding) -> _Front:
        """Before the first step, when each group has one beam: the prompt [B, P]."""
        count, groups = len(prompt), decoding.groups
        each = decoding.beams // groups
        seen = torch.cat([prompt, prompt.new_zeros(count, steps)], dim=1)
        likely = torch.full((count, groups, each), float("-inf"), device=prompt.device)
        likely[:, :, 0] = 0.0
        slides = [_Slide(number, groups, each, decoding) for number in range(count)]
        return _Front(slides, seen.repeat_interleave(decoding.beams, dim=0), likely, decoding)

    def advance(self, logs: Tensor, start: int, step: int) -> Tensor:
        """One token more: choose, give the slides the reports that end, and judge who is done.

        Args:
            logs: [b * G * k, V] log-probabilities of the next token.
            start: P, where reports begin.
            step: tokens generated so far.

        Returns:
            [b * G * k] the row that each row goes on from.
        """
        slides, groups, each = self.likely.shape
        done = torch.tensor([s.done for s in self.slides], device=logs.device)
        shape = (slides, groups, each, logs.shape[1])
        choice = choose_beams(logs.view(shape), self.likely, done, self.decoding)
        _harvest(self.slides, choice, self.seen[:, start : start + step])
        first = torch.arange(0, len(self.seen), each, device=logs.device).view(slides, groups, 1)
        parents = (first + choice.parents).flatten()
        self.likely, self.seen = choice.likely, self.seen[parents]
        self.seen[:, start + step] = choice.tokens.flatten()
        for slide, live in zip(self.slides, self.likely.amax(2).tolist(), strict=True):
            slide.judge(live, step + 1)
        return parents

    def keep(self, kept: Tensor) -> Tensor:
        """Keep these of the slides; returns the rows that are left."""
        beams = self.decoding.beams
        rows = (kept[:, None] * beams + torch.arange(beams, device=kept.device)).flatten()
        self.slides = [self.slides[i] for i in kept.tolist()]
        self.seen, self.likely = self.seen[rows], self.likely[kept]
        return rows


class _Slide:
    """The reports of one slide, by group."""

    def __init__(self, number: int, groups: int, each: int, decoding: Decoding) -> None:
        self.number = number
        self.each, self.decoding = each, decoding
        self.drafts: list[list[Draft]] = [[] for _ in range(groups)]
        self.done = [False] * groups

    def add(self, group: int, tokens: Sequence[int], likely: float, *, ended: bool) -> None:
        """Keep a report if it is among the group's k best."""
        score = self.decoding.score(likely, len(tokens) + ended)
        mine = [*self.drafts[group], Draft(tuple(tokens), score, ended)]
        self.drafts[group] = sorted(mine, key=lambda d: -d.score)[: self.each]

    def judge(self, live: Sequence[float], length: int) -> None:
        """Which groups are done, given the best log-probability of each one's beams."""
        for group, likely in enumerate(live):
            drafts = self.drafts[group]
            full = len(drafts) == self.each
            if full and not self.decoding.score(likely, length) > drafts[-1].score:
                self.done[group] = True

    def best(self, number: int) -> list[Draft]:
        """The best of all groups, each text once."""
        return ranked(d for drafts in self.drafts for d in drafts)[:number]


def _harvest(alive: Sequence[_Slide], choice: Choice, seen: Tensor) -> None:
    """Give the slides the reports that have just ended; seen [b * beams, step]."""
    where = choice.ends.nonzero().tolist()
    if not where:
        return
    parents, likely = choice.end_parents.tolist(), choice.end_likely.tolist()
    groups, each = choice.ends.shape[1:]
    for i, group, rank in where:
        row = (i * groups + group) * each + parents[i][group][rank]
        alive[i].add(group, seen[row].tolist(), likely[i][group][rank], ended=True)


def _take_the_rest(alive: Sequence[_Slide], seen: Tensor, likely: Tensor) -> None:
    """Beams that were cut off count too; seen [b * beams, steps]."""
    values, texts = likely.tolist(), iter(seen.tolist())
    for i, slide in enumerate(alive):
        for group, done in enumerate(slide.done):
            for value in values[i][group]:
                tokens = next(texts)
                if not done and value > float("-inf"):
                    slide.add(group, tokens, value, ended=False)


class _Origins:
    """Which sequence wrote each place of the cache, to copy no more than what differs.

    Beams of a slide mostly share all but their last tokens.
    """

    def __init__(self, rows: int, capacity: int, filled: int) -> None:
        self.writer = torch.zeros(rows, capacity, dtype=torch.int32)
        self.length = filled  # the prompt is the same for all of a slide

    def follow(self, parents: Tensor) -> int | None:
        """Sequence i becomes a copy of `parents[i]` and writes one more place.

        Returns:
            The first place that must be copied; None where nothing must.
        """
        now = self.writer[:, : self.length]
        followed = now[parents.cpu()]
        differs = (followed != now).any(0).nonzero()
        self.writer[:, : self.length] = followed
        self.writer[:, self.length] = torch.arange(len(self.writer))
        self.length += 1
        return int(differs[0]) if len(differs) else None

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences."""
        self.writer = self.writer[rows.cpu()]
