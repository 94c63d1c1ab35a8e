"""How busy `slidevlm embed` keeps the cores: bags of 5,000 tiles of width 1,024, float16, HDF5.

    python benchmarks/embed.py --bags 1000 --model coca_small

Prints seconds, bags a second, CPU time of the command and its readers over what the cores could
give, and, as the machine may have other work, the share of the cores' time that was idle.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from slidevlm.app.export import write_folder
from slidevlm.app.trained import Trained
from slidevlm.data.statistics import token_table
from slidevlm.data.tokenizer import Tokenizer
from slidevlm.models import CoCa, build_model, zoo
from slidevlm.testing import REPORTS


def write_model(name: str, width: int, folder: Path) -> None:
    """A model with random weights, as `slidevlm models export` writes it."""
    tokenizer = Tokenizer.train(REPORTS, 300)
    config = dataclasses.replace(zoo.load(name), tile_width=width)
    model = build_model(config, tokenizer.vocab_size)
    assert isinstance(model, CoCa)
    rank = config.text.prior_rank
    table = token_table(tokenizer, REPORTS, rank, 0) if rank else None
    model.start_from(torch.zeros(width), torch.ones(width), table)
    write_folder(Trained(model, config, tokenizer, False, None), folder)


def write_bags(folder: Path, bags: int, distinct: int, tiles: int, width: int) -> None:
    """`distinct` files of their own; the others are further names of these."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(bags):
        path = folder / f"slide_{number:05}.h5"
        if number < distinct:
            with h5py.File(path, "w") as file:
                file["features"] = random.standard_normal((tiles, width), np.float32).astype("f2")
        else:
            os.link(folder / f"slide_{number % distinct:05}.h5", path)


def processor_seconds() -> tuple[float, float]:
    """Seconds that the machine's cores were busy, and idle or waiting for a disk, so far."""
    values = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    idle = values[3] + values[4]
    return (sum(values) - idle) / tick, idle / tick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bags", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=100)
    parser.add_argument("--tiles", type=int, default=5000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--model", default="coca_small")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        place = Path(name)
        write_model(given.model, given.width, place / "model")
        write_bags(place / "bags", given.bags, given.distinct, given.tiles, given.width)
        words = ["embed", place / "model", place / "bags", "--output", place / "e.h5"]
        words += ["--device", "cpu", "--workers", given.workers, "--batch-size", given.batch_size]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        command = [sys.executable, "-m", "slidevlm", *map(str, words)]
        before, began = processor_seconds(), time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        seconds = time.perf_counter() - began
        after = processor_seconds()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = used.ru_utime + used.ru_stime
    busy, idle = (b - a for a, b in zip(before, after, strict=True))
    print(
        f"{given.model}, {given.bags} bags of {given.tiles} x {given.width}, {cores} cores, "
        f"{given.workers} workers: {seconds:.1f} s, {given.bags / seconds:.2f} bags/s; own CPU "
        f"{own / (seconds * cores):.0%} of the cores, all work {busy / (busy + idle):.0%}"
    )


if __name__ == "__main__":
    main()
