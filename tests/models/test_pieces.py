"""Work in pieces: each once, by several threads, and nothing left changed."""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from slidevlm.models import pieces
from slidevlm.models.pieces import are_many, are_shared, calmly, share


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def who_shares(count: int) -> list[int]:
    """Threads that took part; each piece waits for another one, so that two are needed."""
    meet, found = threading.Barrier(2, timeout=60), []

    def work(number: int) -> None:
        meet.wait()
        found.append((number, threading.get_ident()))

    share(work, count)
    assert sorted(number for number, _ in found) == list(range(count))
    return [thread for _, thread in found]


@pytest.mark.usefixtures("two_threads")
def test_threads_take_the_next_piece_each() -> None:
    threads = set(who_shares(10))
    assert len(threads) == 2 and threading.get_ident() not in threads


@pytest.mark.parametrize("count", [0, 1, 5])
def test_one_thread_does_all_itself(count: int) -> None:
    found = []
    share(lambda number: found.append((number, threading.get_ident())), count)
    assert found == [(number, threading.get_ident()) for number in range(count)]


@pytest.mark.usefixtures("two_threads")
def test_a_thread_without_a_core_does_fewer() -> None:
    slow: list[int] = []

    def work(number: int) -> None:
        if not slow:
            slow.append(threading.get_ident())
        done.append(threading.get_ident())
        time.sleep(0.2 if threading.get_ident() == slow[0] else 0.001)

    done: list[int] = []
    share(work, 20)
    assert len(done) == 20 and done.count(slow[0]) < 5


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("within", [share, lambda work, count: calmly(lambda: share(work, count))])
def test_an_error_is_raised_and_ends_the_rest(within) -> None:
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise ValueError("of the third")
        time.sleep(0.01)

    for _ in range(2):  # the threads live on
        begun.clear()
        with pytest.raises(ValueError, match="of the third"):
            within(work, 1000)
        time.sleep(0.1)
        assert len(begun) < 20, "by no thread"
    assert len(set(who_shares(4))) == 2


@pytest.mark.usefixtures("two_threads")
def test_calmly_operations_are_one_thread_s_and_pieces_are_not() -> None:
    numbers = torch.zeros(pieces.LEAST)

    def look() -> tuple[int, set[int], int, bool]:
        return torch.get_num_threads(), set(who_shares(6)), threading.get_ident(), shared()

    def shared() -> bool:
        return are_shared(numbers) and not are_shared(numbers[1:])

    threads, those, mine, is_shared = calmly(look)
    assert threads == 1 and is_shared
    assert len(those) == 2 and mine in those, "it takes part"
    assert torch.get_num_threads() == 2 and not are_shared(numbers)
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert others == [2], "threads to come have as many as before"


@pytest.mark.usefixtures("two_threads")
def test_what_is_made_in_inference_mode_can_be_written_to() -> None:
    for inference in (True, False):
        with torch.inference_mode(inference):
            rows = torch.zeros(4, 2)
            weight = torch.ones(2, 2, requires_grad=not inference)
            share(lambda n: torch.mm(rows[n : n + 1] + n, weight, out=rows[n : n + 1]), 4)  # noqa: B023
            assert rows[:, 0].tolist() == [0.0, 2.0, 4.0, 6.0]
            assert calmly(torch.is_inference_mode_enabled) is inference


@pytest.mark.usefixtures("two_threads")
def test_what_is_worth_it() -> None:
    numbers = torch.zeros(pieces.LEAST)
    assert not are_many(numbers), "gradients may be wanted"
    with torch.no_grad():
        assert are_many(numbers) and not are_many(numbers[1:])
        assert not are_many(numbers.to("meta"))
        with torch.autocast("cpu"):
            assert not are_many(numbers)
        torch.set_num_threads(1)
        assert not are_many(numbers)


@pytest.mark.usefixtures("two_threads")
def test_nothing_is_kept_of_a_job() -> None:
    class Thing:
        pass

    for raises in (False, True):
        thing = Thing()
        known = weakref.ref(thing)

        def work(number: int, thing: Thing = thing, raises: bool = raises) -> None:
            if raises:
                raise ValueError

        with contextlib.suppress(ValueError):
            share(work, 6)
        with contextlib.suppress(ValueError):
            calmly(functools.partial(share, work, 6))
        gc.disable()
        try:
            del thing, work
            until = time.monotonic() + 10
            while known() is not None and time.monotonic() < until:
                time.sleep(0.01)  # other threads leave it a moment later
            assert known() is None
        finally:
            gc.enable()


@pytest.mark.usefixtures("two_threads")
def test_without_room_for_a_thread_the_caller_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pieces, "_threads", None)
    monkeypatch.setattr(threading.Thread, "start", start)
    found = []
    share(lambda number: found.append((number, threading.get_ident())), 5)
    assert found == [(number, threading.get_ident()) for number in range(5)]
    assert calmly(threading.get_ident) == threading.get_ident()
    (told,) = (record.getMessage() for record in caplog.records)
    assert "by 1 of 2 threads" in told and "ulimit -u" in told
    assert torch.get_num_threads() == 2


PROGRAM = """
import os, signal, sys, threading, time, torch
from slidevlm.models.pieces import calmly, share
torch.set_num_threads(2)
def names():
    found = []
    share(lambda n: (time.sleep(0.05), found.append(threading.get_ident())), 6)
    return len(set(found))
assert names() == 2
"""


def test_a_forked_process_has_threads_of_its_own() -> None:
    code = (
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(10 + names() + calmly(names))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "14\n", done.stderr


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("within", ["share(work, 100_000)", "calmly(lambda: share(work, 100_000))"])
def test_an_interrupted_caller_goes_on_at_once(within: str) -> None:
    code = (
        "begun, x = [], torch.randn(300, 300)\n"
        "def work(n):\n"
        "    begun.append(n)\n"
        "    for _ in range(20):\n"
        "        x @ x\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
        "try:\n"
        f"    {within}\n"
        "except KeyboardInterrupt:\n"
        "    print(len(begun) < 10_000, flush=True)\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + code], capture_output=True, text=True, timeout=120
    )
    # A thread that is within torch when Python ends takes the process down.
    assert done.returncode == 7 and done.stdout == "True\n", done.stderr
