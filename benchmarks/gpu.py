"""One GPU: training steps, generation and evaluation of the published width, in bfloat16.

    python -m benchmarks.gpu [--bag-tiles N ...] [--batch N ...] [--peak-tflops X]

Training: seconds a step, tiles and tokens a second, peak memory and model FLOP utilisation for bags
of 1,000, 10,000 and 100,000 tiles (`benchmarks/models.py gpu`, whose head says what is counted).
Generation: tokens a second of greedy search and of 6 beams in 3 groups, 64 tokens a report, several
slides at a time. Evaluation: slides and tiles a second that are embedded, and reports a second.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks import models
from torch import Tensor

from slidevlm.batch import Bags
from slidevlm.models import CoCa
from slidevlm.models.generate import Decoding, draft

FORMS: dict[str, dict[str, Any]] = {"greedy": {}, "6 beams in 3 groups": {"beams": 6, "groups": 3}}
TOKENS, WORDS = 64, 256  # generated for a report; of a report that is read
VOCABULARY = 42_384


def bags_on(device: torch.device, number: int, tiles: int) -> Bags:
    """Bags of random tiles, in bfloat16."""
    features = torch.randn(number * tiles, models.TILE_WIDTH, device=device, dtype=torch.bfloat16)
    return Bags(features, (tiles,) * number)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean of some calls, after one that is not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats


def peak_megabytes(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def generation(
    model: CoCa,
    device: torch.device,
    tiles: int,
    batches: list[int],
    tokens: int = TOKENS,
) -> None:
    """A line for each form and number of slides at a time."""
    print("form                 slides   tiles  s/report  tokens/s      MB")
    for form, options in FORMS.items():
        decoding = Decoding(1, 2, 0, max_tokens=tokens, min_tokens=tokens, **options)
        for number in batches:
            bags, names = bags_on(device, number, tiles), [""] * number
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                taken = seconds(partial(draft, model, bags, names, decoding), device, repeats=2)
            print(
                f"{form:20} {number:6} {tiles:7} {taken / number:9.3f} "
                f"{number * tokens / taken:9.0f} {peak_megabytes(device):7.0f}"
            )


def evaluation(
    model: CoCa,
    device: torch.device,
    lengths: list[int],
    number: int,
    vocabulary: int = VOCABULARY,
) -> None:
    """Embedding slides and reports, as an evaluation does."""
    print("what      slides   tiles  s/batch  slides/s   tiles/s      MB")

    def line(what: str, tiles: int, work: Callable[[], Tensor]) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
            taken = seconds(work, device, repeats=5)
        print(
            f"{what:9} {number:6} {tiles:7} {taken:8.4f} {number / taken:9.1f} "
            f"{number * tiles / taken:9.0f} {peak_megabytes(device):7.0f}"
        )

    for tiles in lengths:
        line("slides", tiles, partial(model.encode_image, bags_on(device, number, tiles)))
    tokens = torch.randint(3, vocabulary, (number, WORDS), device=device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    line("reports", 0, partial(model.encode_text, tokens, mask))


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bag-tiles", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device, bfloat16")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch finds no CUDA device here; it measures one GPU")
    models.on_gpu(given)
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = CoCa(models.gpu_config(), VOCABULARY).to(device).eval()
    print()
    generation(model, device, 10_000, given.batch)
    print()
    evaluation(model, device, given.bag_tiles, 4)


if __name__ == "__main__":
    main()
