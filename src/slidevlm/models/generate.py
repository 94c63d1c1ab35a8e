"""Report generation with a key/value cache.

The slide is encoded once, each new token costs one pass over itself, finished reports leave
the batch, and every specimen draws from a generator of its own, so its report is the same
alone, in any batch and on any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.errors import ConfigError
from slidevlm.models.coca import CoCa
from slidevlm.models.mode import evaluation_mode


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen."""

    bos_id: int
    eos_id: int
    pad_id: int
    max_tokens: int = 100  # generated at most, EOS included
    top_k: int = 1  # 1 is greedy; k draws among the k most likely
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {self.top_k}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be greater than 0, not {self.temperature}")


@torch.no_grad()
def generate(
    model: CoCa,
    bags: Bags,
    specimen_ids: Sequence[str],
    decoding: Decoding,
    prompt: Sequence[int] = (),
) -> list[list[int]]:
    """Write one report a bag.

    Args:
        model: a model with a decoder; its training mode is restored, also after an error.
        bags: B bags.
        specimen_ids: B names, which seed the draws.
        decoding: how to choose tokens.
        prompt: token ids that every report begins with, after BOS.

    Returns:
        B lists of the generated token ids, without BOS, prompt and EOS.
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
    with evaluation_mode(model):
        return _generate(model, bags, specimen_ids, decoding, list(prompt), steps)


def _generate(
    model: CoCa,
    bags: Bags,
    specimen_ids: Sequence[str],
    decoding: Decoding,
    prompt: list[int],
    steps: int,
) -> list[list[int]]:
    device = bags.features.device
    _, cache = model.start(bags, 1 + len(prompt) + steps)
    tokens = torch.tensor([[decoding.bos_id, *prompt]], device=device).repeat(len(bags), 1)
    draws = _draws(specimen_ids, steps, decoding).to(device)  # [B, steps]
    alive = torch.arange(len(bags), device=device)
    written = torch.full((len(bags), steps), decoding.eos_id, device=device)
    for step in range(steps):
        chosen = choose(model.step(tokens, cache).float(), draws[alive, step], decoding)
        written[alive, step] = chosen
        going = (chosen != decoding.eos_id).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(alive):
            alive, chosen = alive[going], chosen[going]
            cache.keep(going)
        tokens = chosen[:, None]
    return [_until(row, decoding.eos_id) for row in written.tolist()]


def choose(logits: Tensor, draws: Tensor, decoding: Decoding) -> Tensor:
    """Next tokens.

    Args:
        logits: [B, V] float32; BOS and padding are never chosen.
        draws: [B] uniform numbers in [0, 1).
        decoding: top_k 1 takes the most likely token, otherwise the draw decides among the k.

    Returns:
        [B] token ids.
    """
    logits = logits.clone()
    logits[:, [decoding.bos_id, decoding.pad_id]] = float("-inf")
    if decoding.top_k == 1:
        return logits.argmax(-1)
    values, candidates = logits.topk(min(decoding.top_k, logits.shape[1]), dim=-1)
    cumulated = (values / decoding.temperature).softmax(-1).cumsum(-1)
    # Rounding can leave the last sum below a draw near 1.
    place = (cumulated <= draws[:, None]).sum(-1).clamp_max(candidates.shape[1] - 1)
    return candidates.gather(1, place[:, None])[:, 0]


def _draws(specimen_ids: Sequence[str], steps: int, decoding: Decoding) -> Tensor:
    rows = []
    for specimen in specimen_ids:
        digest = hashlib.blake2b(f"{decoding.seed}/{specimen}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(steps, generator=generator))
    return torch.stack(rows)


def _until(row: list[int], eos_id: int) -> list[int]:
    return row[: row.index(eos_id)] if eos_id in row else row
