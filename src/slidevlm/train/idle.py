"""Whether a process stands still: its main thread hangs, or a data worker that it waits for does.

At one and the same thing neither the process nor its data workers use the processor, read, write
or wake up. Where the main thread waits for no other process and no device (`dist.alone`) that is
all; in a step or a save (`dist.stepping`) it may wait for the others, and who of them is behind
decides (ranks.py). What cannot be seen counts as work, so that a process is rather taken for a busy
one. Without Linux's /proc nothing is seen.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from slidevlm import dist

_SHARE = 0.01  # of a processor
_BUSY_SECONDS = 0.05  # of the main thread between two looks: no need to look further
_START_SECONDS = 0.1  # of processor time
_WAKES_A_SECOND = 1.0  # a data loader looks every five seconds whether its workers live
_HELD_UP_SECONDS = 10.0  # between two looks: this process was itself stopped
_FRAMES = 3
OWN = "rank watch"  # the name of threads that do not count
_LOGGERS = ("wandb-core", "wandb", "gpu_stats")  # children that are busy with themselves


@dataclass(frozen=True)
class Task:
    """One thread, of this process or of a data worker."""

    state: str
    seconds: float  # of the processor
    faults: int  # for which something was read
    bytes: int
    wakes: int


class Standstill:
    """How long this process has stood still."""

    def __init__(self) -> None:
        self._at = self._place()
        self._last = self._since = time.monotonic()
        self._before: dict[int, Task] | None = None
        self._used = _main_seconds()

    def seconds(self) -> float:
        """Up to now; 0 where it does not. To be asked about every second."""
        at, now, used = self._place(), time.monotonic(), _main_seconds()
        same = at == self._at and now - self._last < _HELD_UP_SECONDS
        busy = used - self._used > _BUSY_SECONDS
        self._at, self._last, self._used = at, now, used
        if busy or not (same and (self.alone or dist.stepping.within(at[1]))):
            self._before = None
            return 0.0
        tasks = tasks_of_all()
        # Where a device or a file system is slow, a step may wait for it as long as it takes.
        slow = not self.alone and any(task.state == "D" for task in tasks.values())
        if self._before is None or slow or works(self._before, tasks, now - self._since):
            self._before, self._since = tasks, now
        return now - self._since

    @property
    def alone(self) -> bool:
        """Whether, when it was last asked, this process waited for no other one."""
        return dist.alone.within(self._at[0])

    @staticmethod
    def _place() -> tuple[int, int, int]:
        return dist.alone.mark, dist.stepping.mark, dist.collectives()


def _main_seconds() -> float:
    """Of the processor, that the main thread has used."""
    clock = getattr(time, "pthread_getcpuclockid", None)  # not everywhere
    main = threading.main_thread().ident
    return time.clock_gettime(clock(main)) if clock is not None and main is not None else 0.0


def is_seen() -> bool:
    """Whether this system tells what threads do."""
    return Path("/proc/self/task").is_dir()


def works(before: dict[int, Task], now: dict[int, Task], seconds: float) -> bool:
    """Whether anything was done in the time between."""
    if before.keys() != now.keys():
        return True
    pairs = [(before[number], task) for number, task in now.items()]
    used = sum(task.seconds - old.seconds for old, task in pairs)
    return used > _START_SECONDS + _SHARE * seconds or any(
        # Running, or waiting for the processor; or held by a debugger.
        task.state in ("R", "T", "t")
        or task.faults > old.faults
        or task.bytes > old.bytes
        or task.wakes - old.wakes > 5 + _WAKES_A_SECOND * seconds
        for old, task in pairs
    )


def tasks_of_all() -> dict[int, Task]:
    """Threads of this process and of its children and theirs, by number."""
    mine, main = os.getpid(), threading.main_thread().native_id
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = {}
    for pid in (mine, *_descendants(mine)):
        for number in _threads(pid):
            task = _task(pid, number)
            if task is None or (pid == mine and names.get(number) == OWN):
                continue
            if pid == mine and number != main:
                # Beside the main thread some keep things going (wandb's), and torch's read and
                # write what goes through the store.
                ours = number in names  # such as the one that writes checkpoints
                state = "D" if ours and task.state == "D" else "S"
                task = Task(state, task.seconds, 0, task.bytes if ours else 0, 0)
            found[number] = task
    return found


def where() -> str:
    """Where the main thread stands: the innermost functions, and the innermost of slidevlm."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = list(_outwards(frame))
    home = str(Path(dist.__file__).parent)
    ours = next((f for f in frames if f.f_code.co_filename.startswith(home)), None)
    shown = frames[:_FRAMES]
    if ours is not None and ours not in shown:
        shown.append(ours)
    return ", called by ".join(
        f"{f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}" for f in shown
    )


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:  # it has ended
        return []


def _descendants(pid: int) -> list[int]:
    """Processes that this one has started, and those that they have; loggers left out."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            head, _, rest = Path(f"/proc/{name}/stat").read_text().rpartition(")")
        except OSError:
            continue
        if head.partition("(")[2] not in _LOGGERS:
            children.setdefault(int(rest.split()[1]), []).append(int(name))
    found, left = [], list(children.get(pid, ()))
    while left:
        child = left.pop()
        found.append(child)
        left += children.get(child, ())
    return found


def _task(pid: int, number: int) -> Task | None:
    """What the system says of a thread; None where it has ended."""
    folder = Path(f"/proc/{pid}/task/{number}")
    try:
        words = (folder / "stat").read_text().rpartition(")")[2].split()
        status = dict(_pairs((folder / "status").read_text()))
    except OSError:
        return None
    try:
        io = dict(_pairs((folder / "io").read_text()))
    except OSError:  # not told everywhere
        io = {}
    return Task(
        words[0],
        (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"),
        int(words[9]),
        sum(int(io.get(key, 0)) for key in ("rchar", "wchar", "read_bytes")),
        int(status["voluntary_ctxt_switches"]),
    )


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        yield key, value.strip()
