"""One operation on a CPU in pieces, of which each thread takes the next when it is ready.

Where all threads share each of many short operations they wait for each other at the end of each,
and for whichever has lost its core: beside one other process two threads take twice the time of
one (`benchmarks/pieces.py`). Here they meet once, and a thread without a core does fewer pieces.
Each piece is computed by one thread, so that how many there are changes no digit.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from slidevlm.models.graphs import outside_autograd

T = TypeVar("T")
LEAST = 1 << 18  # numbers that an operation reads; it then takes a tenth of a millisecond


_this_thread = threading.local()  # has `sharing` while it runs what was to be run `calmly`


def _number() -> int:
    """How many threads share an operation of this thread."""
    found: int = getattr(_this_thread, "sharing", 0) or torch.get_num_threads()
    return found


class _Job:
    def __init__(self, work: Callable[[int], None], count: int) -> None:
        self.work = work
        self.todo: Iterator[int] = iter(range(count))
        self.left = count
        self.one_counts = threading.Lock()
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.inference = torch.is_inference_mode_enabled()

    def run(self) -> None:
        """Do pieces until none is left."""
        # Inference mode is a thread's own, and what is made in it cannot be written to outside.
        with torch.inference_mode(self.inference), torch.no_grad():
            for number in self.todo:
                if self.over.is_set():  # ahead of its time
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

    def end(self, error: BaseException | None) -> None:
        """No thread begins another piece."""
        with self.one_counts:
            if not self.over.is_set():
                self.error = error
                self.over.set()

    def wait(self) -> None:
        try:
            self.over.wait()
        except BaseException:  # of a signal
            self.end(None)
            raise
        if self.error is not None:
            raise self.error


class _Threads:
    """Threads of this process, started as they are wanted, for which torch has one thread each."""

    def __init__(self) -> None:
        self._started = 0
        self._one_starts = threading.Lock()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()

    def offer(self, job: _Job, times: int, threads: int) -> None:
        """To some of so many."""
        with self._one_starts:
            if self._started < threads:
                mine = torch.get_num_threads()
                ready = [threading.Event() for _ in range(threads - self._started)]
                for event in ready:
                    threading.Thread(
                        target=self._serve, args=(event,), name="pieces", daemon=True
                    ).start()
                for event in ready:
                    event.wait()
                torch.set_num_threads(mine)  # of threads to come, which theirs was set for, too
                self._started = threads
        for _ in range(times):
            self._jobs.put(job)

    def _serve(self, ready: threading.Event) -> None:
        torch.get_num_threads()  # a thread's first use of torch gives it as many as all others
        torch.set_num_threads(1)
        ready.set()
        while True:
            self._jobs.get().run()


@functools.cache
def _threads_of(process: int) -> _Threads:
    """A forked process has none of those before it."""
    return _Threads()


def are_many(numbers: Tensor) -> bool:
    """Whether what is computed of these, without gradients, is worth being done `calmly`."""
    return (
        numbers.device.type == "cpu"
        and numbers.numel() >= LEAST
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not outside_autograd()
        and torch.get_num_threads() > 1
    )


def are_shared(numbers: Tensor) -> bool:
    """Whether an operation on these is to be shared, which torch would not do here."""
    return hasattr(_this_thread, "sharing") and numbers.numel() >= LEAST


def share(work: Callable[[int], None], count: int) -> None:
    """Call `work` with 0, 1, ... `count - 1`, in as many threads as torch has; without gradients.

    With one thread, or one piece, the caller does it.

    Raises:
        whatever `work` raises first; no further piece is begun then.
    """
    number = _number()
    if number <= 1 or count <= 1:
        with torch.no_grad():
            for one in range(count):
                work(one)
        return
    job = _Job(work, count)
    takes_part = hasattr(_this_thread, "sharing")
    _threads_of(os.getpid()).offer(job, min(number, count) - takes_part, number)
    if takes_part:
        job.run()
    job.wait()


def calmly(work: Callable[[], T]) -> T:
    """Call it, without gradients, in a thread where torch's own operations are not shared."""
    found: list[T] = []
    number = _number()

    def run(_: int) -> None:
        _this_thread.sharing = number
        try:
            found.append(work())
        finally:
            del _this_thread.sharing

    job = _Job(run, 1)
    _threads_of(os.getpid()).offer(job, 1, number)
    job.wait()
    return found[0]
