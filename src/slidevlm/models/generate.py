"""Report generation with a key/value cache.

The slide is encoded once, each new token costs one pass over itself, finished reports leave
the batch, and every specimen draws from a generator of its own, so its report is the same
alone, in any batch and on any number of processes. All sequences of a slide, beams or draws, read
its keys and values where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import CheckpointError, ConfigError
from slidevlm.models.beams import search
from slidevlm.models.choosing import Chooser, Words
from slidevlm.models.coca import CoCa
from slidevlm.models.decoding import (
    Decoding,
    Draft,
    Finished,
    choose,
    draws_for,
    log_probabilities,
    ranked,
)
from slidevlm.models.few_rows import few_rows
from slidevlm.models.fused import Fused, cost
from slidevlm.models.language import LanguageModel
from slidevlm.models.lookup import NOTHING, Guess, Lookup
from slidevlm.models.mode import evaluation_mode
from slidevlm.models.sketch import Sketch

__all__ = ["Decoding", "Draft", "Lookup", "Sketch", "choose", "draft", "generate"]


def generate(
    model: CoCa | LanguageModel,
    bags: Bags,
    specimen_ids: Sequence[str],
    decoding: Decoding,
    prompt: Sequence[int] = (),
    lookup: Lookup | None = None,
    words: Words | None = None,
) -> list[list[int]]:
    """Write one report a bag, the best one: see `draft`.

    Returns:
        B lists of the generated token ids, without BOS, prompt and EOS.
    """
    found = draft(model, bags, specimen_ids, decoding, prompt, lookup=lookup, words=words)
    return [list(drafts[0].tokens) for drafts in found]


@torch.inference_mode()
def draft(
    model: CoCa | LanguageModel,
    bags: Bags,
    specimen_ids: Sequence[str],
    decoding: Decoding,
    prompt: Sequence[int] = (),
    finished: Finished | None = None,
    lookup: Lookup | None = None,
    words: Words | None = None,
    sketch: Sketch | None = None,
    *,
    finite: bool = False,
) -> list[list[Draft]]:
    """Write the `decoding.best` best reports of each bag.

    Args:
        model: a model with a decoder; its training mode is restored, also after an error.
        bags: B bags.
        specimen_ids: B names, which seed the draws.
        decoding: how to choose tokens.
        prompt: token ids that every report begins with, after BOS.
        finished: is told of each bag, by its number, as soon as its reports are there.
        lookup: guesses tokens, so that one pass writes several; the reports are the same, but for
            rounding where two tokens are as good as equally likely. Not used with beams, nor in 16
            bits.
        words: of a report's tokens, the prompt left out; needed to choose by consensus, which
            compares them.
        sketch: guesses tokens too, where one report is written at a time and layers are compiled
            (numba, on a CPU); the reports are the same as with `lookup`.
        finite: refuse weights and features that make no numbers. Their reports are empty, and
            look as likely as can be; a training goes on with these.

    Returns:
        B lists, the best draft first; fewer than asked for where no more different ones came up.

    Raises:
        ConfigError: the model has no decoder, the prompt leaves no room in its context, or drafts
            are chosen by similarity and the model is a language model, or by consensus without
            words.
        CheckpointError: with `finite`, no token has a likelihood after a bag and the prompt.
    """
    steps = _steps(model, prompt, decoding)
    found: list[list[Draft]] = [[] for _ in specimen_ids]

    with evaluation_mode(model), few_rows(model.text, model.decoder) as fused:
        device = bags.features.device
        begun: tuple[Any, Any] = model.start(bags, 1 + len(prompt) + steps)
        image, cache = begun
        chooser = Chooser(model, image, prompt, decoding, words)

        def keep(bag: int, drafts: list[Draft]) -> None:
            found[bag] = chooser.best(bag, drafts)
            if finished is not None:
                finished(bag, found[bag])

        given = torch.tensor([[decoding.bos_id, *prompt]], device=device).repeat(len(bags), 1)
        logits = model.step(given, cache)
        if finite and bool(logits.isnan().all(1).any()):
            raise CheckpointError(
                "what the model says after a slide is not finite: the weights have diverged, or "
                "precision has too narrow a range; try fp32"
            )
        if decoding.beams > 1:
            search(model, cache, logits, given[:, 1:], decoding, steps, keep)
        else:
            draws = draws_for(specimen_ids, steps, decoding).to(device)
            # With 16 bits two tokens are often equally likely, and rounding would decide.
            ahead = lookup if logits.dtype.itemsize >= 4 else None
            _write(model, cache, logits, prompt, draws, decoding, keep, ahead, fused, sketch)
    return found


def _steps(model: CoCa | LanguageModel, prompt: Sequence[int], decoding: Decoding) -> int:
    """Tokens that are generated at most."""
    if model.decoder is None:
        raise ConfigError("this model has no decoder: a clip model cannot write reports")
    room = model.text.context_length - 1 - len(prompt)
    steps = min(decoding.max_tokens, room)
    if steps < 1:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens, but the model's context is "
            f"{model.text.context_length}; shorten the prompt"
        )
    return steps


def _write(
    model: CoCa | LanguageModel,
    cache: Any,
    logits: Tensor,
    prompt: Sequence[int],
    draws: Tensor,
    decoding: Decoding,
    finished: Finished,
    lookup: Lookup | None,
    fused: Fused | None,
    sketch: Sketch | None,
) -> None:
    """Greedily or by drawing: logits [B, V] after the prompt, draws [B * written, steps]."""
    each, steps = decoding.written, draws.shape[1]
    alive = list(range(len(logits)))
    if each > 1:
        rows = torch.arange(len(draws), device=logits.device) // each
        cache.keep(rows)
        logits = logits[rows]
    active = [_Writing(i, [decoding.bos_id, *prompt], steps) for i in range(len(draws))]
    room, logits = 1 + len(prompt) + steps, logits[:, None]
    taking = math.sqrt if fused is None else cost
    while True:
        _go_on(active, logits, draws, decoding, lookup, sketch)
        over = [all(w.over for w in active[i : i + each]) for i in range(0, len(active), each)]
        for i, slide in enumerate(alive):
            if over[i]:
                mine = active[i * each : (i + 1) * each]
                finished(slide, ranked(w.draft(len(prompt) + 1, decoding) for w in mine))
        if all(over):
            return
        if any(over):
            going = [i for i, done in enumerate(over) if not done]
            kept = [i * each + j for i in going for j in range(each)]
            alive, active = [alive[i] for i in going], [active[i] for i in kept]
            cache.keep(*(torch.tensor(x, device=logits.device) for x in (kept, going)))
        # A report's last token is in its text, but not yet in the cache.
        lengths = [len(w.text) - 1 for w in active]
        count, most = 1, room - 1 - max(lengths)
        for w in active:
            w.guess = NOTHING if w.over or lookup is None else lookup.guess(w.text)
            w.sketched = ()
        if lookup is not None:
            count = lookup.worth([w.guess for w in active], most, taking)
        if count == 1 and len(active) == 1 and sketch is not None and fused is not None:
            guesses = sketch.worth(fused, most) - 1
            if guesses:
                cache.place(lengths, 1)
                with sketch.rounded(fused):
                    _foresee(model, cache, active[0], draws, decoding, guesses)
                count = 1 + len(active[0].sketched)
        if lookup is not None or (sketch is not None and len(active) == 1):
            cache.place(lengths, count)
        # Of several draws of a slide, those that have ended wait for the others.
        ahead = [[w.text[-1], *w.ahead[: count - 1]] for w in active]
        padded = [[*t, *[decoding.eos_id] * (count - len(t))] for t in ahead]
        tokens = torch.tensor(padded, device=logits.device)
        logits = model.step(tokens, cache)[:, None] if count == 1 else model.steps(tokens, cache)


def _foresee(
    model: CoCa | LanguageModel,
    cache: Any,
    writing: _Writing,
    draws: Tensor,
    decoding: Decoding,
    count: int,
) -> None:
    """Guess the next tokens of a report, up to its end, by the model as it is now."""
    last = writing.text[-1]
    for place in range(count):
        logits = model.step(torch.tensor([[last]], device=draws.device), cache)
        chosen, _ = _chosen([writing], logits[:, None], place, draws, decoding)
        last = int(chosen)
        writing.sketched += (last,)
        if last == decoding.eos_id:
            break


@dataclass
class _Writing:
    """A report that is being written."""

    row: int  # of the draws
    text: list[int]  # BOS and prompt first
    left: int  # tokens that may still come
    likely: float = 0.0
    ended: bool = False
    guess: Guess = NOTHING  # the lookup's
    sketched: tuple[int, ...] = ()

    @property
    def ahead(self) -> tuple[int, ...]:
        """The tokens that are guessed to come next."""
        return self.sketched or self.guess.tokens

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.ended or not self.left

    def draft(self, start: int, decoding: Decoding) -> Draft:
        """The finished report, whose own tokens begin at `start`."""
        tokens = self.text[start:]
        score = decoding.score(self.likely, len(tokens))
        return Draft(tuple(tokens[: len(tokens) - self.ended]), score, self.ended)


def _go_on(
    active: Sequence[_Writing],
    logits: Tensor,
    draws: Tensor,
    decoding: Decoding,
    lookup: Lookup | None,
    sketch: Sketch | None,
) -> None:
    """Choose the next tokens: logits [R, n, V] after the last one and after n - 1 guessed ones.

    Each token is chosen as if it came alone, from what stands before it and with the draw of its
    place. The guess was right up to the first one that is chosen otherwise.
    """
    count = logits.shape[1]
    chosen, likely = _chosen(active, logits, 0, draws, decoding)
    found = torch.stack([chosen.double(), likely.double()]).view(2, -1, count).tolist()
    for w, tokens, values in zip(active, *found, strict=True):
        before = len(w.text)
        guessed = [*w.ahead[: count - 1], None]
        for token, value, ahead in zip(map(int, tokens), values, guessed, strict=False):
            if w.over:
                break
            w.text.append(token)
            w.left, w.likely, w.ended = w.left - 1, w.likely + value, token == decoding.eos_id
            if token != ahead:
                break
        new = len(w.text) - before
        if sketch is not None:
            sketch.learn(w.sketched, w.text[before:])
        if lookup is not None and new:
            lookup.learn(w.guess, w.text, new)


def _chosen(
    active: Sequence[_Writing], logits: Tensor, ahead: int, draws: Tensor, decoding: Decoding
) -> tuple[Tensor, Tensor]:
    """The next tokens and their log probabilities, each [R * n].

    logits [R, n, V]: after `ahead` guessed tokens, and after each further one.
    """
    count, steps = logits.shape[1], draws.shape[1]
    guessed = range(ahead, ahead + count)
    places = [steps - w.left + n for w in active for n in guessed]
    seen = _seen(active, guessed, decoding, logits.device)
    logs = log_probabilities(logits.flatten(0, 1), seen, places, decoding)
    drawn: Tensor | None = None
    if decoding.draws:
        # Beyond a report's end nothing is taken of what is chosen.
        rows = [w.row for w in active for _ in guessed]
        drawn = draws[rows, [min(place, steps - 1) for place in places]]
    chosen = choose(logs, drawn, decoding)
    return chosen, logs.gather(1, chosen[:, None])[:, 0]


def _seen(
    active: Sequence[_Writing], guessed: range, decoding: Decoding, device: torch.device
) -> Tensor:
    """Tokens before each place, after so many guessed ones of each report: [R * n, t], BOS left."""
    rows = len(active) * len(guessed)
    if decoding.repetition_penalty == 1 and not decoding.no_repeat_ngram:
        return torch.zeros(rows, 0, dtype=torch.int64, device=device)
    texts = [[*w.text[1:], *w.ahead[:n]] for w in active for n in guessed]
    most = max(map(len, texts))
    padded = [[decoding.bos_id] * (most - len(text)) + text for text in texts]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(rows, most)
