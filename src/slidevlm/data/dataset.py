"""From a split to batches: sampling of tiles, tokens, ragged collation, worker processes."""

from __future__ import annotations

import atexit
import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from slidevlm.batch import Bags, Batch
from slidevlm.data.augment import Augmentation
from slidevlm.data.cases import Bag, Case, CaseStore
from slidevlm.data.formats.rows import new_shared, shared_rows
from slidevlm.data.packed import Cases, Texts
from slidevlm.data.parallel import usable_cores
from slidevlm.data.reports import report_id
from slidevlm.data.sampling import generator
from slidevlm.data.telling import telling
from slidevlm.data.tokenizer import TextTokenizer
from slidevlm.errors import DataError

log = logging.getLogger("slidevlm.data.bad")
log.setLevel(logging.WARNING)  # every process warns of its own specimens, not the first alone

Key = int | tuple[int, int]  # index, of evaluation; or (epoch, index), of training


@dataclass(frozen=True)
class Sample:
    """One specimen, ready for collation."""

    case: Case
    bag: Bag  # n tiles; positions relative to the centre of their slide
    tokens: Tensor  # [l] int64, BOS ... EOS
    report_id: int
    pad_id: int


@dataclass(frozen=True)
class Failure:
    """A DataError on its way from a worker, where torch would wrap it in a traceback."""

    message: str
    specimen: str | None = None  # None: the specimens of a batch do not fit together


class BagDataset(Dataset[Sample]):
    """The specimens of a split; an item is fixed by (seed, epoch, specimen) and nothing else.

    Bags of more than `cutoff` tiles are sampled without replacement, and only the sampled rows
    are read: afresh each epoch in training, by the specimen's name alone in evaluation. Then the
    `augmentation` changes them, which for evaluation is the one that does nothing.

    `max_tokens` counts BOS and EOS. Errors: DataError for a bag without tiles or with features
    that are not finite.
    """

    def __init__(
        self,
        store: CaseStore,
        split_cases: Sequence[Case],
        reports: Sequence[str],
        tokenizer: TextTokenizer,
        max_tokens: int,
        cutoff: int,
        seed: int,
        training: bool,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
    ) -> None:
        assert len(split_cases) == len(reports), (len(split_cases), len(reports))
        self.store = store
        self.cases = Cases(split_cases)
        self.reports = Texts(reports)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.cutoff = cutoff
        self.seed = seed
        self.training = training
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.cases)

    def truncated(self) -> int:
        """How many reports are longer than `max_tokens`."""
        reports = telling(self.reports, "measuring reports", len(self))
        return sum(self.tokenizer.is_truncated(report, self.max_tokens) for report in reports)

    def lengths(self) -> np.ndarray:
        """Tiles read of each specimen, [N] int64; 0 where that cannot be known.

        Reads no features. What is wrong with a specimen is told when it is read.
        """
        cases = telling(self.cases, "counting the tiles of specimens", len(self))
        return np.array([self._length(case) for case in cases], np.int64)

    def _length(self, case: Case) -> int:
        try:
            return min(self.store.length(case), self.cutoff)
        except DataError:
            return 0

    def rows(self, case: Case, epoch: int) -> np.ndarray | None:
        """The rows of `case` to read in `epoch`: [cutoff] int64, increasing; None for all."""
        length = self.store.length(case)
        if length == 0:
            raise DataError(
                f"{self.store.path}: specimen {case.specimen!r} has 0 tiles; remove it from the "
                "split or extract its features again"
            )
        if length <= self.cutoff:
            return None
        names = ("tiles", self.seed, epoch) if self.training else ("tiles",)
        draw = generator(*names, case.specimen)
        return np.sort(draw.choice(length, self.cutoff, replace=False, shuffle=False))

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        case = self.cases[index]
        bag = self.store.read(case, self.rows(case, epoch))
        _check_finite(bag.features, case, self.store)
        relative = replace(bag, positions=bag.relative_positions())
        if relative.positions is None and self.augmentation.moves:
            raise DataError(
                f"{self.store.path}: specimen {case.specimen!r} has no positions for "
                f"{', '.join(self.augmentation.moves)} to move; leave that out of --aug-cfg"
            )
        changed = self.augmentation(relative, self.seed, epoch, case.specimen)
        tokens = self.tokenizer.encode(self.reports[index], self.max_tokens)
        return Sample(
            case,
            changed,
            torch.tensor(tokens, dtype=torch.int64),
            report_id(self.reports[index]),
            self.tokenizer.pad_id,
        )

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample | Failure]:
        """What torch's loader calls for a batch; errors come back as values."""
        # A batch of one bag leaves the worker as it was read; of several, as it was collated.
        with shared_rows(enabled=len(keys) == 1 and _in_worker()):
            return [self._sample_or_failure(key) for key in keys]

    def _sample_or_failure(self, key: Key) -> Sample | Failure:
        try:
            return self[key]
        except DataError as error:
            index = key[1] if isinstance(key, tuple) else key
            return Failure(str(error), self.cases[index].specimen)


