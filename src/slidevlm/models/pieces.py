"""One operation on a CPU in pieces, of which each thread takes the next when it is ready.

Where all threads share each of many short operations they wait for each other at the end of each,
and for whichever has lost its core: beside one other process two threads take twice the time of
one (`benchmarks/pieces.py`). Here they meet once, and a thread without a core does fewer pieces.
Each piece is computed by one thread, so that how many of them there are changes no digit.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from slidevlm.models.graphs import outside_autograd

log = logging.getLogger(__name__)

T = TypeVar("T")
LEAST = 1 << 18  # numbers that an operation reads; it then takes a tenth of a millisecond
_LAST_SECONDS = 30.0  # for the pieces that are being done when the process ends


class _This(threading.local):
    """What a thread is doing."""

    job: _Job | None = None
    sharing: int = 0  # threads that share its operations, while it runs what was to be run calmly


_this_thread = _This()


def _number() -> int:
    """How many threads share an operation of this thread."""
    return _this_thread.sharing or torch.get_num_threads()


class _EndedError(Exception):
    """What this was a part of has ended before its time."""


class _Job:
    def __init__(self, work: Callable[[int], None], count: int) -> None:
        self.work = work
        self.todo: Iterator[int] = iter(range(count))
        self.left = count
        self.one_counts = threading.Lock()
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.inference = torch.is_inference_mode_enabled()
        self.part_of = _this_thread.job

    @property
    def is_over(self) -> bool:
        return self.over.is_set() or (self.part_of is not None and self.part_of.is_over)

    def run(self) -> None:
        """Do pieces until none is left."""
        before, _this_thread.job = _this_thread.job, self
        try:
            # A thread's own; and what is made in inference mode cannot be written to outside.
            with torch.inference_mode(self.inference), torch.no_grad():
                for number in self.todo:
                    if self.is_over:
                        self.end(_EndedError())
                        return
                    try:
                        self.work(number)
                    except BaseException as error:
                        self.end(error)
                        return
                    with self.one_counts:
                        self.left -= 1
                        done = not self.left
                    if done:
                        self.over.set()
        finally:
            _this_thread.job = before

    def end(self, error: BaseException | None) -> None:
        """No thread begins another piece."""
        with self.one_counts:
            if not self.over.is_set():
                self.error = error
                self.over.set()

    def wait(self) -> None:
        """Until it is over; raises what a piece has raised."""
        try:
            self.over.wait()
        except BaseException:  # of a signal
            self.end(None)
            raise
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # which knows this frame, and so all that the pieces know


class _Threads:
    """Threads of this process, started as they are wanted, for which torch has one thread each."""

    def __init__(self) -> None:
        self._started = 0
        self._one_starts = threading.Lock()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._doing: dict[int, _Job] = {}  # by thread
        self._closed = self._told = False

    def offer(self, job: _Job, times: int, threads: int) -> bool:
        """To some of so many. False: there is none; the system has no room, or Python ends."""
        with self._one_starts:
            before, mine = self._started, torch.get_num_threads()
            try:
                while self._started < threads:
                    ready = threading.Event()
                    threading.Thread(
                        target=self._serve, args=(ready,), name="pieces", daemon=True
                    ).start()
                    self._started += 1
                    ready.wait()
            except RuntimeError as error:  # can't start new thread
                if not self._told:
                    self._told = True
                    log.warning("slides are read by %d of %d threads, and more slowly: the system "
                                "starts no more (%s; see ulimit -u)",
                                self._started or 1, threads, error)  # fmt: skip
            finally:
                if self._started > before:  # of threads to come, which theirs was set for, too
                    torch.set_num_threads(mine)
            if self._closed or not self._started:
                return False
        for _ in range(times):
            self._jobs.put(job)
        return True

    def _serve(self, ready: threading.Event) -> None:
        torch.get_num_threads()  # a thread's first use of torch gives it as many as all others
        torch.set_num_threads(1)
        ready.set()
        me = threading.get_ident()
        while True:
            job = self._doing[me] = self._jobs.get()
            try:
                if self._closed:
                    job.end(_EndedError())
                job.run()
            finally:
                del job, self._doing[me]

    def end(self) -> None:
        """End what they do: one that is within torch when Python ends takes the process down."""
        self._closed = True
        until = time.monotonic() + _LAST_SECONDS
        while time.monotonic() < until:
            doing = list(self._doing.values())
            if not doing:
                return
            for job in doing:
                job.end(_EndedError())
            del doing, job
            time.sleep(0.001)


_threads: _Threads | None = None
_one_makes = threading.Lock()


def _threads_here() -> _Threads:
    global _threads
    with _one_makes:
        if _threads is None:
            _threads = _Threads()
        return _threads


def _forget() -> None:
    """A forked process has none of the threads before it."""
    global _threads, _one_makes, _this_thread
    _threads, _one_makes, _this_thread = None, threading.Lock(), _This()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@atexit.register
def _end() -> None:
    if _threads is not None:
        _threads.end()


def are_many(numbers: Tensor) -> bool:
    """Whether what is computed of these, without gradients, is worth being done `calmly`."""
    return (
        not outside_autograd()
        and numbers.device.type == "cpu"
        and numbers.numel() >= LEAST
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.get_num_threads() > 1
    )


def are_shared(numbers: Tensor) -> bool:
    """Whether an operation on these is to be shared, which torch would not do here."""
    return _this_thread.sharing > 1 and numbers.numel() >= LEAST


def share(work: Callable[[int], None], count: int) -> None:
    """Call `work` with 0, 1, ... `count - 1`, in as many threads as torch has; without gradients.

    With one thread, or one piece, the caller does it.

    Raises:
        whatever `work` raises first; no further piece is begun then.
    """
    if not count:
        return
    number, is_calm = _number(), _this_thread.sharing > 0
    job, together = _Job(work, count), min(number, count)
    alone = together == 1 or not _threads_here().offer(job, together - is_calm, number)
    if alone or is_calm:
        job.run()
    job.wait()


def calmly(work: Callable[[], T]) -> T:
    """Call it, without gradients, in a thread where torch's own operations are not shared.

    What a thread alone has, as modes of torch and its profiler, does not know of it.

    Raises:
        whatever it raises.
    """
    found: list[T] = []
    number = _number()

    def run(_: int) -> None:
        _this_thread.sharing = number
        try:
            found.append(work())
        finally:
            _this_thread.sharing = 0

    job = _Job(run, 1)
    if not _threads_here().offer(job, 1, number):
        with torch.no_grad():
            return work()
    job.wait()
    return found[0]
