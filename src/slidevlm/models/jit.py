"""numba, which compiles what torch's operations are slow at on a CPU: whether it may be used here.

It is an extra (`cpu`), takes a second to start and some to compile; it may have threads of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger(__name__)

WITHOUT = "results are the same, but slower, without numba"
MEND = (
    "which does not work here (install it anew, or give its files another folder by "
    "NUMBA_CACHE_DIR)"
)
THREADS = ("omp", "tbb")  # numba's own end the process where two callers use them at once

_one_starts = threading.Lock()
_processes: list[int] = []  # that have started threads: this one, or one that it was forked from


def _forget() -> None:
    """Another thread of the process before may have held the lock."""
    global _one_starts
    _one_starts = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@functools.cache
def _is_there() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        import numba
    except Exception as error:  # of whatever is wrong with it
        log.warning("%s, %s: %s", WITHOUT, MEND, error)
        return False
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        log.warning("%s: NUMBA_DISABLE_JIT is set", WITHOUT)
        return False
    return True


@functools.cache
def _has_threads(process: int) -> bool:
    """Whether numba's threads run; they are started the first time."""
    import numba

    if _processes:
        log.warning("%s: its threads are those of the process before", WITHOUT)
        return False
    mine = torch.get_num_threads()
    try:
        numba.get_num_threads()  # starts them
        layer = numba.threading_layer()
    except Exception as error:
        log.warning("%s, %s: %s", WITHOUT, MEND, error)
        return False
    finally:
        # To start its threads numba sets the number of OpenMP's, which may be torch's too.
        if torch.get_num_threads() != mine:
            torch.set_num_threads(mine)
    if layer not in THREADS:
        log.warning("%s, whose %s threads can clash: set NUMBA_THREADING_LAYER=omp, or install tbb",
                    WITHOUT, layer)  # fmt: skip
        return False
    _processes.append(process)
    return True


def kernels(name: str, *, threaded: bool) -> Any:
    """A module of `slidevlm.models` with its kernels compiled; None where that cannot be.

    Args:
        name: of the module, which has `is_compiled()`, `compile_all()` and its `SECONDS`.
        threaded: whether they need threads of numba's.
    """
    with _one_starts:
        if not _is_there() or (threaded and not _has_threads(os.getpid())):
            return None
        return _kernels(name)


@functools.cache
def _kernels(name: str) -> Any:
    try:
        module: Any = importlib.import_module(f"slidevlm.models.{name}")
        if not module.is_compiled():
            log.info("compiling %s for this processor: some %d seconds, once on a machine",
                     name.replace("_", " "), module.SECONDS)  # fmt: skip
        module.compile_all()
    except Exception as error:  # the place for its files may have filled up
        log.warning("%s, %s: %s", WITHOUT, MEND, error)
        return None
    return module


@functools.cache
def suggest(what: str) -> None:
    """Say once what would be done sooner, where numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        log.info("on a CPU, %s sooner with numba: pip install 'slidevlm[cpu]'", what)


def threads() -> int:
    """As many as torch has, and numba can have."""
    import numba

    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return min(torch.get_num_threads(), most)


@contextmanager
def own_threads(number: int) -> Iterator[None]:
    """Within, and in this thread, compiled loops are shared by so many."""
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(number)
    try:
        yield
    finally:
        numba.set_num_threads(before)
