"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, to be written and closed within, which then takes its place.

    The folder is made where it lacks. An error within leaves `path` as it was and takes the new
    file away; a kill leaves `path` as it was. What must outlive a loss of power is flushed to the
    disk by the caller, who has the file open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename over two disks is none; hidden, and of another ending, so that
    # nobody takes it for one of its kind; another process has a file of its own.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
