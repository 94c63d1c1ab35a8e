"""The processes of a run end together: where one fails, hangs or is killed, the others end too.

A collective alone does not see to that: over NCCL a process waits for a dead one until the
timeout, and SIGTERM, which torchrun then sends, is only noted while a collective waits. So a
thread of each process gives a sign every two seconds and looks after the next process's, over a
connection of its own to where the processes have met: whatever its number, a process costs the
store two or three small messages a second.

Such a thread lives on where the main thread hangs. Each process judges that of itself (idle.py); in
a step or a save, where those that wait for it stand still like it, by the number of collectives
that each has begun, which the sign tells: who has the fewest, while another one is ahead, keeps
them waiting.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from slidevlm import dist
from slidevlm.errors import ConfigError, TrainingError
from slidevlm.train import idle

LIMIT_VARIABLE = "SLIDEVLM_HEARTBEAT_SECONDS"
LIMIT_SECONDS = 30.0
IDLE_VARIABLE = "SLIDEVLM_HANG_SECONDS"
IDLE_SECONDS = 40.0

_TICK_SECONDS = 0.5  # a failure that was told is seen within
_TICKS_A_SIGN = 4
_ANSWER_SECONDS = 10.0  # a failing process waits so long for the others, to print last
_LINGER_SECONDS = 12.0  # and they for its end, so that torchrun sees it fail first
_LEAVE_SECONDS = 30.0  # rank 0 may keep the store, and the others still look at it
_ASK_AGAIN = 1.2  # times as long stood still: then the others' signs are read once more
_LOST_SECONDS = 10.0  # a broken connection is explained by then, if anything explains it
_DONE = "done"


@dataclass(frozen=True)
class Failure:
    """What ends a run."""

    rank: int  # whose
    message: str
    pid: int = 0
    place: str = ""  # processes of the same place are children of one process
    own: bool = True  # told by the rank itself, which prints it; else by another
    hangs: bool = False  # it gives no sign, and cannot be relied on to end by itself


@dataclass(frozen=True)
class _Sign:
    """That a process lives."""

    number: int = 0  # grows
    collectives: int = 0  # begun
    pid: int = 0
    place: str = ""  # as in `Failure`; last, as it may hold blanks

    @property
    def text(self) -> str:
        return f"{self.number} {self.collectives} {self.pid} {self.place}"

    @classmethod
    def read(cls, text: str) -> _Sign:
        number, collectives, pid, place = text.split(" ", 3)
        return cls(int(number), int(collectives), int(pid), place)


def limit_of(
    environment: Mapping[str, str], name: str = LIMIT_VARIABLE, seconds: float = LIMIT_SECONDS
) -> float:
    """Seconds of a variable, after which a process counts as lost; 0 in the environment: never.

    Args:
        environment: where the variable may be.
        name: of the variable.
        seconds: without it.

    Raises:
        ConfigError: it is not such a number.
    """
    text = environment.get(name, str(seconds))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ConfigError(f"{name}={text!r} must be a number of seconds, or 0 for never")
    return seconds or float("inf")


class RankWatch:
    """Within, this process ends with code 1 when another one has failed, hangs or is gone.

    An error that leaves the context is told to the others, which end at once; it goes on when they
    have said that they do, so that what is printed of it comes last. Alone this does nothing.

    Raises:
        TrainingError: in place of the error of a collective whose other side is gone.
    """

    def __init__(self) -> None:
        self._limit = limit_of(os.environ)
        self._idle_limit = limit_of(os.environ, IDLE_VARIABLE, IDLE_SECONDS)
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: Any = None
        self._rank = self._next = self._world = 0
        self._signs = self._rounds = 0
        self._leaving, self._message = False, ""  # of an error of this rank
        self._ending, self._lingers = threading.Lock(), False
        self._seen, self._silent_seconds = "", 0.0

    def __enter__(self) -> RankWatch:
        self._store = dist.private_store()
        if self._store is None:
            return self
        self._rank, self._world = dist.rank(), dist.world_size()
        self._next = (self._rank + 1) % self._world
        self._place = _place()
        for work in (self._watch, self._guard, self._watch_itself):
            thread = threading.Thread(target=work, name=idle.OWN, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._store is None:
            return
        lost = error is not None and dist.is_lost_connection(error)
        try:
            if error is None:
                self._leave()
            else:
                if lost:  # because another process has failed: the thread ends this one
                    self._over.wait(_LOST_SECONDS)
                self._tell(error)
        except RuntimeError:  # of the store; what was to be told is `error` itself
            pass
        self._over.set()
        for thread in self._threads:  # one within the store must not meet the interpreter's end
            thread.join(_LINGER_SECONDS)
        if lost:
            raise TrainingError(
                f"rank {self._rank} has lost another process, which was killed or whose machine "
                f"is gone; go on with --resume latest ({' '.join(str(error).split())[:200]})"
            ) from error

    # --- the thread -------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            while not (self._over.is_set() or self._ending.locked()):
                if self._store.check(["failed"]):
                    self._end(Failure(**json.loads(self._store.get("failed"))))
                if self._rounds % _TICKS_A_SIGN == 0:
                    self._sign()
                    self._look()
                self._rounds += 1
                self._over.wait(_TICK_SECONDS)
        except RuntimeError:
            if not self._over.is_set() and self._ending.acquire(blocking=False):
                self._exit("where the processes met is gone: rank 0 or its torchrun has ended")

    def _guard(self) -> None:
        """A store whose process is stopped answers nothing, and `_watch` waits for it."""
        rounds, silent = -1, 0.0
        # Counted in own turns: a process that was itself held up must not blame others.
        while not (self._over.wait(1.0) or self._lingers) and self._threads[0].is_alive():
            silent = 0.0 if self._rounds != rounds else silent + 1.0
            rounds = self._rounds
            if silent > self._limit:
                self._exit(f"where the processes met gives no answer for {silent:.0f} s")

    def _watch_itself(self) -> None:
        """A main thread that hangs says nothing of it."""
        if not idle.is_seen() or self._idle_limit == float("inf"):
            return
        stands, asked_at = idle.Standstill(), 0.0
        while not self._over.wait(1.0):
            seconds = stands.seconds()
            if seconds < max(self._idle_limit, _ASK_AGAIN * asked_at):
                asked_at = min(asked_at, seconds)  # 0 once it has moved
                continue
            asked_at = seconds
            if (stands.alone or self._is_behind()) and self._ending.acquire(blocking=False):
                self._end_itself(seconds)

    def _is_behind(self) -> bool:
        """Whether this process keeps others waiting, and none keeps it waiting."""
        keys = [f"sign/{rank}" for rank in range(self._world) if rank != self._rank]
        try:
            if not self._store.check(keys):
                return False
            signs = [bytes(sign).decode() for sign in self._store.multi_get(keys)]
        except RuntimeError:  # the store is gone, which `_watch` tells
            return False
        others = [_Sign.read(sign).collectives for sign in signs if sign != _DONE]
        mine = dist.collectives()
        # A sign may be seconds old, and its process further: then this is only asked once more.
        return bool(others) and max(others) > mine <= min(others)

    def _end_itself(self, seconds: float) -> NoReturn:
        workers = multiprocessing.active_children()
        told = (
            f"rank {self._rank} stands still: for {seconds:.0f} s it and its data workers have "
            f"neither computed, read nor written; its main thread is at {idle.where()}; "
            f"data workers: {', '.join(str(w.pid) for w in workers) or 'none'}"
        )
        advice = f"go on with --resume latest ({IDLE_VARIABLE}=0: this is not looked at)"
        self._lingers = True
        mine = Failure(self._rank, told, os.getpid(), self._place)
        for worker in workers:  # one that hangs would not notice that this process ends
            worker.kill()
        with contextlib.suppress(RuntimeError):  # of the store; what was to be told is printed
            first = self._first(mine)
            if first != mine:
                self._message = told
                self._follow(first)
            _write_error_file(TrainingError(told))
            self._wait_for("ended", self._world - 1, _ANSWER_SECONDS)
        self._say(f"{told}; {advice}")
        os._exit(1)

    def _sign(self) -> None:
        self._signs += 1
        sign = _Sign(self._signs, dist.collectives(), os.getpid(), self._place)
        self._store.set(f"sign/{self._rank}", _DONE if self._leaving else sign.text)

    def _sign_of_next(self) -> str:
        key = f"sign/{self._next}"
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else ""

    def _look(self) -> None:
        sign = self._sign_of_next()
        if sign == _DONE:
            return
        if sign != self._seen:
            self._seen, self._silent_seconds = sign, 0.0
        else:
            self._silent_seconds += _TICK_SECONDS * _TICKS_A_SIGN
        told = _Sign.read(sign) if sign else _Sign()
        host = told.place.partition("|")[0]
        about = f"rank {self._next}" + (f" (process {told.pid} of {host})" if sign else "")
        if told.place == self._place and not _lives(told.pid):
            if self._sign_of_next() != _DONE:  # it may have left properly in between
                self._accuse(f"{about} was killed", told, hangs=False)
        elif self._silent_seconds >= self._limit:
            silent = f"{about} has given no sign for {self._silent_seconds:.0f} s"
            self._accuse(silent, told, hangs=True)

    def _accuse(self, message: str, sign: _Sign, *, hangs: bool) -> None:
        self._end(self._first(Failure(self._next, message, sign.pid, sign.place, False, hangs)))

    # --- ends -------------------------------------------------------------------------------

    def _first(self, failure: Failure) -> Failure:
        """The failure that was told first, which ends the run."""
        told = self._store.compare_set("failed", "", json.dumps(asdict(failure)))
        return Failure(**json.loads(told))

    def _tell(self, error: BaseException) -> None:
        """Of this rank's error; does not return where another was faster."""
        message = str(error) or type(error).__name__
        self._message = message
        mine = Failure(self._rank, message, os.getpid(), self._place)
        first = self._first(mine)
        if first != mine:
            self._end(first)
        _write_error_file(error)
        self._wait_for("ended", self._world - 1, _ANSWER_SECONDS)

    def _leave(self) -> None:
        self._leaving = True
        self._sign()
        self._store.add("left", 1)
        if self._rank == 0:
            self._wait_for("left", self._world, _LEAVE_SECONDS)

    def _wait_for(self, key: str, number: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._store.add(key, 0) < number and time.monotonic() < until:
            time.sleep(0.02)

    def _end(self, failure: Failure) -> NoReturn:
        if not self._ending.acquire(blocking=False):  # another thread is at it
            self._over.wait()
        if failure.rank == self._rank and failure.own:  # the main thread is about to print it
            sys.exit()  # ends this thread alone
        self._follow(failure)

    def _follow(self, failure: Failure) -> NoReturn:
        sibling = failure.place == self._place and failure.pid != os.getpid()
        if failure.hangs and sibling and _lives(failure.pid):
            os.kill(failure.pid, signal.SIGKILL)  # a stopped process heeds nothing else
        if not failure.own:
            self._say(f"{failure.message}; rank {self._rank} ends, go on with --resume latest")
            os._exit(1)
        if self._message:
            self._say(f"rank {self._rank} has failed too: {self._message.splitlines()[0]}")
        self._say(f"rank {self._rank} ends, because rank {failure.rank} has failed")
        with contextlib.suppress(RuntimeError):  # rank 0 keeps the store and did not wait
            self._store.add("ended", 1)
        self._lingers = True
        until = time.monotonic() + _LINGER_SECONDS
        while time.monotonic() < until and not (sibling and not _lives(failure.pid)):
            time.sleep(0.02)
        os._exit(1)

    def _exit(self, why: str) -> NoReturn:
        self._say(f"{why}; rank {self._rank} ends, go on with --resume latest")
        os._exit(1)

    @staticmethod
    def _say(text: str) -> None:
        # Past sys.stderr, whose lock the main thread may hold for ever.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"slidevlm: {text}\n".encode())


def _place() -> str:
    """Host, space of process numbers and parent."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        space = ""
    return f"{socket.gethostname()}|{space}|{os.getppid()}"


def _lives(pid: int) -> bool:
    """Whether there is such a process, which has the same parent; one not yet reaped is none."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True
    return words[0] not in ("Z", "X") and int(words[1]) == os.getppid()


def _write_error_file(error: BaseException) -> None:
    """For the summary that torchrun prints."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    told = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {"py_callstack": stack, "timestamp": str(int(time.time()))},
    }
    with contextlib.suppress(OSError):  # the message itself is printed in any case
        Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")
