"""A bag of 5,000 tiles embedded by threads that take pieces, beside threads that share operations.

    python benchmarks/pieces.py [--model coca_small] [--threads 2] [--rounds 7]

The other way is torch's: each operation is shared by all threads, tiles are standardised,
normalised and summed up by torch. Both in one process, in turns, with nothing beside them and with
a process that needs a core, as a reader of bags does. Milliseconds a bag, medians of the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slidevlm.batch import Bags
from slidevlm.launch import share_cores
from slidevlm.models import build_model, pieces, tile_rows, zoo
from slidevlm.models.coca import CoCa

BAGS = 6  # a round
NEVER = 1 << 62


@contextmanager
def shared_operations() -> Iterator[None]:
    """Within, nothing is worth being taken in pieces, or compiled."""
    before = pieces.LEAST, tile_rows.LEAST
    pieces.LEAST = tile_rows.LEAST = NEVER
    try:
        yield
    finally:
        pieces.LEAST, tile_rows.LEAST = before


def milliseconds(model: CoCa, bags: list[Bags]) -> tuple[float, torch.Tensor]:
    """A bag, and the embeddings."""
    start = time.perf_counter()
    found = torch.cat([model.encode_image(bag) for bag in bags])
    return (time.perf_counter() - start) / len(bags) * 1e3, found


def compare(model: CoCa, bags: list[Bags], rounds: int) -> tuple[float, float]:
    """Milliseconds in pieces and by shared operations."""
    ours, theirs = [], []
    for _ in range(rounds + 1):  # the first one warms up
        mine, found = milliseconds(model, bags)
        with shared_operations():
            plain, expected = milliseconds(model, bags)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        ours.append(mine)
        theirs.append(plain)
    return statistics.median(ours[1:]), statistics.median(theirs[1:])


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coca_small")
    parser.add_argument("--tiles", type=int, default=5000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    environment = dict(os.environ)
    share_cores(environment)
    if environment != os.environ:  # which is read when torch is imported
        sys.exit(subprocess.call([sys.executable, __file__, *sys.argv[1:]], env=environment))
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = dataclasses.replace(zoo.load(given.model), tile_width=given.width)
    model = build_model(config, 300).eval()
    assert isinstance(model, CoCa)
    shape = given.tiles, given.width
    bags = [Bags(torch.randn(shape).half(), (given.tiles,)) for _ in range(BAGS)]
    with torch.inference_mode():
        for beside in ("nothing", "a busy process"):
            busy = None
            if beside != "nothing":
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                ours, theirs = compare(model, bags, given.rounds)
            finally:
                if busy is not None:
                    busy.kill()
                    busy.wait()
            print(
                f"{given.model}, {given.threads} threads beside {beside:14}: operations "
                f"{theirs:6.1f} ms, pieces {ours:6.1f} ms, ratio {theirs / ours:.2f}"
            )


if __name__ == "__main__":
    main()
