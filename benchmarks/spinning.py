"""A training step alone, and beside a process that wants a core: how long threads spin.

    python -m benchmarks.spinning [--tiles 60] [--steps 7] [--rounds 2]

The default model, a batch of 4 bags, a thread for each core. libgomp's threads wait for each other
in a loop before they sleep, by default for milliseconds; the command line sets some 50 microseconds
(`slidevlm.launch.share_cores`). Beside it a process counts on one core, as one that reads bags
does. Each line is a process of its own, in turns; medians of the steps, the least of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from slidevlm.launch import share_cores

ROOT = Path(__file__).resolve().parents[1]
BUSY = "while True: pass"
FORMS = ("libgomp's own", "the command line's", "one thread")


def steps(tiles: int, count: int) -> float:
    """Median seconds of a step, in this process."""
    from benchmarks.saving import Loop

    loop, taken = Loop("coca_stage_1", 4, tiles), []
    for _ in range(count + 2):
        start = time.perf_counter()
        loop.step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def measured(form: str, asked: argparse.Namespace) -> float:
    """The same in a process with such an environment."""
    mine = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in mine}
    if form == "one thread":
        environment["OMP_NUM_THREADS"] = "1"
    elif form == "the command line's":
        share_cores(environment)
    command = [sys.executable, "-m", "benchmarks.spinning", "--inside"]
    command += ["--tiles", str(asked.tiles), "--steps", str(asked.steps)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiles", type=int, default=60, help="of each bag")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        print(steps(asked.tiles, asked.steps))
        return
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(asked.rounds):
        for beside in (False, True):
            busy = subprocess.Popen([sys.executable, "-c", BUSY]) if beside else None
            try:
                for form in FORMS:
                    found.setdefault((form, beside), []).append(measured(form, asked))
            finally:
                if busy is not None:
                    busy.kill()
                    busy.wait()
    print("| waiting | alone, ms | beside a busy process, ms |")
    print("|---|---|---|")
    least = {key: 1000 * min(seconds) for key, seconds in found.items()}
    for form in FORMS:
        print(f"| {form} | {least[form, False]:.0f} | {least[form, True]:.0f} |")
    own, ours = ({beside: least[form, beside] for beside in (False, True)} for form in FORMS[:2])
    print(f"alone, libgomp's own / ours: {own[False] / ours[False]:.2f} times")
    print(f"beside a busy process, libgomp's own / ours: {own[True] / ours[True]:.2f} times")


if __name__ == "__main__":
    main()
