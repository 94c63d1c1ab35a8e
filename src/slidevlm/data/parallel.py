"""One function over many specimens, by processes that each open the data for themselves."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

import torch

from slidevlm.data.cases import Case, CaseStore
from slidevlm.errors import DataError

Result = TypeVar("Result")

_WAITING = 4  # specimens handed out ahead, a worker

_work: tuple[Callable[..., Any], CaseStore] | None = None  # of this worker process


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def each(
    function: Callable[[CaseStore, Case], Result],
    store: CaseStore,
    cases: Sequence[Case],
    workers: int,
) -> Iterator[tuple[Case, Result]]:
    """`function(store, case)` of every case, in the order in which they are done.

    With workers, `function` and its results travel between processes, so both must be picklable.
    What it raises is raised here. 0 workers: in this process, in order.

    DataError: a worker process died, as by want of memory.
    """
    if workers == 0 or len(cases) < 2:
        for case in cases:
            yield case, function(store, case)
        return
    methods = multiprocessing.get_all_start_methods()
    # Not fork: progress bars and torch have threads, whose locks a fork would inherit locked.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["slidevlm.data.formats.hdf5_cases"])
    pool = ProcessPoolExecutor(
        min(workers, len(cases)), context, initializer=_begin, initargs=(function, store)
    )
    left = iter(cases)
    running: dict[Future[Result], Case] = {}
    try:
        while True:
            for case in itertools.islice(left, _WAITING * workers - len(running)):
                running[pool.submit(_one, case)] = case
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield running.pop(future), result
    except BrokenProcessPool as error:
        names = ", ".join(case.specimen for case in running.values())
        raise DataError(
            f"{store.path}: a reading process died at one of these specimens: {names}; it was "
            "killed (memory?) or crashed on damaged data: try --workers 0, or leave them out"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[CaseStore, Case], Any], store: CaseStore) -> None:
    global _work
    torch.set_num_threads(1)  # the workers share the cores among themselves
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = (function, store)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers to end, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    connection.wait([parent.sentinel])
    os._exit(1)


def _one(case: Case) -> Any:
    assert _work is not None, "the pool has called _begin"
    function, store = _work
    return function(store, case)
