"""Signals that ask a run to end: it saves after the step or batch in progress, then ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from slidevlm import dist

log = logging.getLogger("slidevlm.train")

# SIGTERM: a scheduler or torchrun ends the job. SIGUSR1: Slurm's --signal, before the end.
# Windows has no SIGUSR1.
_NAMES = {
    int(getattr(signal, name)): name
    for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    if hasattr(signal, name)
}
_TELLING_SECONDS = 1.0  # that an end waits for the last message; what reads it may have stopped
_ASK_SECONDS = 1.0  # between two questions whether another process has had a signal
_KEY = "signal"
_wakeups: set[int] = set()  # into which Python writes the signals of this process


def _keep_to_itself() -> None:
    """In a forked process: its signals, as of a reader that is ended, are not those of the run."""
    if _wakeups:
        signal.set_wakeup_fd(-1)
        _wakeups.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_to_itself)


class Interrupts:
    """Within, a signal is noted instead of ending the process; a second Ctrl-C ends it at once.

    Python hands signals to the main thread alone; in any other this notes none. Entering is a
    collective call.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came to this process
        self._before: dict[int, Any] = {}
        # Python hears of a signal at once, but `_note` is called when the main thread is back from
        # what it does, which may be to wait for other processes; and a thread that writes to the
        # log may not do so again within that (RuntimeError). So Python tells another thread, too.
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._fd_before = -1
        self._teller = threading.Thread(target=self._tell, name="signals", daemon=True)
        self._store: Any = None  # where the processes tell each other
        self._elsewhere, self._ask_at = False, 0.0

    def came(self) -> bool:
        """Whether a signal has come to this process or, some second ago, to another one.

        It waits for no other process, so they need not ask equally often, and do not learn of it
        at the same place. Under Horovod it tells of this process alone.
        """
        if self.name is not None or self._elsewhere:
            return True
        if self._store is not None and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + _ASK_SECONDS
            self._elsewhere = bool(self._store.check([_KEY]))
        return self._elsewhere

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = _NAMES[number]

    def _tell(self) -> None:
        assert self._ends is not None
        told = set[int]()
        while number := self._ends[0].recv(1)[0]:
            if number in told or number not in _NAMES:
                continue
            told.add(number)
            if self._store is not None:
                with contextlib.suppress(RuntimeError):  # the store is gone, and the run ends
                    self._store.set(_KEY, "")
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            log.warning("%s: saving after this step or batch, then ending%s", _NAMES[number], again)

    def __enter__(self) -> Interrupts:
        self._store = dist.private_store()
        if threading.current_thread() is threading.main_thread():
            self._ends = socket.socketpair()
            self._ends[1].setblocking(False)
            self._teller.start()
            end = self._ends[1].fileno()
            self._fd_before = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
            _wakeups.add(end)
            for number in _NAMES:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._ends is None:
            return
        signal.set_wakeup_fd(self._fd_before)
        _wakeups.discard(self._ends[1].fileno())
        with contextlib.suppress(BlockingIOError):  # full: the teller does not come to read
            self._ends[1].send(b"\0")
        self._teller.join(_TELLING_SECONDS)
        if not self._teller.is_alive():
            for end in self._ends:
                end.close()
