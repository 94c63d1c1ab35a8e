"""Every benchmark that compares, one after the other: a table of figures, ratios and bars.

    python benchmarks/all.py             # make bench: all of them
    python benchmarks/all.py --check     # make bench-check: ratios against the recorded ones
    python benchmarks/all.py --short     # tiny forms: do they run? nothing is recorded
    python benchmarks/all.py --only loop generate

Each benchmark is a process of its own; what it prints is read here and kept in build/bench. The
table goes into docs/performance.md between its two marks, with the machine, the day and the
versions, and the ratios into benchmarks/recorded.json. Only ratios of two ways measured in one run
are compared with recorded ones: seconds are of a machine and its other work, and are shown alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE, RECORD = ROOT / "docs/performance.md", ROOT / "benchmarks/recorded.json"
OUTPUTS = ROOT / "build/bench"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
TOLERANCE = 0.25  # of the recorded ratio; what two runs on a shared machine differ by
NUMBER = r"(-?[\d.]+)"


@dataclass(frozen=True)
class Figure:
    """One number of a benchmark's output."""

    name: str
    pattern: str  # a regular expression with one group; the last match counts
    bar: float | None = None
    unit: str = "times"
    more: bool = True  # is better
    ratio: bool = True  # of two ways in one run: can be compared with another run's

    def value(self, output: str) -> float | None:
        """What the output says; None where it says nothing of it."""
        found = re.findall(self.pattern, output, re.MULTILINE)
        return float(found[-1]) if found else None

    def met(self, value: float) -> bool | None:
        """Whether the bar is; None where there is none."""
        if self.bar is None:
            return None
        return value >= self.bar if self.more else value <= self.bar

    def worse(self, value: float, recorded: float) -> float:
        """By which share the value is worse than the recorded one; below 0 where it is better."""
        return recorded / value - 1 if self.more else value / recorded - 1


@dataclass(frozen=True)
class Benchmark:
    """One command and what is read from its output."""

    name: str
    words: tuple[str, ...]
    short: tuple[str, ...]
    figures: tuple[Figure, ...]
    threads: int | None = 1  # None: those that the command chooses
    module: str | None = None  # where it is not the name; `benchmarks.x` is run with -m

    def command(self, *, short: bool) -> list[str]:
        module = self.module or self.name
        place = ["-m", module] if "." in module else [str(ROOT / f"benchmarks/{module}.py")]
        return [sys.executable, *place, *(self.short if short else self.words)]


def _row(first: str, column: int) -> str:
    """The pattern of a cell of a Markdown row that begins with `first`."""
    return rf"^\| {first} \|" + r"[^|\n]*\|" * (column - 1) + rf" *{NUMBER}[^|\n]*\|"


def _generate(what: str, bar: float) -> tuple[Figure, ...]:
    row = what.replace(", ", r" \| ")
    return (
        Figure(f"{what}: without cache / with", _row(row, 3), bar),
        Figure(f"{what}: the last tokens' time / the first's", _row(row, 4), 1.3, more=False),
    )


def _limit(what: str) -> Figure:
    """What the line under a row of greedy reports says."""
    row = what.replace(", ", r" \| ")
    return Figure(
        f"{what}: the same, were it reading the weights alone",
        rf"^\| {row} \|.*\n.*: no more than {NUMBER} times without guesses$",
    )


def _at_a_time(what: str, bar: float) -> Figure:
    row = what.replace(", ", r" \| ")
    return Figure(f"{what}: eight at a time, without cache / with", _row(row, 7), bar)


_STANDS = rf"^beside the loop, .* a checkpoint, {NUMBER} % of a step"
_BESIDE = rf"^beside.*ms a checkpoint \(.*, {NUMBER} % of a step"

