"""What tests of steps on several processes share: starting them, and the objective written down.

Files of tests are programs of their processes too, and find this module beside them either way.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slidevlm.batch import Batch, Output
from slidevlm.losses import caption_loss_sum, contrastive_loss, siglip_loss


class Terms(Protocol):
    """What of a test's case the objective depends on."""

    @property
    def siglip(self) -> bool: ...

    @property
    def weights(self) -> tuple[float, float]: ...


def replayed(model: nn.Module, mine: Sequence[Batch]) -> list[Output]:
    """A rank's micro-batches in one graph, each with the dropout that accumulation draws for it."""
    seeds = torch.randint(2**62, (len(mine),)).tolist() if len(mine) > 1 else [None]
    outputs = []
    for batch, seed in zip(mine, seeds, strict=True):
        if seed is not None:
            torch.manual_seed(seed)
        outputs.append(model(batch.bags, batch.tokens, batch.token_mask))
    return outputs


def objective(case: Terms, outputs: Sequence[Output], batches: Sequence[Batch]) -> Tensor:
    image = torch.cat([o.image_embedding for o in outputs])
    text = torch.cat([o.text_embedding for o in outputs])
    ids, scale = torch.cat([b.report_ids for b in batches]), outputs[0].logit_scale
    if case.siglip:
        contrastive = siglip_loss(image, text, scale, outputs[0].logit_bias, ids)
    else:
        contrastive = contrastive_loss(image, text, scale, ids)
    pairs = list(zip(outputs, batches, strict=True))
    sums = [caption_loss_sum(o.logits, b.tokens, b.token_mask) for o, b in pairs]
    caption = torch.stack(sums).sum() / sum(b.token_mask[:, 1:].sum() for b in batches)
    terms = zip(case.weights, (contrastive, caption), strict=True)
    # A term times 0 would leave gradients of 0, with which weight decay moves the weights.
    return torch.stack([weight * term for weight, term in terms if weight]).sum()


def start_ranks(script: str, folder: Path, world: int, *more: str) -> list[Any]:
    """Run a file of tests as the program of `world` processes; what each has left in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *more],
            # One that crashes below Python says nothing else, and the others only that it is gone.
            env={
                **os.environ,
                **place,
                "RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "PYTHONFAULTHANDLER": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=280)[1] for process in processes]
        codes = [process.returncode for process in processes]
        assert codes == [0] * world, f"ended with {codes}:\n" + "\n".join(errors)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
