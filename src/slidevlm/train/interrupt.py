"""Signals that ask a run to end: it saves after the step or batch in progress, then ends."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from slidevlm import dist

log = logging.getLogger("slidevlm.train")

# SIGTERM: a scheduler or torchrun ends the job. SIGUSR1: Slurm's --signal, before the end.
_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
_TELLING_SECONDS = 1.0  # that an end waits for the last message; what reads it may have stopped
_ASK_SECONDS = 1.0  # between two questions whether another process has had a signal
_KEY = "signal"


class Interrupts:
    """Within, a signal is noted instead of ending the process; a second Ctrl-C ends it at once.

    Python hands signals to the main thread alone; in any other this notes none. Entering is a
    collective call.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came to this process
        self._before: dict[int, Any] = {}
        # A signal may come while this thread writes to the log, which Python does not let it do
        # again within that (RuntimeError); another thread waits for its turn.
        self._words: queue.SimpleQueue[str | None] = queue.SimpleQueue()
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
        self.name = signal.Signals(number).name
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        self._words.put(f"{self.name}: saving after this step or batch, then ending{again}")

    def _tell(self) -> None:
        while (words := self._words.get()) is not None:
            if self._store is not None:
                with contextlib.suppress(RuntimeError):  # the store is gone, and the run ends
                    self._store.set(_KEY, "")
            log.warning("%s", words)

    def __enter__(self) -> Interrupts:
        self._store = dist.private_store()
        if threading.current_thread() is threading.main_thread():
            self._teller.start()
            for name in _NAMES:
                if number := getattr(signal, name, None):  # Windows has no SIGUSR1
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
        self._words.put(None)
        if self._teller.is_alive():
            self._teller.join(_TELLING_SECONDS)
