"""What comes before attention, on a bag of 100,000 tiles: in pieces, beside all rows at once.

    python benchmarks/tiles.py [--tiles 100000] [--width 1024] [--threads 2] [--repeats 3]

Standardised tiles, their moments, layer norm and projection, as the default perceivers have them,
forward and backward, from features in float16. Beside it the same modules one after the other,
which make and keep a copy of the bag each. Both in one process, in turns, with the same outputs and
gradients; memory is how far a process of its own grows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.models import tile_rows
from slidevlm.models.attention import initialise
from slidevlm.models.slide.perceiver import Perceiver, PerceiverConfig

WAYS = ("ours", "plain")
MEGABYTE = 2**20


def begin(way: str, encoder: Perceiver, bags: Bags) -> tuple[Tensor, Tensor]:
    """Latents that know the moments, and projected tiles."""
    if way == "ours":
        return encoder.begin(bags)
    assert encoder.standardise and encoder.moments and encoder.tile_norm and encoder.tile_project
    tiles = encoder.standardise(bags.features)
    mean = tiles.mean(0)
    deviation = ((tiles - mean).square().mean(0) + 1e-12).sqrt() - 1e-6
    latents = encoder.latents + encoder.moments(torch.cat([mean, deviation])[None])[:, None]
    return latents, encoder.tile_project(encoder.tile_norm(tiles))


def one_pass(way: str, encoder: Perceiver, bags: Bags) -> list[Tensor]:
    """Outputs and gradients."""
    encoder.zero_grad()
    latents, tiles = begin(way, encoder, bags)
    (latents.square().mean() + tiles.square().mean()).backward()
    gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    return [latents.detach(), tiles.detach(), *gradients]


def prepared(given: argparse.Namespace) -> tuple[Perceiver, Bags]:
    torch.manual_seed(0)
    encoder = Perceiver(PerceiverConfig(width=256, positions="none"), given.width)
    initialise(encoder)
    encoder.eval()
    assert encoder.standardise is not None
    encoder.standardise.set(torch.randn(given.width), 0.5 + torch.rand(given.width))
    features = torch.randn(given.tiles, given.width).half()
    return encoder, Bags(features, (given.tiles,))


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def grown(way: str, given: argparse.Namespace) -> float:
    """Megabytes by which this process grows in a pass, at its peak."""
    encoder, bags = prepared(given)
    some = -(-tile_rows.LEAST // given.width)
    one_pass(way, encoder, Bags(bags.features[:some], (some,)))  # code comes into memory
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    one_pass(way, encoder, bags)
    return (status("VmHWM") - before) / MEGABYTE


def main() -> None:
    """Print a line for each way, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        print(json.dumps(grown(given.memory_of, given)))
        return
    encoder, bags = prepared(given)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Any] = {}
    for _ in range(given.repeats):
        for way in WAYS:
            start = time.perf_counter()
            found[way] = one_pass(way, encoder, bags)
            seconds[way].append(time.perf_counter() - start)
    for ours, plain in zip(found["ours"], found["plain"], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4 * float(plain.abs().max()), rtol=1e-3)
    memory = {}
    for way in WAYS:
        words = [sys.executable, __file__, *sys.argv[1:], "--memory-of", way]
        memory[way] = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
        print(f"{way:5} {min(seconds[way]):6.2f} s {memory[way]:7.0f} MB")
    times = min(seconds["plain"]) / min(seconds["ours"])
    print(f"plain / ours: time {times:.2f}, memory {memory['plain'] / memory['ours']:.2f}")


if __name__ == "__main__":
    main()
