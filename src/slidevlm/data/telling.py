"""Log lines for work that only a large cohort makes long."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

log = logging.getLogger("slidevlm.data")

Item = TypeVar("Item")

FIRST_SECONDS = 3.0  # what takes less is not told of
NEXT_SECONDS = 10.0


class Telling:
    """Counts what has been gone through, and logs it where that takes long.

    The first line comes after `FIRST_SECONDS`, more every `NEXT_SECONDS`. `total` is None where
    nobody knows it.
    """

    def __init__(self, doing: str, total: int | None = None) -> None:
        self._doing = doing
        self._total = total
        self._done = 0
        self._next = time.monotonic() + FIRST_SECONDS

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, counted as they are asked for."""
        for item in items:
            if time.monotonic() >= self._next:
                self._tell()
            yield item
            self._done += 1

    def _tell(self) -> None:
        self._next = time.monotonic() + NEXT_SECONDS
        if self._total is None:
            log.info("%s: %d so far", self._doing, self._done)
        else:
            log.info("%s: %d of %d", self._doing, self._done, self._total)


def telling(items: Iterable[Item], doing: str, total: int | None = None) -> Iterator[Item]:
    """`items`, with a log line now and then where going through them takes long."""
    return Telling(doing, total).over(items)