BENCHMARKS = (
    Benchmark(
        "data",
        ("--layouts", "converted", "contiguous"),
        ("--quick", "--only", "reading", "--layouts", "converted", "contiguous"),
        (
            Figure("plain / ours, 4096 of 100,000 rows", rf"^workers 0: {NUMBER} times", 10),
            Figure("the same, read by a worker", rf"^workers 1: {NUMBER} times", 10),
            Figure("memory of it", rf"^workers 0: [\d.]+ times, {NUMBER} MB", 350, "MB",
                   more=False, ratio=False),
            Figure("indexing 20,000 specimens", _row("case layout", 1), 10, "s",
                   more=False, ratio=False),
            Figure("memory of it", _row("case layout", 3), 300, "MB", more=False, ratio=False),
        ),
        threads=None,
    ),
    Benchmark(
        "loop",
        ("--threads", "1", "--rounds", "3", "--width", "128"),  # steps of some 100 ms
        ("--threads", "1", "--rounds", "1", "--batch", "100", "--width", "16", "--workers", "0"),
        (
            Figure("besides forward, backward and optimizer, of a step",
                   _row("besides the computation, %", 1), 2, "%", more=False, ratio=False),
            Figure("a run's step / a bare loop's, processor",
                   _row("our loop / bare loop", 2), more=False),
        ),
    ),
    Benchmark(
        "models",
        ("step", "bag"),
        ("bag", "--tiles", "500", "--repeats", "1"),
        (
            Figure("a step, padded / ours, time", rf"^step +padded / ours: time {NUMBER}", 2),
            Figure("a step, padded / ours, memory", r"^step .*, memory " + NUMBER, 2),
            Figure("a bag of 100,000, padded / ours, time", rf"^bag +padded / ours: time {NUMBER}"),
            Figure("a bag of 100,000, padded / ours, memory", r"^bag .*, memory " + NUMBER),
            Figure("memory of that bag", rf"^bag +ours +[\d.]+ s +{NUMBER} MB", 2650, "MB",
                   more=False, ratio=False),
        ),
        threads=None,
    ),
    Benchmark(
        "tiles",
        (),
        ("--tiles", "300", "--repeats", "1"),
        (
            Figure("100,000 before attention, at once / in pieces, time",
                   rf"^plain / ours: time {NUMBER}"),
            Figure("the same, memory", r"^plain / ours: .*memory " + NUMBER),
        ),
        threads=None,
    ),
    Benchmark(
        "pieces",
        (),
        ("--tiles", "2100", "--rounds", "1"),
        (
            Figure("embedding a bag, threads share operations / pieces",
                   rf"beside nothing .* ratio {NUMBER}"),
            Figure("the same beside a busy process", rf"beside a busy .* ratio {NUMBER}"),
        ),
        threads=None,
    ),
    Benchmark(
        "generate",
        ("small", "large", "greedy", "--threads", "1", "--batch", "8"),
        ("small", "greedy", "--threads", "1", "--batch", "2", "--tokens", "4"),
        (
            *_generate("small, greedy", 8), _limit("small, greedy"),
            _at_a_time("small, greedy", 8),
            *_generate("large, greedy", 10), _limit("large, greedy"),
            _at_a_time("large, greedy", 10),
        ),
    ),
    Benchmark(
        "beams",
        ("small", "large", "beams", "--threads", "1"),
        ("small", "beams", "--threads", "1", "--tokens", "4"),
        (*_generate("small, beams", 8), *_generate("large, beams", 10)),
        module="generate",
    ),
    Benchmark(
        "evaluation",
        (),
        (),
        (
            Figure("retrieval, 1,000 resamples: loop / ours", rf"^retrieval .* {NUMBER}$"),
            Figure("the same", rf"^retrieval .*512 +{NUMBER} ", 0.5, "s", more=False, ratio=False),
            Figure("zero-shot, 1,000 resamples: loop / ours", rf"^zero-shot .* {NUMBER}$"),
            Figure("the same", rf"^zero-shot .*classes +{NUMBER} ", 1, "s",
                   more=False, ratio=False),
        ),
    ),
    Benchmark(
        "text_metrics",
        (),
        (),
        (
            Figure("counting 500 pairs", rf"^counting .* {NUMBER} s of the processor", 10, "s",
                   more=False, ratio=False),
            Figure("resampling them", rf"^resampling .* {NUMBER} s of the processor", None, "s",
                   more=False, ratio=False),
        ),
    ),
    Benchmark(
        "saving",
        (),
        ("--model", "coca_tiny", "--bags", "2", "--tiles", "20", "--blocks", "1"),
        (
            Figure("the loop stands still for a checkpoint, of a step", _STANDS, 5, "%", more=False,
                   ratio=False),
            Figure("a checkpoint beside the loop, a core free, of a step", _BESIDE, 5, "%",
                   more=False, ratio=False),
        ),
    ),
    Benchmark(
        "saving_busy",
        (),
        ("--model", "coca_tiny", "--bags", "2", "--tiles", "20", "--blocks", "1"),
        (
            Figure("the same, all cores in the steps", _STANDS, 5, "%", more=False, ratio=False),
            Figure("a checkpoint beside the loop, all cores in the steps, of a step", _BESIDE,
                   None, "%", more=False, ratio=False),
        ),
        threads=None,
        module="saving",
    ),
    Benchmark(
        "spinning",
        (),
        ("--tiles", "5", "--steps", "1", "--rounds", "1"),
        (
            Figure("a step alone, libgomp's waiting / ours", rf"^alone, .*: {NUMBER} times"),
            Figure("a step beside a busy process, likewise", rf"^beside .*: {NUMBER} times"),
        ),
        threads=None,
        module="benchmarks.spinning",
    ),
    Benchmark(
        "scaling",
        (),
        ("--rounds", "1", "--steps", "1"),
        (Figure("2 processes of a thread / 1 of two",
                rf"^\| [\d.]+ \| [\d.]+ \| {NUMBER} \|", 0.85),),
        threads=None,
    ),
    Benchmark(
        "report_page",
        (),
        ("--specimens", "60", "--words", "20"),
        (
            Figure("size of a page of 2,000", rf"s, {NUMBER} MB$", 15, "MB",
                   more=False, ratio=False),
            Figure("ready to use", rf"^(?:ready|first tab).*: {NUMBER} ms", 3000, "ms",
                   more=False, ratio=False),
        ),
        module="benchmarks.report_page",
    ),
    Benchmark(
        "embed",
        ("--bags", "200"),
        ("--bags", "4", "--distinct", "2", "--tiles", "50", "--model", "coca_tiny"),
        (
            Figure("cores with work", rf"^bag \d+ to .* with work for {NUMBER}%", 90, "%",
                   ratio=False),
        ),
        threads=None,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A figure and its value; None where the benchmark did not print it."""

    benchmark: str
    figure: Figure
    value: float | None

    @property
    def key(self) -> str:
        return f"{self.benchmark}: {self.figure.name}"


class FailedError(RuntimeError):
    """A benchmark that ended with an error."""


def output_of(benchmark: Benchmark, *, short: bool) -> str:
    """Run it; what it printed is also kept.

    Raises:
        FailedError: it ended with an error.
    """
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if benchmark.threads is not None:
        environment["OMP_NUM_THREADS"] = str(benchmark.threads)
    command = benchmark.command(short=short)
    print(f"{benchmark.name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    file = OUTPUTS / f"{benchmark.name}.txt"
    file.write_text(done.stdout + done.stderr)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing told"])[-1]
        raise FailedError(f"{benchmark.name} ended with {done.returncode}: {last} ({file})")
    return done.stdout


def read(benchmark: Benchmark, output: str) -> list[Measured]:
    """The figures of an output."""
    return [Measured(benchmark.name, f, f.value(output)) for f in benchmark.figures]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    told = Path("/proc/cpuinfo")
    if told.is_file():
        names = re.findall(r"^model name\s*: (.*)$", told.read_text(), re.MULTILINE)
        model = names[0] if names else model
    packages = ("torch", "numpy", "numba", "h5py", "scikit-learn", "tokenizers")
    return {
        "day": time.strftime("%Y-%m-%d"),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "processor": model,
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "threads": torch.get_num_threads(),
    }


def table(measured: Sequence[Measured]) -> str:
    """Markdown: a row a figure."""
    lines = ["| benchmark | figure | value | bar | met |", "|---|---|---|---|---|"]
    for one in measured:
        figure, value = one.figure, one.value
        shown = "not printed" if value is None else f"{value:g} {figure.unit}"
        bar = ""
        if figure.bar is not None:
            bar = f"{'at least' if figure.more else 'at most'} {figure.bar:g} {figure.unit}"
        met = None if value is None else figure.met(value)
        lines.append(
            f"| {one.benchmark} | {figure.name} | {shown} | {bar} | "
            f"{'' if met is None else 'yes' if met else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def section(measured: Sequence[Measured], on: dict[str, Any]) -> str:
    """What stands between the marks of the page."""
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    head = (
        f"`make bench`, {on['day']}: {on['cores']} cores ({on['processor']}), load {on['load']}\n"
        f"at the end, {on['system']}, {versions}.\n"
    )
    return f"\n{head}\n{table(measured)}\n"


def put_into(page: str, text: str) -> str:
    """The page with `text` between its marks.

    Raises:
        ValueError: it does not have both, each once and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end or BEGIN in between + after or END in after:
        raise ValueError(f"the page must have {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def record(measured: Iterable[Measured], on: dict[str, Any]) -> dict[str, Any]:
    """What later runs are compared with: ratios alone."""
    ratios = {m.key: m.value for m in measured if m.figure.ratio and m.value is not None}
    return {"machine": on, "ratios": ratios}


def compare(
    measured: Sequence[Measured], recorded: dict[str, Any], tolerance: float
) -> tuple[str, list[str]]:
    """A table of ratios beside the recorded ones, and what is worse by more than the tolerance."""
    known, worse = recorded["ratios"], []
    lines = ["| ratio | now | recorded | worse by |", "|---|---|---|---|"]
    for one in measured:
        if not one.figure.ratio or (one.key not in known and one.value is None):
            continue
        was, now = known.get(one.key), one.value
        if was is None or now is None:
            lines.append(f"| {one.key} | {now or 'not printed'} | {was or 'not recorded'} | |")
            if now is None:
                worse.append(f"{one.key}: was {was:g}, is not printed any more")
            continue
        share = one.figure.worse(now, was)
        lines.append(f"| {one.key} | {now:g} | {was:g} | {share:+.0%} |")
        if share > tolerance or math.isnan(share):
            worse.append(f"{one.key}: {was:g} was recorded, now {now:g}, {share:.0%} worse")
    return "\n".join(lines) + "\n", worse


def main(words: Sequence[str] | None = None) -> int:
    """Run, tell, and record or compare; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[b.name for b in BENCHMARKS])
    parser.add_argument("--short", action="store_true", help="tiny forms; nothing is recorded")
    parser.add_argument("--check", action="store_true", help="compare with the recorded ratios")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    given = parser.parse_args(words)
    if given.check and given.short:
        parser.error("--short has other ratios than the recorded ones; leave one out")
    chosen = [b for b in BENCHMARKS if given.only is None or b.name in given.only]
    recorded = None
    if given.check:
        if not RECORD.is_file():
            print(f"{RECORD} is not there: `make bench` writes it", file=sys.stderr)
            return 2
        recorded = json.loads(RECORD.read_text())
    measured: list[Measured] = []
    failed = []
    for benchmark in chosen:
        try:
            measured += read(benchmark, output_of(benchmark, short=given.short))
        except FailedError as error:
            failed.append(str(error))
            print(error, file=sys.stderr, flush=True)
    print(table(measured), end="")
    if recorded is not None:
        text, worse = compare(measured, recorded, given.tolerance)
        print(f"\n{text}", end="")
        print(*worse, sep="\n", file=sys.stderr)
        return 1 if worse or failed else 0
    if failed:
        print("nothing is recorded: not all benchmarks ran to their end", file=sys.stderr)
        return 1
    if not given.short and given.only is None:
        on = machine()
        PAGE.write_text(put_into(PAGE.read_text(), section(measured, on)))
        RECORD.write_text(json.dumps(record(measured, on), indent=1) + "\n")
        print(f"written: {PAGE}, {RECORD}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
