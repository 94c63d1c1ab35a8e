"""A trained model used on all specimens of a cohort: read, computed and kept one by one."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from slidevlm.app.cohorts import open_path
from slidevlm.app.slide_model import CUTOFF, SlideModel, load
from slidevlm.app.trained import same_data
from slidevlm.batch import Batch
from slidevlm.data.cases import Case, CaseStore
from slidevlm.data.dataset import BadSpecimens, BagDataset, StopAtBad, make_loader
from slidevlm.data.formats.hdf5_cases import Hdf5Cases
from slidevlm.data.sampling import EvalBatches
from slidevlm.data.splits import find, read_identifiers
from slidevlm.data.telling import telling
from slidevlm.documents import json_of
from slidevlm.errors import ConfigError, DataError
from slidevlm.run import Bar, working

_TILES = 1 << 19  # of bags that are computed at the same time: some gigabytes

log = logging.getLogger("slidevlm")

Record = dict[str, Any]  # of one specimen, by "id" and whatever was found
Use = Callable[[Batch, Callable[[Record], None]], None]  # hands on each record when it is ready


@dataclass(frozen=True)
class Using:
    """A model, the specimens it is used on, and where the results go.

    Args:
        model: any form that `load` takes.
        source: file of features, folder of them, or cohort.
        output: file of the results; None: to the terminal.
        split: file of the specimens to take; None: all.
        hdf5_feature_attribute: of an HDF5 source that has several.
        slide_table: slides of each specimen; None: each slide is one.
        image_features_cutoff: tiles read of one specimen at most.
        batch_size: specimens that are computed, and kept, at a time.
        workers: reading processes.
        at_once: batches that are computed side by side, each by a thread of its own, which is then
            the one thread that torch has for it; 1: one after the other, each by all cores.
        device: None: see `load`.
        precision: None: see `load`.
        skip_bad: leave out what cannot be read.
    """

    model: str
    source: Path
    output: Path | None
    split: Path | None = None
    hdf5_feature_attribute: str | None = None
    slide_table: Path | None = None
    image_features_cutoff: int = CUTOFF
    batch_size: int = 1
    workers: int = 2
    at_once: int = 1
    device: str | None = None
    precision: str | None = None
    skip_bad: bool = False

    def check_output(self, forms: Sequence[str]) -> None:
        """ConfigError where the ending of a file is none of `forms`, or the file exists."""
        if self.output is None:
            return
        if self.output.suffix.lower() not in forms:
            raise ConfigError(
                f"--output {self.output}: the ending tells the form, one of {', '.join(forms)}; "
                "- writes lines of JSON to the terminal"
            )
        if self.output.exists():
            raise ConfigError(f"--output {self.output} exists; choose another file or remove it")

    def load(self) -> SlideModel:
        """The model, on its device, its hash known."""
        with working("reading the model"):
            model = load(
                self.model,
                device=self.device,
                precision=self.precision,
                image_features_cutoff=self.image_features_cutoff,
            )
            assert model.hash, "made once"
        return model


class Cohort:
    """The specimens of `using` that have features.

    Raises:
        DataError: there are none.
    """

    def __init__(self, using: Using) -> None:
        with working("listing specimens"):
            self.store = open_path(using.source, using.hdf5_feature_attribute, using.slide_table)
            self.cases = _cases(using, self.store)
        self.bad = BadSpecimens() if using.skip_bad else StopAtBad()
        self._using = using

    @property
    def origin(self) -> dict[str, str]:
        """What a specimen's features depend on: results of another origin are not mixed in."""
        using, place = self._using, {"source": str(self._using.source.resolve())}
        if isinstance(self.store, Hdf5Cases):
            place["hdf5_feature_attribute"] = self.store.feature_attribute
        if using.slide_table is not None:
            place["slide_table"] = str(using.slide_table.resolve())
        return place

    def batches(self, model: SlideModel, cases: Sequence[Case], title: str) -> Iterator[Batch]:
        """These specimens on the model's device, with a bar on a terminal; bad ones are left out.

        Raises:
            DataError: one that cannot be read, or is not what the model reads.
        """
        using = self._using
        dataset = BagDataset(
            self.store,
            cases,
            [""] * len(cases),
            model.trained.tokenizer,
            max_tokens=2,
            cutoff=using.image_features_cutoff,
            seed=0,
            training=False,
        )
        order = EvalBatches(len(cases), using.batch_size)
        loader = make_loader(
            dataset,
            order,
            min(using.workers, len(order)),
            pin_memory=model.device.type == "cuda",
            bad=self.bad,
        )
        bar, done = Bar(title, len(cases), shown=True), 0
        try:
            for batch in loader:
                if len(batch):
                    place = f"{using.source}: specimen {batch.specimen_ids[0]!r}"
                    same_data(model.trained, batch.bags.features.shape[1], batch.bags.unit, place)
                    yield batch.to(model.device)
                done += len(batch)
                bar.update(done)
        finally:
            bar.close()


