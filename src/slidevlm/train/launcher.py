"""A process that torchrun has started ends when torchrun is gone.

Killed outright (out of memory, `kill -9`), torchrun ends nobody: its processes would train on,
write into the run folder beside those of the next start, and hold their devices.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

log = logging.getLogger("slidevlm.train")

POLL_SECONDS = 1.0
_NOTE = "SLIDEVLM_LAUNCHER"  # a process and its launcher: in the environment, which outlives exec


def note_launcher() -> None:
    """Remember whose child this process is; for the first line of a program.

    Importing torch takes seconds. A launcher that is killed within them is gone before anything
    watches it, and whoever asks then is told another parent.
    """
    if _is_launched() and _noted() is None:
        os.environ[_NOTE] = f"{os.getpid()} {os.getppid()}"


def _is_launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # torchrun sets it


def _noted() -> int | None:
    process, _, launcher = os.environ.get(_NOTE, "").partition(" ")
    return int(launcher) if process == str(os.getpid()) else None


class LauncherWatch:
    """Within, the process ends with code 1 soon after its launcher did.

    It ends at once, without a checkpoint: nothing is left that would wait for it, and the next
    start goes on from the last one. Without torchrun this does nothing.
    """

    def __init__(self, poll_seconds: float = POLL_SECONDS) -> None:
        self._poll_seconds = poll_seconds
        noted = _noted()
        self._parent = os.getppid() if noted is None else noted
        self._over = threading.Event()
        self._launched = _is_launched()

    def _watch(self) -> None:
        while not self._over.wait(self._poll_seconds):
            if os.getppid() != self._parent:
                log.error("torchrun is gone; ending, go on with --resume latest")
                sys.stderr.flush()
                os._exit(1)  # the main thread may wait for another process for ever

    def __enter__(self) -> LauncherWatch:
        if self._launched:
            threading.Thread(target=self._watch, name="launcher watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
