"""Signals that ask a run to end: it saves after the step in progress, then ends."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger("slidevlm.train")

# SIGTERM: a scheduler or torchrun ends the job. SIGUSR1: Slurm's --signal, before the end.
_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")


class Interrupts:
    """Within, a signal is noted instead of ending the process; a second Ctrl-C ends it at once.

    Python hands signals to the main thread alone; in any other this does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        log.warning("%s: saving after this step, then ending%s", self.name, again)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
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