def _cases(using: Using, store: CaseStore) -> list[Case]:
    if using.split is None:
        looking = "looking for features of specimens"
        every = telling(store.cases, looking, len(store.cases))
        cases = [case for case in every if store.has_features(case)]
    else:
        found = find(read_identifiers(using.split), store)
        if found.missing:
            log.warning(
                "%d names of %s have no features and are left out: %s",
                len(found.missing),
                using.split,
                ", ".join(found.missing[:10]),
            )
        cases = list(found.cases)
    if not cases:
        raise DataError(f"{using.source}: no specimen with features to use the model on")
    return cases


@dataclass(frozen=True)
class Results:
    """Records of the specimens, those of earlier calls among them."""

    records: list[Record]
    new: int  # made by this call


def to_terminal(
    using: Using,
    model: SlideModel,
    cohort: Cohort,
    title: str,
    about: Mapping[str, Any],
    use: Use,
) -> int:
    """Print a line of JSON a specimen as they are ready; their number."""
    written = 0

    one_writes = threading.Lock()

    def show(record: Record) -> None:
        nonlocal written
        with one_writes:
            print(json.dumps({**record, **about}, ensure_ascii=False), flush=True)
            written += 1

    _compute(cohort.batches(model, cohort.cases, title), use, show, using.at_once)
    return written


def _compute(
    batches: Iterator[Batch], use: Use, keep: Callable[[Record], None], at_once: int
) -> None:
    """Use each batch, `at_once` of them side by side.

    Cores that share a bag, its pieces or its operations, wait for each other now and then; cores
    with a bag each never do. At most `_TILES` are held at a time, whatever the number.
    """
    if at_once == 1:
        for batch in batches:
            use(batch, keep)
        return
    before = torch.get_num_threads()
    going: dict[Future[None], int] = {}
    try:
        with ThreadPoolExecutor(at_once, "computing", torch.set_num_threads, (1,)) as pool:
            try:
                for batch in batches:
                    tiles = sum(batch.bags.lengths)
                    # One more than the threads, so that none waits for the reader.
                    while going and (len(going) > at_once or sum(going.values()) + tiles > _TILES):
                        _take(going)
                    going[pool.submit(use, batch, keep)] = tiles
                while going:
                    _take(going)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those that run end, and are kept
                raise
    finally:
        torch.set_num_threads(before)  # for threads to come; this one had kept its own


def _take(going: dict[Future[None], int]) -> None:
    """Wait for one, and raise what it raised."""
    for done in wait(going, return_when=FIRST_COMPLETED).done:
        del going[done]
        done.result()


