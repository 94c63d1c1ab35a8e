"""What a checkpoint costs the training loop: written beside it, and in it.

    python benchmarks/saving.py [--width 1024] [--rows 512] [--every 10] [--blocks 9]

A model of linear layers with AdamW trains on a fixed batch. Steps are timed alone, with a
checkpoint begun after every `--every`-th, and with one written in the loop. The three take turns,
block by block, for the machine's noise to fall on all; medians are over the blocks. What a
checkpoint costs is the time of the steps of a block above those of a block without any, divided
by the number of checkpoints. The bar: beside the loop under 5 % of a step, where there is a core
for it and steps are longer than the copy. How long the loop itself stands still is told apart:
the rest is the writing, which takes cores and memory's bandwidth from the steps where there are
none to spare.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from slidevlm.train.checkpoint import Keeper, ModelState, Progress, TrainState
from slidevlm.train.saving import Writer

LAYERS = 12


class Loop:
    """A loop of optimizer steps whose state can be saved."""

    def __init__(self, width: int, rows: int) -> None:
        torch.manual_seed(0)
        layers = [m for _ in range(LAYERS) for m in (nn.Linear(width, width), nn.GELU())]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randn(rows, width)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.batch).square().mean().backward()
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
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=512, help="of the batch")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--blocks", type=int, default=9)
    arguments = parser.parse_args()
    loop = Loop(arguments.width, arguments.rows)
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
