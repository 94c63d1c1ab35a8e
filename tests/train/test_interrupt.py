"""A signal is noted; a second Ctrl-C ends at once; afterwards all is as before."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from slidevlm.train.interrupt import Interrupts


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted_and_told(name: str, messages: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(getattr(signal, name))
    with Interrupts() as asked:
        assert asked.name is None
        os.kill(os.getpid(), getattr(signal, name))
        assert asked.name == name
    assert f"{name}: saving after this step" in messages.text
    assert signal.getsignal(getattr(signal, name)) == before


def test_the_second_ctrl_c_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first of its kind
        assert asked.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_another_thread_leaves_signals_alone() -> None:
    found = []

    def work() -> None:
        with Interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
