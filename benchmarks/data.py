"""Seconds and memory for reading bags, and for indexing a cohort.

    python benchmarks/data.py [--quick] [--only reading | indexing] [--layouts NAME ...]

Reading: bags of [100000, 1024] in several layouts, through the loader that training uses, beside
the plain way of doing it: read all, convert to a float32 tensor, choose rows. Each measurement is
a process of its own. Ours and the plain way take turns, for the machine's noise to fall on both,
and medians are shown. The file is opened anew for each specimen; what was written lies in the
page cache, as it would in the second epoch (--evict drops it before each specimen).

The features are normal, rounded to float16, as most tile encoders run in it: stored as float32,
their last 13 bits are zeros, and gzip has something to do. Ours also checks that they are finite
and finds the slide of each tile, neither of which the plain way does.

Memory is the peak of resident memory: the largest process's, and what all processes of the
measurement grew beyond what importing the packages takes.

Indexing: a cohort of 20,000 specimens, from opening the store to the split files resolved with
their reports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from slidevlm.data.cases import open_store
from slidevlm.data.dataset import BagDataset, BagLoader, Sample, make_loader
from slidevlm.data.formats.hdf5_cases import CaseWriter, Hdf5Cases
from slidevlm.data.reports import read_text_file
from slidevlm.data.sampling import EvalBatches, generator
from slidevlm.data.splits import check_leakage, resolve
from slidevlm.data.tokenizer import Tokenizer

WIDTH = 1024
SPECIMENS = 2  # of each layout; a measurement reads them in turn
READINGS = 4  # of a measurement, the first of which is not counted
NO_CUTOFF = 2**31
PLACE_COLUMNS = 2

LAYOUTS: dict[str, dict[str, Any]] = {
    "gzip-4": {"compression": "gzip", "compression_opts": 4},
    "lzf": {"compression": "lzf"},
    "contiguous": {},
    "chunks of one row": {"chunks": (1, WIDTH)},  # as CLAM and TRIDENT write
    "converted": {},  # float16, by CaseWriter
}
BARS = "converted, cut-off 4096: >= 10 times the plain way on the contiguous file, < 350 MB"


@dataclass(frozen=True)
class Reading:
    """One measurement of reading."""

    path: str
    way: str  # "ours" or "plain"
    cutoff: int
    workers: int
    evict: bool


@dataclass(frozen=True)
class Result:
    """What a measurement found."""

    seconds: float  # per specimen, or to index the cohort
    processor: float  # seconds of the processor, of this process, for all of the work
    peak_mb: float  # of the largest process
    grown_mb: float  # of all processes, beyond their imports


# -- files -------------------------------------------------------------------------------------


def write_bags(path: Path, layout: str, tiles: int) -> None:
    """`SPECIMENS` bags of [tiles, WIDTH] in the case layout."""
    places = np.stack(np.divmod(np.arange(tiles), 300), axis=1).astype(np.float32) * 256
    keys = [f"slide{row * 2 // tiles}/{row}" for row in range(tiles)]
    with CaseWriter(path, "uni", attributes={"unit": "um"}) as writer:
        for number in range(SPECIMENS):
            draw = np.random.default_rng(number)
            features = draw.standard_normal((tiles, WIDTH), np.float32).astype(np.float16)
            if layout != "converted":
                # The writer's own layout, with the features put in the tool's place below.
                features = features[:, :1]
            writer.add(f"p{number}", f"s{number}", features, "No tumour.", places, keys)
    if layout == "converted":
        return
    with h5py.File(path, "a") as file:
        for number in range(SPECIMENS):
            draw = np.random.default_rng(number)
            features = draw.standard_normal((tiles, WIDTH), np.float32).astype(np.float16)
            group = file[f"patients/p{number}/s{number}/uni"]
            del group["features"]
            group.create_dataset("features", data=features.astype(np.float32), **LAYOUTS[layout])


def write_cohort(path: Path, specimens: int) -> None:
    """A cohort of tiny bags with reports of a kilobyte; split files and reports beside it."""
    reports = {}
    words = ["carcinoma", "margin", "free", "of", "tumour", "grade", "lymph", "node"]
    draw = np.random.default_rng(0)
    features = np.zeros((4, 8), np.float16)
    places = np.zeros((4, PLACE_COLUMNS), np.float32)
    with CaseWriter(path, "uni", attributes={"unit": "um"}) as writer:
        for number in range(specimens):
            report = f"Specimen {number}. " + " ".join(draw.choice(words, 160))
            reports[f"s{number}"] = report
            writer.add(f"p{number // 2}", f"s{number}", features, report, places)
    parts = {"train": (0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1)}
    for name, (start, stop) in parts.items():
        chosen = range(int(start * specimens), int(stop * specimens))
        path.with_name(f"{name}.txt").write_text("\n".join(f"s{n}" for n in chosen))
    path.with_name("reports.json").write_text(json.dumps(reports))


def write_slides(folder: Path, specimens: int) -> None:
    """A file a slide, as STAMP writes it."""
    folder.mkdir()
    for number in range(specimens):
        with h5py.File(folder / f"s{number}.h5", "w") as file:
            file["feats"] = np.zeros((4, 8), np.float16)
            file["coords"] = np.zeros((4, PLACE_COLUMNS), np.float32)
            file.attrs.update(unit="um", tile_size_um=256.0, feat_type="tile", extractor="uni")


# -- the two ways to read ----------------------------------------------------------------------


def evict(path: str) -> None:
    """Drop the file from the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Ours(BagDataset):
    """The dataset of training, made to open the file anew for each specimen."""

    evict: bool

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        assert isinstance(self.store, Hdf5Cases)
        self.store.close()
        if self.evict:
            evict(str(self.store.path))
        return super().__getitem__(key)


