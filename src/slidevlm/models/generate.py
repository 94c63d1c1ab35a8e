"""Report generation with a key/value cache.

The slide is encoded once, each new token costs one pass over itself, finished reports leave
the batch, and every specimen draws from a generator of its own, so its report is the same
alone, in any batch and on any number of processes. All sequences of a slide, beams or draws, read
its keys and values where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.beams import search
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
from slidevlm.models.language import LanguageModel
from slidevlm.models.mode import evaluation_mode

__all__ = ["Decoding", "Draft", "choose", "draft", "generate"]


def generate(
    model: CoCa | LanguageModel,
    bags: Bags,
    specimen_ids: Sequence[str],
    decoding: Decoding,
    prompt: Sequence[int] = (),
) -> list[list[int]]:
    """Write one report a bag, the best one: see `draft`.

    Returns:
        B lists of the generated token ids, without BOS, prompt and EOS.
    """
    return [list(d[0].tokens) for d in draft(model, bags, specimen_ids, decoding, prompt)]


@torch.no_grad()
def draft(
    model: CoCa | LanguageModel,
    bags: Bags,
    specimen_ids: Sequence[str],
    decoding: Decoding,
    prompt: Sequence[int] = (),
    finished: Finished | None = None,
) -> list[list[Draft]]:
    """Write the `decoding.best` best reports of each bag.

    Args:
        model: a model with a decoder; its training mode is restored, also after an error.
        bags: B bags.
        specimen_ids: B names, which seed the draws.
        decoding: how to choose tokens.
        prompt: token ids that every report begins with, after BOS.
        finished: is told of each bag, by its number, as soon as its reports are there.

    Returns:
        B lists, the best draft first; fewer than asked for where no more different ones came up.

    Raises:
        ConfigError: the model has no decoder, or the prompt leaves no room in its context.
    """
    if model.decoder is None:
        raise ConfigError("this model has no decoder: a clip model cannot write reports")
    room = model.text.context_length - 1 - len(prompt)
    steps = min(decoding.max_tokens, room)
    if steps < 1:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens, but the model's context is "
            f"{model.text.context_length}; shorten the prompt"
        )
    found: list[list[Draft]] = [[] for _ in specimen_ids]

    def keep(bag: int, drafts: list[Draft]) -> None:
        found[bag] = drafts
        if finished is not None:
            finished(bag, drafts)

    with evaluation_mode(model), few_rows(model.text, model.decoder):
        device = bags.features.device
        cache: Any = model.start(bags, 1 + len(prompt) + steps)[1]
        given = torch.tensor([[decoding.bos_id, *prompt]], device=device).repeat(len(bags), 1)
        logits = model.step(given, cache)
        if decoding.beams > 1:
            search(model, cache, logits, given[:, 1:], decoding, steps, keep)
        else:
            draws = draws_for(specimen_ids, steps, decoding).to(device)
            _write(model, cache, logits, given[:, 1:], draws, decoding, keep)
    return found


def _write(
    model: CoCa | LanguageModel,
    cache: Any,
    logits: Tensor,
    prompt: Tensor,
    draws: Tensor,
    decoding: Decoding,
    finished: Finished,
) -> None:
    """Greedily or by drawing: logits [B, V] after the prompt [B, P], draws [B * best, steps]."""
    slides, each, steps = len(logits), decoding.best, draws.shape[1]
    device = logits.device
    rows = torch.arange(slides * each, device=device)  # those that have not left the batch
    if each > 1:
        cache.keep(rows // each)
    prompt_length = prompt.shape[1]
    logits, prompt = logits[rows // each], prompt[rows // each]
    seen = torch.cat([prompt, torch.full_like(draws, decoding.eos_id, dtype=torch.int64)], dim=1)
    likely = torch.zeros(len(rows), dtype=torch.float64, device=device)
    length = torch.zeros(len(rows), dtype=torch.int64, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    alive = list(range(slides))

    def leave(slide: int) -> None:
        mine = slice(slide * each, (slide + 1) * each)
        texts = seen[mine, prompt_length:].tolist()
        parts = (texts, likely[mine].tolist(), length[mine].tolist(), ended[mine].tolist())
        drafts = [
            Draft(tuple(text[: n - end]), decoding.score(score, n), end)
            for text, score, n, end in zip(*parts, strict=True)
        ]
        finished(slide, ranked(drafts))

    for step in range(steps):
        place = prompt_length + step
        logs = log_probabilities(logits, seen[rows, :place], step, decoding)
        chosen = choose(logs, draws[rows, step], decoding)
        # Of several draws of a slide, those that have ended wait for the others, and stay.
        chosen = torch.where(ended[rows], decoding.eos_id, chosen)
        seen[rows, place] = chosen
        likely[rows] += torch.where(ended[rows], 0.0, logs.gather(1, chosen[:, None])[:, 0])
        length[rows] += ~ended[rows]
        ended[rows] |= chosen == decoding.eos_id
        going = (~ended[rows]).view(-1, each).any(1).nonzero()[:, 0]
        if step + 1 == steps or len(going) == 0:
            break
        if len(going) < len(alive):
            left = going.tolist()
            for slide in (s for i, s in enumerate(alive) if i not in left):
                leave(slide)
            alive = [alive[i] for i in left]
            kept = (going[:, None] * each + torch.arange(each, device=device)).flatten()
            rows, chosen = rows[kept], chosen[kept]
            cache.keep(kept, going)
        logits = model.step(chosen[:, None], cache)
    for slide in alive:
        leave(slide)
