"""Large updates of many sites at one server: they take turns, and a line that stands still delays nobody else."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from federation_bench import WAIT_S, Bench, Site, ended, serving, started
from tcp_proxy import TcpProxy

from fl_runtime.client.pace import FramePace
from fl_runtime.transport.turns import LEAST_MEMORY_MIB, TransferMemory
from fl_runtime.types import Arrays, Task
from fl_runtime.wire import frames

SITES = 8
MIB = 6
WEIGHTS = {"w": np.arange(MIB * 2**18, dtype=np.float32) % 1_000}


def changed(task: Task, site: Site) -> Arrays:
    """A site's local training: add a number that depends on the site to every value."""
    return {name: array + np.float32(int(site.name.rpartition("-")[2])) for name, array in task.arrays.items()}


def sent_by(site: Site, task: Task) -> threading.Event:
    """Submit an update in a thread of its own; the event is set when the server has taken it."""
    taken = threading.Event()

    def work() -> None:
        assert site.submit(task, changed(task, site)) == "used"
        taken.set()

    threading.Thread(target=work, daemon=True).start()
    return taken


def test_as_many_lines_that_stand_still_as_there_are_turns_delay_no_other_upload(tmp_path: Path) -> None:
    turns = TransferMemory.of(LEAST_MEMORY_MIB, SITES).turns
    assert turns == 2  # all of them stand still below
    with serving(tmp_path, SITES, rounds=1, memory_mib=LEAST_MEMORY_MIB) as bench, ExitStack() as proxies:
        ways = {name: proxies.enter_context(TcpProxy(bench.address)) for name in bench.names[:turns]}
        sites = [bench.site(name, address=ways[name].address if name in ways else "") for name in bench.names]
        tasks = started(sites, WEIGHTS)
        stalled = []
        for site in sites[:turns]:
            proxy = ways[site.name]
            before = proxy.counted()[0]
            proxy.stop_after("up", 2**21)
            stalled.append(sent_by(site, tasks[site.name]))
            proxy.wait_for("up", before + 2**21)
        others = [sent_by(site, tasks[site.name]) for site in sites[turns:]]
        assert all(taken.wait(WAIT_S) for taken in others)
        assert not any(taken.is_set() for taken in stalled)
        for proxy in ways.values():
            proxy.go_on()
        assert all(taken.wait(WAIT_S) for taken in stalled)
        final = sites[0].client.next_task()
        mean = np.float32(sum(range(1, SITES + 1)) / SITES)
        np.testing.assert_allclose(final.arrays["w"], WEIGHTS["w"] + mean, rtol=1e-6)


def test_updates_that_take_turns_make_the_same_bits_as_without(tmp_path: Path) -> None:
    finals = []
    for sockets, memory_mib in ((False, 256), (True, LEAST_MEMORY_MIB)):
        folder = tmp_path / str(sockets)
        with serving(folder, 5, rounds=2, sockets=sockets, memory_mib=memory_mib) as bench:
            finals.append(bench.run(lambda name, bench=bench: taken_part(bench, name)))
            ended(bench.server)
    for name, final in finals[0].items():
        assert final["w"].tobytes() == finals[1][name]["w"].tobytes()


def taken_part(bench: Bench, name: str) -> Arrays:
    site = bench.site(name)
    return site.take_part(WEIGHTS, lambda task: changed(task, site), num_examples=3)


class LineClock:
    """A `Clock` that a line moves on by the time that it needs for what it carries."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None: ...

    def wait(self, condition: threading.Condition, timeout_s: float) -> None: ...


@pytest.mark.parametrize(("bytes_a_s", "settles_at"), [(2**30, frames.FRAME_BYTES), (2**18, 2**16), (2**10, 2**16)])
def test_frames_of_an_upload_become_as_short_as_its_line_is_slow(bytes_a_s: int, settles_at: int) -> None:
    clock, lengths = LineClock(), []
    pace, payload = FramePace(frames.FRAME_BYTES, clock), bytes(2**25)
    for message in pace.sent(frames.frames([memoryview(payload)], 0, pace.frame_bytes)):
        lengths.append(len(frames.frame_data(message)))
        clock.now_s += len(message) / bytes_a_s
    assert sum(lengths) == len(payload)
    assert lengths[-2] == settles_at