class Plain(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Read all, convert, choose rows."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def __len__(self) -> int:
        return SPECIMENS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.reading.evict:
            evict(self.reading.path)
        with h5py.File(self.reading.path, "r") as file:
            group = file[f"patients/p{index}/s{index}/uni"]
            features = torch.tensor(group["features"][()], dtype=torch.float32)
            positions = torch.tensor(group["positions"][()], dtype=torch.float32)
        if len(features) > self.reading.cutoff:
            draw = generator("tiles", f"s{index}")
            rows = np.sort(draw.choice(len(features), self.reading.cutoff, replace=False))
            features, positions = features[rows], positions[rows]
        return features, positions


def open_ours(reading: Reading) -> BagLoader:
    """The loader of evaluation, one specimen a batch."""
    store = Hdf5Cases(reading.path, "uni", "report")
    reports = [store.text(case) or "" for case in store.cases]
    tokenizer = Tokenizer.train(reports, 300)
    dataset = Ours(
        store, store.cases, reports, tokenizer, 128, reading.cutoff, seed=0, training=False
    )
    dataset.evict = reading.evict
    return make_loader(dataset, EvalBatches(SPECIMENS, 1), reading.workers)


def open_plain(reading: Reading) -> DataLoader[Any]:
    """torch's loader, one specimen an item."""
    return DataLoader(
        Plain(reading),
        batch_size=None,
        num_workers=reading.workers,
        persistent_workers=reading.workers > 0,
    )


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def read(reading: Reading) -> list[float]:
    """Seconds of each reading but the first."""
    items = endless(open_ours(reading) if reading.way == "ours" else open_plain(reading))
    next(items)  # starts the worker
    seconds = []
    for _ in range(READINGS - 1):
        start = time.perf_counter()
        item = next(items)
        seconds.append(time.perf_counter() - start)
        del item
    items.close()  # type: ignore[attr-defined]
    return seconds


def index(path: str) -> list[float]:
    """Seconds to open the store and resolve the split files."""
    start = time.perf_counter()
    folder = Path(path).parent
    if Path(path).is_dir():
        store = open_store(
            hdf5_filename=None,
            hdf5_feature_attribute=None,
            hdf5_text_attribute=None,
            root_dir=path,
        )
        texts = read_text_file(folder / "reports.json")
    else:
        store = open_store(
            hdf5_filename=path,
            hdf5_feature_attribute="uni",
            hdf5_text_attribute="report",
            root_dir=None,
        )
        texts = None
    splits = [resolve(folder / f"{name}.txt", store, texts) for name in ("train", "val", "test")]
    check_leakage(splits)
    return [time.perf_counter() - start]


# -- measuring ---------------------------------------------------------------------------------


def resident_peak_mb() -> float:
    """Peak of this process. (getrusage's would include that of the process it came from.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measured(work: Callable[[], list[float]]) -> Result:
    """Run `work` in this process and see what it takes."""
    before, processor = resident_peak_mb(), time.process_time()
    seconds = statistics.median(work())
    processor = time.process_time() - processor
    own = resident_peak_mb()
    # Of workers that have ended; a forked one starts with what its parent has.
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return Result(seconds, processor, max(own, worker), own - before + max(0.0, worker - before))


def in_new_process(what: str, argument: str) -> Result:
    """Run a measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, argument]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def measure(what: str, argument: str) -> None:
    """What the new process does."""
    if what == "reading":
        reading = Reading(**json.loads(argument))
        result = measured(lambda: read(reading))
    else:
        result = measured(lambda: index(argument))
    print(json.dumps(asdict(result)))


