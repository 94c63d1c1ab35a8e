"""Milliseconds of the processor for a linear layer on few rows, each way: `models/few_rows.py`.

OMP_NUM_THREADS=1 python benchmarks/few_rows.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((256, 256), (512, 512), (1536, 512), (2736, 512), (8192, 512), (1024, 1024),
          (3072, 1024), (1024, 2736), (5464, 1024), (42384, 1024))  # fmt: skip
ROWS = (1, 2, 3, 4, 5, 6, 8, 16, 32, 64)
TOGETHER = 60_000_000  # elements of the weights in turn, so that each comes from memory

Way = Callable[[Tensor, Tensor], Tensor]
WAYS: dict[str, Way] = {
    "plain": F.linear,
    # A single row is taken twice.
    "other side": lambda x, w: torch.mm(w, (x if len(x) > 1 else torch.cat([x, x])).T).T,
    "oneDNN": lambda x, w: F.linear(x.to_mkldnn(), w).to_dense(),
}


def milliseconds(way: Way, x: Tensor, weights: list[Tensor]) -> float:
    """The least of six rounds, for one weight."""
    taken = []
    for _ in range(7):
        start = time.process_time()
        for weight in weights:
            way(x, weight)
        taken.append(time.process_time() - start)
    return 1e3 * min(taken[1:]) / len(weights)


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print("| out x in | rows | " + " | ".join(WAYS) + " |")
    print("|---" * (2 + len(WAYS)) + "|")
    for out, inputs in SHAPES:
        number = min(60, max(1, TOGETHER // (out * inputs)))
        weights = [torch.randn(out, inputs) for _ in range(number)]
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            found = [f"{milliseconds(way, x, weights):.3f}" for way in WAYS.values()]
            print(f"| {out} x {inputs} | {rows} | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