def collect(
    using: Using,
    model: SlideModel,
    cohort: Cohort,
    title: str,
    about: Mapping[str, Any],
    use: Use,
    known: Sequence[Record] = (),
) -> tuple[Results, Partial]:
    """Results of all specimens, each on the disk as soon as it is ready.

    Interrupted or killed, the same call goes on with those that were not. The partial file is
    the caller's to remove, when the results are written.

    Args:
        using: what was asked for; it has an output.
        model: whose hash `about` has.
        cohort: of `using`.
        title: of the bar.
        about: what results depend on, beside the origin; others' results are not mixed in.
        use: a batch on the device, and what takes the record of each specimen.
        known: records of an output that is there.
    """
    assert using.output is not None, "a file to write"
    partial = Partial(using.output, {**about, **cohort.origin})
    records = {**{r["id"]: r for r in known}, **partial.records}
    todo = [case for case in cohort.cases if case.specimen not in records]
    if len(todo) < len(cohort.cases):
        there = len(cohort.cases) - len(todo)
        log.info("%d of %d specimens are done already", there, len(cohort.cases))
    before = len(partial.records)
    with partial:
        if todo:
            _compute(cohort.batches(model, todo, title), use, partial.add, using.at_once)
    new = len(partial.records) - before
    records |= partial.records
    names = dict.fromkeys([*(r["id"] for r in known), *(c.specimen for c in cohort.cases)])
    return Results([records[name] for name in names if name in records], new), partial


class Partial:
    """Records so far: a line of JSON each, under a line that says what they come from.

    Raises:
        ConfigError: the file comes from something else, or cannot be written.
    """

    def __init__(self, output: Path, about: Mapping[str, Any]) -> None:
        self.path = output.with_name(output.name + ".partial.jsonl")
        self.records: dict[str, Record] = {}
        self._about = dict(about)
        self._file: IO[str] | None = None
        self._begun = False  # whether the file has its first line
        self._one_writes = threading.Lock()
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        head = json.dumps(self._about).encode() + b"\n"
        with self.path.open("rb") as file:  # a line at a time: of a million there are gigabytes
            self._begun = file.readline() == head
            for line in file:
                try:
                    record = json_of(line)
                except ValueError:  # empty, or cut short by a kill, perhaps within a character
                    continue
                self.records[record["id"]] = record
        if self.records and not self._begun:
            raise ConfigError(
                f"{self.path} was written by another model, from other data or with other "
                "settings; remove it or choose another --output"
            )

    def __enter__(self) -> Partial:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._lock()
            if not self._begun:
                self._file.truncate(0)
                self._file.write(json.dumps(self._about) + "\n")
            # What is there stays as it is; a line that a kill cut short must not swallow the next.
            elif not _ends_a_line(self.path):
                self._file.write("\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"--output: cannot write into {self.path.parent} ({error.strerror}); choose "
                "another place"
            ) from error
        return self

    def _lock(self) -> None:
        """Keep a second process with the same output out; the end of this one opens the lock."""
        assert self._file is not None
        try:
            import fcntl
        except ImportError:  # not on this platform
            log.info("%s cannot be locked here; start the command once", self.path)
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{self.path}: another process is writing it; choose another --output, or start "
                "the command once"
            ) from None
        except OSError as error:  # a file system without locks
            log.info("%s cannot be locked (%s); start the command once", self.path, error.strerror)

    def add(self, record: Record) -> None:
        """Keep a record, on the disk too: no kill of this process takes it away."""
        assert self._file is not None
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._one_writes:
            self.records[record["id"]] = record
            self._file.write(line)
            self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None
        self._file.close()
        if (
            kind is not None and not self.records
        ):  # an error came first: nothing to go on from, nothing in the way
            self.path.unlink(missing_ok=True)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def tell(
    output: Path, results: Results, cohort: Cohort, model: SlideModel, what: str, *, as_json: bool
) -> None:
    """Print what has been written; what was left out is told by warnings before."""
    total = len(results.records)
    if as_json:
        content = {
            "output": str(output),
            "specimens": total,
            "new": results.new,
            "bad": dict(cohort.bad.messages),
            "model": model.hash,
        }
        print(json.dumps(content, indent=1, ensure_ascii=False))
        return
    before = total - results.new
    counted = f"1 {what.removesuffix('s')}" if total == 1 else f"{total} {what}"
    print(f"wrote {output}: {counted}" + (f", {before} of them before" if before else ""))
