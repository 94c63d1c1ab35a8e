"""What counts as standing still, and what as work."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from slidevlm import dist
from slidevlm.train import idle
from slidevlm.train.idle import Standstill, Task, works

TASK = Task(state="S", seconds=1.0, faults=2, bytes=300, wakes=4)


def test_nothing_is_no_work() -> None:
    assert not works({1: TASK, 2: TASK}, {1: TASK, 2: TASK}, 40.0)
    # A data loader looks every five seconds whether its workers live.
    awake = replace(TASK, seconds=1.05, wakes=12)
    assert not works({1: TASK}, {1: awake}, 40.0)


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": 1.6},
        {"state": "R"},
        {"state": "t"},
        {"faults": 3},
        {"bytes": 301},
        {"wakes": 100},
    ],
)
def test_each_sign_of_work_counts(change: dict[str, Any]) -> None:
    assert works({1: TASK, 2: TASK}, {1: TASK, 2: replace(TASK, **change)}, 40.0)


def test_a_thread_more_or_less_is_work() -> None:
    assert works({1: TASK}, {1: TASK, 2: TASK}, 40.0)
    assert works({1: TASK, 2: TASK}, {1: TASK}, 40.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(idle.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(idle, "tasks_of_all", lambda: {1: TASK})
    monkeypatch.setattr(dist, "alone", dist.Alone())
    monkeypatch.setattr(dist, "stepping", dist.Region())
    monkeypatch.setattr(idle, "_main_seconds", lambda: 1.0)
    return now


def look(stands: Standstill, clock: list[float], times: int) -> float:
    for _ in range(times):
        clock[0] += 1.0
        found = stands.seconds()
    return found


def test_it_is_counted_within_one_thing_alone(clock: list[float]) -> None:
    stands = Standstill()
    assert look(stands, clock, 5) == 0.0, "not within"
    with dist.alone:
        assert look(stands, clock, 11) == 9.0  # the first look sees it begin, the next what is done
        assert look(stands, clock, 1) == 10.0
    with dist.alone:
        assert look(stands, clock, 1) == 0.0, "another thing"
    assert look(stands, clock, 5) == 0.0, "not within"


def test_it_is_counted_within_one_step_while_no_collective_begins(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stands = Standstill()
    with dist.stepping:
        assert look(stands, clock, 11) == 9.0 and not stands.alone
        monkeypatch.setattr(dist, "collectives", lambda: 7)
        assert look(stands, clock, 1) == 0.0, "another one has begun"
        assert look(stands, clock, 4) == 3.0
        monkeypatch.setattr(idle, "tasks_of_all", lambda: {1: replace(TASK, state="D")})
        assert look(stands, clock, 1) == 0.0, "it waits for a device"
    assert look(stands, clock, 5) == 0.0, "not within"
    with dist.alone:
        assert look(stands, clock, 11) == 9.0 and stands.alone, "storage that hangs is told"


def test_a_main_thread_that_computes_is_not_looked_at_further(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = iter(float(i) for i in range(100))
    monkeypatch.setattr(idle, "_main_seconds", lambda: next(used))
    monkeypatch.setattr(idle, "tasks_of_all", lambda: pytest.fail("looked at"))
    stands = Standstill()
    with dist.stepping:
        assert look(stands, clock, 11) == 0.0


def test_the_main_threads_time_on_the_processor() -> None:
    before = idle._main_seconds()
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert 0.05 < idle._main_seconds() - before < 0.5


def test_a_process_that_was_stopped_begins_anew(clock: list[float]) -> None:
    stands = Standstill()
    with dist.alone:
        look(stands, clock, 5)
        clock[0] += 3600.0
        assert stands.seconds() == 0.0


def test_work_begins_anew(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    stands = Standstill()
    with dist.alone:
        look(stands, clock, 5)
        monkeypatch.setattr(idle, "tasks_of_all", lambda: {1: replace(TASK, bytes=999)})
        assert look(stands, clock, 1) == 0.0
        assert look(stands, clock, 3) == 3.0


def test_each_is_fetched_within() -> None:
    alone = dist.Alone()

    def values() -> Any:
        for value in range(3):
            assert alone.within(alone.mark)
            yield value

    seen = []
    for value in alone.each(values()):
        assert not alone.within(alone.mark)
        seen.append(value)
    assert seen == [0, 1, 2]
    assert not alone.within(alone.mark)


def test_an_error_leaves_it() -> None:
    alone = dist.Alone()
    with pytest.raises(ValueError, match="bad"), alone:
        raise ValueError("bad")
    assert not alone.within(alone.mark)


@pytest.mark.skipif(not idle.is_seen(), reason="threads of Linux")
def test_the_threads_of_this_process_are_seen() -> None:
    task = idle.tasks_of_all()[os.getpid()]
    assert task.seconds > 0
    assert task.bytes > 0


def test_a_thread_of_ours_that_waits_for_a_disk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_task", lambda *_: replace(TASK, state="D"))
    written = threading.Event()
    writer = threading.Thread(target=written.wait, name="checkpoint")
    writer.start()
    try:
        assert idle.tasks_of_all()[writer.native_id or 0].state == "D"
    finally:
        written.set()
        writer.join()


def test_where_names_the_innermost_functions() -> None:
    told = idle.where()
    assert told.startswith(idle.__file__)
    assert f"{__file__}:" in told and "in test_where_names_the_innermost_functions" in told
