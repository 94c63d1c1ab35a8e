"""How busy `slidevlm embed` keeps the cores: bags of 5,000 tiles of width 1,024, float16, HDF5.

    python benchmarks/embed.py --bags 1000 --model coca_small

Prints, of the whole command and without its start and end: seconds, bags a second, CPU time a bag,
the share of the cores it had, and the share it had threads for, which is what it would have had on
a machine without other work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
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


@dataclasses.dataclass
class Moment:
    """What a command has had and done so far."""

    seconds: float
    ran: float  # seconds on a core, of it and of all it started
    looked: int  # times that it was looked at
    filled: float  # sum over these of the share of the cores it had a thread for
    bags: int

    def since(self, other: Moment, cores: int) -> str:
        bags, seconds = self.bags - other.bags, self.seconds - other.seconds
        ran = self.ran - other.ran
        filled = (self.filled - other.filled) / max(1, self.looked - other.looked)
        return (
            f"{seconds:.1f} s, {bags / seconds:.2f} bags/s, {ran / bags:.3f} s of CPU a bag; on "
            f"{ran / (seconds * cores):.0%} of the cores, with work for {filled:.0%}"
        )


class Watched:
    """A command, looked at while it runs: which of its threads run or are ready to.

    A thread that is ready while others have the core would run on a machine of its own: the share
    of the cores that there was a thread for tells of a shared machine what a free one would show.
    """

    def __init__(self, partial: Path, cores: int) -> None:
        self._partial, self._cores = partial, cores
        self._ran: dict[tuple[int, int], float] = {}
        self.now = Moment(0.0, 0.0, 0, 0.0, 0)
        self.first: Moment | None = None  # when two were there: the start is over
        self.last = self.now  # before the end is

    def run(self, command: list[str], environment: dict[str, str]) -> None:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None:
            ready = self._look(process.pid)
            bags = self._partial.read_bytes().count(b"\n") - 1 if self._partial.exists() else 0
            before = self.now
            self.now = Moment(
                time.perf_counter() - began,
                sum(self._ran.values()),
                before.looked + 1,
                before.filled + min(ready, self._cores) / self._cores,
                max(before.bags, bags),
            )
            if bags >= 2 and self.first is None:
                self.first = self.now
            if bags > before.bags:
                self.last = self.now
            time.sleep(0.03)
        assert process.returncode == 0, "the command failed"

    def _look(self, process: int) -> int:
        """The number of threads that run or are ready to."""
        ready, todo = 0, [process]
        while todo:
            number = todo.pop()
            for task in Path(f"/proc/{number}/task").glob("*"):
                try:
                    ran = (task / "schedstat").read_text().split()[0]
                    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                    todo += [int(child) for child in (task / "children").read_text().split()]
                except (OSError, IndexError):  # it has ended meanwhile
                    continue
                self._ran[number, int(task.name)] = int(ran) / 1e9
                ready += state == "R"
        return ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bags", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=100)
    parser.add_argument("--tiles", type=int, default=5000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--model", default="coca_small")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of torch; without it one a core")
    parser.add_argument("--at-once", type=int, help="bags; without it one, by all cores")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        place = Path(name)
        write_model(given.model, given.width, place / "model")
        write_bags(place / "bags", given.bags, given.distinct, given.tiles, given.width)
        words = ["embed", place / "model", place / "bags", "--output", place / "e.h5"]
        words += ["--device", "cpu", "--workers", given.workers, "--batch-size", given.batch_size]
        words += [] if given.at_once is None else ["--at-once", given.at_once]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        if given.threads is not None:
            environment["OMP_NUM_THREADS"] = str(given.threads)
        command = [sys.executable, "-m", "slidevlm", *map(str, words)]
        before = processor_seconds()
        watched = Watched(place / "e.h5.partial.jsonl", cores)
        watched.run(command, environment)
        after = processor_seconds()
    busy, idle = (b - a for a, b in zip(before, after, strict=True))
    print(
        f"{given.model}, {given.bags} bags of {given.tiles} x {given.width}, {cores} cores, "
        f"{given.workers} workers; the cores were idle {idle / (busy + idle):.1%} of the time"
    )
    watched.now.bags = given.bags
    print(f"whole command: {watched.now.since(Moment(0.0, 0.0, 0, 0.0, 0), cores)}")
    if watched.first is not None and watched.last.bags > watched.first.bags:
        print(
            f"bag {watched.first.bags} to {watched.last.bags}: "
            f"{watched.last.since(watched.first, cores)}"
        )


if __name__ == "__main__":
    main()