def median(results: Sequence[Result]) -> Result:
    """Median of each figure."""
    fields = ("seconds", "processor", "peak_mb", "grown_mb")
    return Result(*(statistics.median(getattr(r, f) for r in results) for f in fields))


# -- tables ------------------------------------------------------------------------------------


def table_of_reading(
    folder: Path, layouts: Sequence[str], tiles: int, rounds: int, evict_first: bool
) -> None:
    """Write each layout, measure it, print its lines."""
    print(f"\nReading [{tiles}, {WIDTH}]: {rounds} processes, {READINGS - 1} bags each\n")
    print("| layout | cut-off | workers | ours s | plain s | ratio | ours MB | plain MB |")
    print("|---|---|---|---|---|---|---|---|")
    found: dict[tuple[str, int, int, str], Result] = {}
    for layout in layouts:
        path = folder / "bags.h5"
        write_bags(path, layout, tiles)
        for cutoff in (4096, NO_CUTOFF):
            for workers in (0, 1):
                taken: dict[str, list[Result]] = {"ours": [], "plain": []}
                for _ in range(rounds):
                    for way, results in taken.items():
                        reading = Reading(str(path), way, cutoff, workers, evict_first)
                        results.append(in_new_process("reading", json.dumps(asdict(reading))))
                for way, results in taken.items():
                    found[layout, cutoff, workers, way] = median(results)
                ours, plain = (found[layout, cutoff, workers, way] for way in ("ours", "plain"))
                limit = "none" if cutoff == NO_CUTOFF else cutoff
                print(
                    f"| {layout} | {limit} | {workers} | {ours.seconds:.4f} | {plain.seconds:.4f} "
                    f"| {plain.seconds / ours.seconds:.1f} | {memory(ours)} | {memory(plain)} |",
                    flush=True,
                )
        path.unlink()
    if not {"converted", "contiguous"} <= set(layouts):
        return
    print(f"\n{BARS}:")
    for workers in (0, 1):
        ours = found["converted", 4096, workers, "ours"]
        plain = found["contiguous", 4096, workers, "plain"]
        print(f"workers {workers}: {plain.seconds / ours.seconds:.1f} times, {ours.peak_mb:.0f} MB")


def memory(result: Result) -> str:
    """Peak, and growth."""
    return f"{result.peak_mb:.0f} (+{result.grown_mb:.0f})"


def table_of_indexing(folder: Path, specimens: int, rounds: int) -> None:
    """Index a cohort in three forms."""
    print(f"\nIndexing {specimens} specimens with reports in {rounds} processes\n")
    print("| cohort | s | s of the processor | MB |")
    print("|---|---|---|---|")
    path, slides = folder / "cohort.h5", folder / "slides"
    write_cohort(path, specimens)

    def line(name: str, source: Path) -> None:
        result = median([in_new_process("indexing", str(source)) for _ in range(rounds)])
        figures = f"{result.seconds:.2f} | {result.processor:.2f} | {memory(result)}"
        print(f"| {name} | {figures} |", flush=True)

    line("case layout", path)
    with h5py.File(path, "a") as file:
        del file["case-index"]
    line("case layout without /case-index", path)
    write_slides(slides, specimens)
    line("a file a slide, reports in JSON", slides)


def machine() -> str:
    """What the figures were taken with."""
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}, h5py {h5py.__version__} "
        f"(HDF5 {h5py.version.hdf5_version})"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="smaller, one round: does it run?")
    parser.add_argument("--only", choices=("reading", "indexing"), help="one table only")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="only these are read")
    parser.add_argument("--folder", type=Path, help="where 1 GB of scratch files may go")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure")
    parser.add_argument("--evict", action="store_true", help="drop the page cache each time")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    rounds = 1 if args.quick else args.rounds
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        if args.only != "indexing":
            layouts, tiles = args.layouts or list(LAYOUTS), 10_000 if args.quick else 100_000
            table_of_reading(Path(scratch), layouts, tiles, rounds, args.evict)
        if args.only != "reading":
            table_of_indexing(Path(scratch), 1_000 if args.quick else 20_000, rounds)


if __name__ == "__main__":
    main()
