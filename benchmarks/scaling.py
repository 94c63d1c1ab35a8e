"""What several processes cost: gathering on paper, and measured throughput on this machine.

    python benchmarks/scaling.py --paper     # bytes, messages and memory of the four ways
    python benchmarks/scaling.py             # 2 processes of 1 thread against 1 of 2 threads

The measurement trains coca_small on random bags in float32, the same global batch either way. The
two ways take turns, several rounds in a row, so that both see the same machine; the medians are
compared.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time

import torch

from slidevlm import dist
from slidevlm.batch import Bags, Batch
from slidevlm.models import create_model
from slidevlm.precision import resolve
from slidevlm.train.optim import make_optimizer, parameter_groups
from slidevlm.train.step import Objective, Step, softmax_term

CPU = torch.device("cpu")
GLOBAL_BATCH, TILES, WIDTH, TOKENS, VOCABULARY = 16, 2000, 512, 64, 2000
WAYS = ((False, False), (False, True), (True, False), (True, True))


def paper(
    ranks: int, rows: int, width: int, local: bool, gradient: bool
) -> tuple[float, int, float]:
    """(bytes a rank receives, messages it receives, bytes of its logits) of one step, by rings.

    Embeddings are float32. A gather passes every other rank's rows on, in W - 1 messages; a
    reduce-scatter as much. Logits are counted as the matrices that a rank makes, one entry 4 bytes:
    one N x N, or two n x N.
    """
    both = 2 * width * 4  # of a row: image and text
    passes = [both * rows]
    if gradient:
        passes.append(both * rows)
    elif local:
        passes.append(2 * 4 * rows)  # normalisers
    total = ranks * rows
    logits = 4 * (2 * rows * total if local else total * total)
    return sum(passes) * (ranks - 1), len(passes) * (ranks - 1), logits


def print_paper(rows: int, width: int) -> None:
    """The table of docs/scaling.md."""
    print(f"{rows} specimens a process, embeddings of {width}")
    print("| W | local_loss | gather_with_grad | MiB received | messages | logits, MiB |")
    print("|---|---|---|---|---|---|")
    for ranks in (2, 8, 64, 512):
        for local, gradient in WAYS:
            received, messages, logits = paper(ranks, rows, width, local=local, gradient=gradient)
            words = ("yes" if local else "no", "yes" if gradient else "no")
            print(
                f"| {ranks} | {words[0]} | {words[1]} | {received / 2**20:.2f} | {messages} "
                f"| {logits / 2**20:.3f} |"
            )


def batch_of(size: int, seed: int) -> Batch:
    """Random bags and reports."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (size, TOKENS), generator=g)
    names = tuple(str(i) for i in range(size))
    bags = Bags(
        torch.randn(size * TILES, WIDTH, generator=g),
        (TILES,) * size,
        1e4 * torch.rand(size * TILES, 2, generator=g),
        None,
        "um",
    )
    return Batch(bags, tokens, torch.ones_like(tokens).bool(), torch.arange(size), names, names)


def work(steps: int, threads: int) -> None:
    """Print the specimens a second of all ranks."""
    torch.set_num_threads(threads)
    dist.start("gloo", CPU)
    torch.manual_seed(0)
    model = create_model("coca_small", tile_width=WIDTH, vocab_size=VOCABULARY)
    optimizer = make_optimizer(
        "adamw", parameter_groups(model, 0.1), lr=1e-4, betas=(0.9, 0.98), eps=1e-8
    )
    objective = Objective(softmax_term, 1.0, 2.0, mask_duplicates=True)
    step = Step(model, optimizer, objective, resolve("fp32", CPU), 1.0)
    batch = batch_of(GLOBAL_BATCH // dist.world_size(), dist.rank())
    step([batch], 1e-4)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step([batch], 1e-4)
    dist.barrier()
    if dist.is_main():
        print(GLOBAL_BATCH * steps / (time.perf_counter() - start))
    dist.stop()


def run(ranks: int, threads: int, steps: int) -> float:
    """Specimens a second of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [sys.executable, __file__, "--worker", str(threads), "--steps", str(steps)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return float(outputs[0])


def measure(rounds: int, steps: int) -> None:
    """Take turns, and print the medians and their ratio."""
    one, two = [], []
    for number in range(rounds):
        one.append(run(1, 2, steps))
        two.append(run(2, 1, steps))
        print(f"round {number + 1}: 1 x 2 threads {one[-1]:.2f}, 2 x 1 thread {two[-1]:.2f} /s")
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    print("| 1 process, 2 threads, specimens/s | 2 processes, 1 thread each | ratio |")
    print("|---|---|---|")
    print(
        f"| {statistics.median(one):.2f} | {statistics.median(two):.2f} "
        f"| {statistics.median(ratios):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.steps, arguments.worker)
    elif arguments.paper:
        print_paper(64, 512)
    else:
        measure(arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
