"""Milliseconds for a linear layer on few rows, each way of `models/few_rows.py`, and compiled.

python benchmarks/few_rows.py [THREADS]: of the processor with one thread (the default), of the
clock with more, which wants a quiet machine.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import numba
import torch
import torch.nn.functional as F
from torch import Tensor

from slidevlm.models import kernels

SHAPES = ((256, 256), (512, 512), (1536, 512), (2736, 512), (8192, 512), (1024, 1024),
          (3072, 1024), (1024, 2736), (5464, 1024), (42384, 1024))  # fmt: skip
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64)
TOGETHER = 60_000_000  # elements of the weights in turn, so that each comes from memory


def in_pieces(x: Tensor, weight: Tensor) -> Tensor:
    """Of a single row; more are as the plain way has them."""
    if len(x) > 1:
        return F.linear(x, weight)
    pieces = weight.view(math.gcd(len(weight), 64), -1, weight.shape[1])
    return torch.bmm(pieces, x.T.expand(len(pieces), -1, 1)).view(1, -1)


def compiled(x: Tensor, weight: Tensor) -> Tensor:
    """`models/kernels.py`, which generation takes up to 24 rows."""
    shares = torch.get_num_threads()
    return torch.from_numpy(kernels.linear(weight.numpy(), None, x.numpy(), shares))


Way = Callable[[Tensor, Tensor], Tensor]
WAYS: dict[str, Way] = {
    "plain": F.linear,
    # A single row is taken twice.
    "other side": lambda x, w: torch.mm(w, (x if len(x) > 1 else torch.cat([x, x])).T).T,
    "in pieces": in_pieces,
    "oneDNN": lambda x, w: F.linear(x.to_mkldnn(), w).to_dense(),
    "compiled": compiled,
}


def milliseconds(way: Way, x: Tensor, weights: list[Tensor], clock: Callable[[], float]) -> float:
    """The least of six rounds, for one weight."""
    taken = []
    for _ in range(7):
        start = clock()
        for weight in weights:
            way(x, weight)
        taken.append(clock() - start)
    return 1e3 * min(taken[1:]) / len(weights)


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    clock = time.process_time if threads == 1 else time.perf_counter
    numba.set_num_threads(threads)  # first: to start its threads it sets torch's, too
    torch.set_num_threads(threads)
    print(
        f"torch {torch.__version__}, {threads} thread(s), {torch.backends.cpu.get_cpu_capability()}"
    )
    print("| out x in | rows | " + " | ".join(WAYS) + " |")
    print("|---" * (2 + len(WAYS)) + "|")
    for out, inputs in SHAPES:
        number = min(60, max(1, TOGETHER // (out * inputs)))
        weights = [torch.randn(out, inputs) for _ in range(number)]
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            found = [f"{milliseconds(way, x, weights, clock):.3f}" for way in WAYS.values()]
            print(f"| {out} x {inputs} | {rows} | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
