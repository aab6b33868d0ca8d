"""Ctrl-C while a process is started: the start is finished first, so that no process is forgotten."""

from __future__ import annotations

import signal
import threading

import pytest

from fl_adapters.environments.processes.interrupts import interrupts_held


def test_an_interrupt_is_delivered_at_the_end_of_the_block() -> None:
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append("started")
    assert done == ["started"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_of_the_block_comes_first_and_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="no room"), interrupts_held():
        raise OSError("no room")
    assert signal.getsignal(signal.SIGINT) is before
    seen: list[bool] = []

    def elsewhere() -> None:
        with interrupts_held():
            seen.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    assert seen == [True]
