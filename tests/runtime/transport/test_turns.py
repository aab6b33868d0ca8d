"""Turns at a server: in the order in which transfers asked, fair in bytes, and taken from those that fall behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from federation_bench import WAIT_S
from hypothesis import given
from hypothesis import strategies as st
from moved_clock import MovedClock

from fl_runtime.transport.turns import (
    PACE_BYTES,
    PACE_S,
    SMALL_BYTES,
    TURN_BYTES,
    TransferMemory,
    Turn,
    Turns,
)

LARGE = 10 * TURN_BYTES


def goes_on(turn: Turn) -> bool:
    """Whether a transfer may go on at this moment."""
    return turn.wait(0.0)


def in_thread(wait: Callable[[], object]) -> threading.Event:
    """Call a function in a thread of its own; the event is set when it has returned."""
    returned = threading.Event()

    def work() -> None:
        wait()
        returned.set()

    threading.Thread(target=work, daemon=True).start()
    return returned


def test_turns_come_in_the_order_in_which_they_were_asked_for() -> None:
    turns = Turns(2, MovedClock())
    asked = [turns.ask(LARGE) for _ in range(5)]
    assert [turn.held for turn in asked] == [True, True, False, False, False]
    asked[1].end()
    assert [turn.held for turn in asked] == [True, False, True, False, False]
    asked[3].end()  # it hangs up while it waits
    asked[0].end()
    assert [turn.held for turn in asked] == [False, False, True, False, True]


def test_a_waiting_thread_goes_on_as_soon_as_a_turn_is_free() -> None:
    turns = Turns(1, MovedClock())
    first, second = turns.ask(LARGE), turns.ask(LARGE)
    returned = in_thread(lambda: second.wait(WAIT_S))
    assert not returned.wait(0.05)
    first.end()
    assert returned.wait(WAIT_S) and second.held


def test_a_thread_that_waits_gives_signs_of_life() -> None:
    clock = MovedClock()
    turns = Turns(1, clock)
    first, second = turns.ask(LARGE), turns.ask(LARGE)
    first.moved(0)
    beats = second.beats(0.0, b"beat")
    assert [next(beats), next(beats)] == [b"beat", b"beat"]
    first.end()
    assert list(beats) == []


def test_a_caller_that_hangs_up_does_not_wait_on() -> None:
    turns = Turns(1, MovedClock())
    _, second = turns.ask(LARGE), turns.ask(LARGE)
    returned = in_thread(lambda: second.wait(WAIT_S))
    second.end()
    assert returned.wait(WAIT_S) and not second.held


def test_small_payloads_wait_for_nobody() -> None:
    turns = Turns(1, MovedClock())
    turns.ask(LARGE)
    assert goes_on(turns.ask(SMALL_BYTES)) and not goes_on(turns.ask(SMALL_BYTES + 1))


def test_a_large_transfer_goes_to_the_end_of_the_queue_after_so_many_bytes() -> None:
    clock = MovedClock()
    turns = Turns(1, clock)
    large = turns.ask(LARGE)
    large.moved(TURN_BYTES)
    assert large.held  # nobody waits
    small = turns.ask(2 * SMALL_BYTES)
    assert not goes_on(small)
    large.moved(1)
    assert small.held and not goes_on(large)
    small.end()
    assert large.held


def test_one_that_stands_still_loses_its_turn_to_the_first_that_waits() -> None:
    clock = MovedClock()
    turns = Turns(1, clock)
    stalled, waiting, last = turns.ask(LARGE), turns.ask(LARGE), turns.ask(LARGE)
    returned = in_thread(lambda: waiting.wait(WAIT_S))
    clock.pass_by(PACE_S)
    assert returned.wait(WAIT_S) and waiting.held
    assert goes_on(stalled) and not stalled.held  # it goes on without a turn, and does not wait
    assert not goes_on(last)


def test_one_that_stands_still_keeps_its_turn_while_nobody_waits() -> None:
    clock = MovedClock()
    turns = Turns(1, clock)
    stalled = turns.ask(LARGE)
    clock.pass_by(100 * PACE_S)
    assert stalled.held


def test_a_fast_transfer_keeps_its_turn_while_others_wait() -> None:
    clock = MovedClock()
    turns = Turns(1, clock)
    fast, waiting = turns.ask(LARGE), turns.ask(LARGE)
    for _ in range(TURN_BYTES // PACE_BYTES - 1):
        clock.pass_by(0.9 * PACE_S)
        fast.moved(PACE_BYTES)
        assert not goes_on(waiting)
    assert fast.held


def test_one_that_has_lost_its_turn_waits_again_once_it_is_fast() -> None:
    clock = MovedClock()
    turns = Turns(1, clock)
    stalled, fast = turns.ask(LARGE), turns.ask(LARGE)
    clock.pass_by(PACE_S)
    assert goes_on(fast) and not stalled.held
    for _ in range(10):  # slow: it needs no turn
        clock.pass_by(1.1 * PACE_S)
        fast.moved(PACE_BYTES)
        stalled.moved(PACE_BYTES)
        assert goes_on(stalled)
    clock.pass_by(0.5 * PACE_S)
    fast.moved(PACE_BYTES)
    stalled.moved(PACE_BYTES)
    assert not goes_on(stalled)
    fast.end()
    assert stalled.held


def test_slow_lines_hold_nobody_back() -> None:
    clock = MovedClock()
    turns = Turns(2, clock)
    slow = [turns.ask(LARGE) for _ in range(6)]
    fast = turns.ask(LARGE)
    for _ in range(3):
        clock.pass_by(PACE_S)
        fast.wait(0.0)
    assert all(map(goes_on, slow)) and fast.held


@given(st.integers(1, 4), st.lists(st.integers(0, 30), max_size=60))
def test_there_are_never_more_turns_than_allowed_and_none_is_left_unused(count: int, ends: list[int]) -> None:
    turns, asked = Turns(count, MovedClock()), []
    granted: list[int] = []
    for end in ends:
        asked.append(turns.ask(LARGE))
        granted += [n for n, turn in enumerate(asked) if turn.held and n not in granted]
        assert sum(turn.held for turn in asked) <= count
        if end < len(asked):
            asked[end].end()
            granted += [n for n, turn in enumerate(asked) if turn.held and n not in granted]
        waiting = [turn for turn in asked if not goes_on(turn)]
        assert not waiting or sum(turn.held for turn in asked) == count
    assert granted == sorted(granted)


@pytest.mark.parametrize("memory_mib", [128, 256, 1024])
@pytest.mark.parametrize("sites", [1, 8, 32, 64, 100])
def test_windows_of_all_sites_and_turns_share_the_budget(memory_mib: int, sites: int) -> None:
    memory, budget = TransferMemory.of(memory_mib, sites), (memory_mib - 96) * 2**20
    assert memory.turns * 2**23 <= budget // 2 and memory.turns >= 2
    assert sites * memory.window_bytes <= max(budget // 2, sites * 80 * 2**10)
    assert 80 * 2**10 <= memory.window_bytes <= 7 * 2**20