def _check_finite(features: Tensor, case: Case, store: CaseStore) -> None:
    """DataError when a feature is NaN or infinite. [N, D]"""
    # What is not finite stays so in any sum. A finite sum is the cheapest proof for 32 bits.
    if features.dtype == torch.float32 and math.isfinite(float(features.sum())):
        return
    # A number is not finite exactly when its exponent bits are all ones. Two integer passes over
    # pieces that stay in the cache cost a tenth of torch.isfinite on 16-bit floats.
    integer, magnitude, exponent = {
        torch.float16: (torch.int16, 0x7FFF, 0x7C00),
        torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
        torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    }[features.dtype]
    pieces = torch.split(features.view(integer), max(1, 2**17 // max(1, features.shape[1])))
    if all(int((piece & magnitude).max()) < exponent for piece in pieces):
        return
    bad = int((~torch.isfinite(features)).any(dim=1).sum())
    raise DataError(
        f"{store.path}: specimen {case.specimen!r} has {bad} of {len(features)} tiles read with "
        "NaN or infinite features; extract them again or remove the specimen from the split"
    )


def pad(rows: Sequence[Sequence[int] | Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids of B texts -> tokens [B, L] int64, padded on the right, and mask [B, L] bool."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = True
    return tokens, mask


def collate(samples: Sequence[Sample]) -> Batch:
    """Lay bags end to end and pad tokens on the right.

    In a worker all tensors share one memory: who keeps one of them keeps the features.

    DataError when widths or units differ, or only some specimens have positions.
    """
    bags = [sample.bag for sample in samples]
    _check_alike(samples, "feature width", [bag.features.shape[1] for bag in bags])
    _check_alike(samples, "unit of positions", [bag.unit for bag in bags])
    tokens, mask = pad([sample.tokens for sample in samples], samples[0].pad_id)
    positions = [bag.positions for bag in bags if bag.positions is not None]
    slides = [bag.slides for bag in bags if bag.slides is not None]
    ids = torch.tensor([sample.report_id for sample in samples], dtype=torch.int64)
    parts: list[Sequence[Tensor]] = [[tokens], [mask], [ids]]
    parts += [kept for kept in (positions, slides) if len(kept) == len(bags)]
    features = [bag.features for bag in bags]
    if len(bags) == 1:  # of 400 MB, perhaps, and it lies in memory of its own: no copy
        joined, (tokens, mask, ids, *rest) = features[0], _joined(parts)
    else:
        joined, tokens, mask, ids, *rest = _joined([features, *parts])
    places = iter(rest)
    return Batch(
        Bags(
            joined,
            tuple(len(bag.features) for bag in bags),
            next(places) if len(positions) == len(bags) else None,
            next(places) if len(slides) == len(bags) else None,
            bags[0].unit,
        ),
        tokens,
        mask,
        ids,
        tuple(sample.case.specimen for sample in samples),
        tuple(sample.case.patient for sample in samples),
    )


_LINE_BYTES = 64  # of a cache; any type may begin there


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each part's tensors end to end; in a worker all in one memory that the training process maps.

    Every memory that a worker sends costs the training process a connection to it, and a wait
    while the worker is busy.
    """
    alike = [len({tensor.dtype for tensor in part}) == 1 for part in parts]
    if not _in_worker() or not all(alike):
        return [part[0] if len(part) == 1 else torch.cat(list(part)) for part in parts]
    sizes = [sum(tensor.nbytes for tensor in part) for part in parts]
    rooms = new_shared(sum(map(_up, sizes))).split(list(map(_up, sizes)))
    joined = []
    for part, size, room in zip(parts, sizes, rooms, strict=True):
        shape = (sum(len(tensor) for tensor in part), *part[0].shape[1:])
        joined.append(torch.cat(list(part), out=room[:size].view(part[0].dtype).view(shape)))
    return joined


def _up(size: int) -> int:
    """Bytes up to the next line of a cache; any type may begin there."""
    return -(-size // _LINE_BYTES) * _LINE_BYTES


def _in_worker() -> bool:
    return get_worker_info() is not None


def _check_alike(samples: Sequence[Sample], what: str, values: Sequence[object]) -> None:
    for sample, value in zip(samples, values, strict=True):
        if value != values[0]:
            raise DataError(
                f"specimens {samples[0].case.specimen!r} ({samples[0].case.location}) and "
                f"{sample.case.specimen!r} ({sample.case.location}) cannot be in one batch: "
                f"{what} {values[0]} and {value}; make the data agree, or leave one out"
            )


@dataclass
class _Loaded:
    """What a worker sends: a batch of the good specimens, and what is wrong with the others."""

    batch: Batch
    failures: list[Failure]

    def pin_memory(self) -> _Loaded:
        """Called by torch's DataLoader when it pins."""
        return _Loaded(self.batch.pin_memory(), self.failures)


def _load(items: list[Sample | Failure]) -> _Loaded:
    samples = [item for item in items if isinstance(item, Sample)]
    failures = [item for item in items if isinstance(item, Failure)]
    if not samples:
        return _Loaded(empty_batch(), failures)
    try:
        return _Loaded(collate(samples), failures)
    except DataError as error:
        return _Loaded(empty_batch(), [*failures, Failure(str(error))])


def empty_batch() -> Batch:
    """A batch of no specimens: what is left where all were bad. It has no width, and no tokens."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        Bags(torch.zeros(0, 0), ()),
        nothing.reshape(0, 0),
        torch.zeros((0, 0), dtype=torch.bool),
        nothing,
        (),
        (),
    )


class BadSpecimens:
    """What --skip-bad-specimens has dropped in this process, each told once."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}  # specimen -> what is wrong with it

    def add(self, failure: Failure) -> None:
        """Note a specimen, with a warning the first time; DataError when it is not one alone."""
        if failure.specimen is None:
            raise DataError(failure.message)
        if failure.specimen not in self.messages:
            self.messages[failure.specimen] = failure.message
            log.warning("dropped a bad specimen: %s", failure.message)


class StopAtBad:
    """The default: the first bad specimen stops the run."""

    messages: Mapping[str, str] = MappingProxyType({})

    def add(self, failure: Failure) -> None:
        """Raise it as the DataError it was in the worker."""
        hint = "" if failure.specimen is None else " (--skip-bad-specimens leaves it out)"
        raise DataError(failure.message + hint)


class BagLoader(DataLoader[Any]):
    """A DataLoader of `Batch` that tells `bad` of the specimens that could not be used.

    Where `bad` does not raise, batches lack them, and a batch of which nothing is left is yielded
    empty (length 0), so that the number of batches stays what the sampler says.
    """

    bad: BadSpecimens | StopAtBad
    _cores_told: ClassVar[bool] = False
    _receiver: threading.Thread | None = None

    def check_worker_number_rationality(self) -> None:
        """What torch says of every loader in five lines is said once, in one."""
        cores = usable_cores()
        if self.num_workers > cores and not BagLoader._cores_told:
            BagLoader._cores_told = True
            logging.getLogger("slidevlm.data").warning(
                "--workers %d for %d cores that this process may use; fewer may be faster",
                self.num_workers,
                cores,
            )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for loaded in self._received():
            for failure in loaded.failures:
                self.bad.add(failure)
            yield loaded.batch
            del loaded  # or the bags would stay in memory while the next ones are read

    def _received(self) -> Iterator[_Loaded]:
        """What the workers send, each received while the one before is in use.

        To receive a batch costs a connection to its worker, and the wait until that answers: a
        millisecond in which training would stand still. Pinning has such a thread of torch's.
        """
        if self._receiver is not None:  # of a loop that was left early, still at its last batch
            self._receiver.join()
        batches = super().__iter__()
        if not self.num_workers or self.pin_memory:
            yield from batches
            return
        asked: SimpleQueue[bool] = SimpleQueue()
        answers: SimpleQueue[_Loaded | BaseException] = SimpleQueue()
        # A worker that never answers must not keep the process from ending: a daemon.
        words = (batches, asked, answers)
        self._receiver = threading.Thread(target=_receive, args=words, name="batches", daemon=True)
        self._receiver.start()
        try:
            asked.put(True)
            while True:
                loaded = answers.get()
                if isinstance(loaded, StopIteration):
                    return
                if isinstance(loaded, BaseException):
                    raise loaded
                asked.put(True)
                yield loaded
                del loaded
        finally:
            asked.put(False)
            # It may be the last to hold the data, whose HDF5 files it then closes. If the process
            # ends meanwhile the thread is gone with h5py's lock, which the end waits for, for ever.
            del batches, words
            self._receiver.join(_RECEIVER_SECONDS)


def _receive(
    batches: Iterator[_Loaded],
    asked: SimpleQueue[bool],
    answers: SimpleQueue[_Loaded | BaseException],
) -> None:
    """Fetch one whenever asked; an error, or the end, is an answer and the last one."""
    try:
        while asked.get():
            answers.put(next(batches))
    except BaseException as error:
        answers.put(error)
    # Where nobody takes it, as in a loop that is left at its last batch, the error would hold this
    # frame and the frame the error, and with them the workers until garbage is collected: at the
    # end of a process that is after they have been waited for.
    del batches, answers


_RECEIVER_SECONDS = 10  # a loop that is left waits so long for the batch under way
_GRACE_SECONDS = 30  # a worker lives on after SIGTERM, at most


_OPEN: WeakSet[BagLoader] = WeakSet()


@atexit.register  # after multiprocessing's own, so called before: that one would send SIGTERM
def _end_workers() -> None:
    """Let the workers of loaders that are still there end with the process, not some time later."""
    for loader in tuple(_OPEN):
        iterator: Any = loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def _start_worker(worker: int) -> None:
    """What a worker does first.

    Workers share the cores with the training process; their threads would only queue. Signals
    that end a job reach them too, but the process that trains still needs them: it saves after
    the step in progress, and ends them itself.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS) and None)


def make_loader(
    dataset: BagDataset,
    batch_sampler: Sampler[Any],
    workers: int,
    pin_memory: bool = False,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
    bad: BadSpecimens | StopAtBad | None = None,
) -> BagLoader:
    """A loader whose batches do not depend on `workers` or `start_method`.

    Workers live on between epochs, and each reads two batches ahead (torch's default). None as
    `start_method` is the platform's way of starting them; without `bad`, the first bad specimen
    raises its DataError.
    """
    parallel: dict[str, Any] = {}
    if workers:
        parallel = {
            "num_workers": workers,
            "worker_init_fn": _start_worker,
            "persistent_workers": True,
            "multiprocessing_context": start_method,
        }
    loader = BagLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=_load,
        pin_memory=pin_memory,
        # torch would draw its workers' seed from the global generator, and dropout with it would
        # depend on the number of workers. Nothing here uses that seed.
        generator=torch.Generator(),
        **parallel,
    )
    loader.bad = StopAtBad() if bad is None else bad
    if workers:
        _OPEN.add(loader)
    return loader
