"""A process that torchrun has started ends when torchrun is gone.

Killed outright (out of memory, `kill -9`), torchrun ends nobody: its processes would train on,
write into the run folder beside those of the next start, and hold their devices.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType

log = logging.getLogger("slidevlm.train")

POLL_SECONDS = 1.0


class LauncherWatch:
    """Within, the process ends with code 1 soon after its launcher did.

    It ends at once, without a checkpoint: nothing is left that would wait for it, and the next
    start goes on from the last one. Without torchrun this does nothing.
    """

    def __init__(self, poll_seconds: float = POLL_SECONDS) -> None:
        self._poll_seconds = poll_seconds
        self._parent = os.getppid()
        self._over = threading.Event()
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun sets it

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
