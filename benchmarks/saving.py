"""What a checkpoint costs the training loop: written beside it, and in it.

    python benchmarks/saving.py [--model coca_stage_1] [--bags 4] [--tiles 2000] [--every 3]
                                [--blocks 9]

A shipped model trains with AdamW on one batch of bags of 1,024 numbers a tile and reports of 100
words. Steps are timed alone, with a checkpoint begun after every `--every`-th, and with one
written in the loop. The three take turns, block by block, for the machine's noise to fall on all;
medians are over the blocks. What a checkpoint costs is the time of the steps of a block above
those of a block without any. The bar: beside the loop under 5 % of a step. How long the loop
itself stands still is told apart: the rest is the writing, which takes cores and memory's
bandwidth from the steps where there are none to spare, as with a thread for each core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slidevlm.batch import Bags
from slidevlm.losses import caption_loss_sum, contrastive_loss
from slidevlm.models import CoCa, build_model, from_dict, zoo
from slidevlm.train.checkpoint import Keeper, ModelState, Progress, TrainState
from slidevlm.train.saving import Writer

TILE_WIDTH, VOCABULARY, WORDS = 1024, 8192, 100


class Loop:
    """A loop of optimizer steps whose state can be saved."""

    def __init__(self, name: str, bags: int, tiles: int) -> None:
        torch.manual_seed(0)
        config = from_dict({**zoo.load(name).to_dict(), "tile_width": TILE_WIDTH}, name)
        model = build_model(config, VOCABULARY)
        assert isinstance(model, CoCa)
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.bags = Bags(torch.randn(bags * tiles, TILE_WIDTH), (tiles,) * bags)
        length = min(WORDS, model.text.context_length)
        self.tokens = torch.randint(3, VOCABULARY, (bags, length))
        self.mask = torch.ones_like(self.tokens, dtype=torch.bool)
        self.reports = torch.arange(bags)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        output = self.model(self.bags, self.tokens, self.mask, only_real=True)
        loss = contrastive_loss(
            output.image_embedding, output.text_embedding, output.logit_scale, self.reports
        )
        loss = loss + caption_loss_sum(output.logits, self.tokens, self.mask) / self.mask.sum()
        loss.backward()
        self.optimizer.step()

    def states(self) -> tuple[ModelState, TrainState]:
        model = ModelState(self.model.state_dict(), {}, "{}", 1, False, None)
        state = self.optimizer.state_dict()
        return model, TrainState(Progress(1), state, {}, [], {}, 0, "", {}, 1)


def block(loop: Loop, steps: int, save: Callable[[], None], finish: Callable[[], None]) -> float:
    """Seconds of some steps, the first of which follows a save."""
    start = time.perf_counter()
    save()
    for _ in range(steps):
        loop.step()
    seconds = time.perf_counter() - start
    finish()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coca_stage_1")
    parser.add_argument("--bags", type=int, default=4)
    parser.add_argument("--tiles", type=int, default=2000, help="of each bag")
    parser.add_argument("--every", type=int, default=3, help="steps between two checkpoints")
    parser.add_argument("--blocks", type=int, default=9)
    arguments = parser.parse_args()
    loop = Loop(arguments.model, arguments.bags, arguments.tiles)
    with tempfile.TemporaryDirectory() as folder:
        keeper = Keeper(
            Path(folder), every_epochs=1, epochs=1, most_recent=False, delete_previous=True
        )
        writer = Writer(keeper.store)
        waited = [0.0]  # by the loop itself, for the copy to begin and to end

        def timed(wait: Callable[[], None]) -> None:
            start = time.perf_counter()
            wait()
            waited[0] += time.perf_counter() - start

        loop.optimizer.register_step_pre_hook(lambda *_: timed(writer.settle))
        files = [Path(folder) / "step_1.pt"]

        def finish() -> None:
            writer.wait()

        ways: dict[str, Callable[[], None]] = {
            "none": lambda: None,
            "beside the loop": lambda: timed(lambda: writer.start(files, *loop.states())),
            "in the loop": lambda: keeper.store(files, *loop.states()),
        }
        for save in ways.values():  # memory for the copies, moments, the disk's cache
            block(loop, 2, save, finish)
        waited[0] = 0.0
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.blocks):
            for name, save in ways.items():
                seconds[name].append(block(loop, arguments.every, save, finish))
        size = files[0].stat().st_size / 2**20
    step = statistics.median(seconds["none"]) / arguments.every
    print(f"checkpoint of {size:.0f} MB, step of {1000 * step:.0f} ms")
    stood = waited[0] / arguments.blocks
    print(
        f"beside the loop, the loop stands still for {1000 * stood:.1f} ms a checkpoint, "
        f"{100 * stood / step:.1f} % of a step"
    )
    for name in list(ways)[1:]:
        pairs = zip(seconds[name], seconds["none"], strict=True)
        costs = sorted(a - b for a, b in pairs)
        cost = statistics.median(costs)
        print(
            f"{name}: {1000 * cost:.1f} ms a checkpoint ({1000 * costs[0]:.1f} to "
            f"{1000 * costs[-1]:.1f}), {100 * cost / step:.1f} % of a step"
        )


if __name__ == "__main__":
    main()
