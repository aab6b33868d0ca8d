"""Connections that break or damage their content, made by a TCP proxy between a site and the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from federation_bench import WAIT_S, Bench, Site, serving, started, together
from moved_clock import MovedClock
from tcp_proxy import Direction, TcpProxy

from fl_runtime.client.calls import PatientCalls
from fl_runtime.errors import ConnectionLostError, TransferDamagedError
from fl_runtime.transport.base import Call
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.types import Arrays, Report
from fl_runtime.wire.frames import FRAME_BYTES

MIB = 2**20
PAYLOAD = 24 * MIB
IN_FLIGHT = FRAME_BYTES + 13 * MIB
"""Bytes that may have passed the proxy beyond the last whole frame: HTTP/2's window and the sockets' buffers."""


def weights(seed: int) -> Arrays:
    return {"w": np.random.default_rng(seed).normal(size=PAYLOAD // 8), "b": np.array(seed)}


def many(seed: int) -> Arrays:
    """Return 24 tensors with this many bytes in all."""
    rows = np.random.default_rng(seed).normal(size=(24, PAYLOAD // 8 // 24))
    return {"w": rows[0], **{f"w{number}": row for number, row in enumerate(rows[1:])}, "b": np.array(seed)}


def one_round(
    bench: Bench,
    proxy: TcpProxy,
    plan: Callable[[str], None],
    seed: int = 1,
    weights: Callable[[int], Arrays] = weights,
) -> tuple[Site, Arrays, tuple[int, int], tuple[int, int]]:
    """Run a round of one site through the proxy; plan(direction) is called before its download and its upload.

    Returns:
        The site, its final weights, and the bytes (up, down) of the download and of the upload.
    """
    site = bench.site("site-1", address=proxy.address)
    site.join()
    site.register(weights(0))
    site.submit(site.client.next_task(), weights(0))
    before = proxy.counted()
    plan("down")
    task = site.client.next_task()
    assert task.arrays["w"].tobytes() == weights(0)["w"].tobytes()
    between = proxy.counted()
    plan("up")
    site.submit(task, weights(seed), num_examples=5)
    after = proxy.counted()
    final = {name: np.copy(array) for name, array in site.client.next_task().arrays.items()}
    return site, final, _difference(before, between), _difference(between, after)


def _difference(before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int]:
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_broken_transfer_resumes_where_it_stopped(tmp_path: Path, direction: Direction) -> None:
    with serving(tmp_path, 1, rounds=1) as bench, TcpProxy(bench.address) as proxy:

        def plan(now: str) -> None:
            if now == direction:
                proxy.cut_after(direction, PAYLOAD * 3 // 4)

        _, final, download, upload = one_round(bench, proxy, plan)
        assert final["w"].tobytes() == weights(1)["w"].tobytes()
        assert int(final["b"]) == 1
        assert proxy.connections >= 2
        sent = upload[0] if direction == "up" else download[1]
        assert PAYLOAD < sent < PAYLOAD * 1.02 + IN_FLIGHT


def test_a_connection_that_breaks_every_few_mib_gets_there_all_the_same(tmp_path: Path) -> None:
    with serving(tmp_path, 1, rounds=1) as bench, TcpProxy(bench.address) as proxy:
        cuts = 3

        def plan(now: str) -> None:
            for number in range(1, cuts + 1):
                proxy.cut_after("up" if now == "up" else "down", number * 8 * MIB)

        _, final, download, upload = one_round(bench, proxy, plan)
        assert final["w"].tobytes() == weights(1)["w"].tobytes()
        assert proxy.connections >= 2 * cuts
        assert download[1] < PAYLOAD * 1.02 + cuts * IN_FLIGHT
        assert upload[0] < PAYLOAD * 1.02 + cuts * IN_FLIGHT


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_damaged_byte_is_noticed_and_sent_again(tmp_path: Path, direction: Direction) -> None:
    with serving(tmp_path, 1, rounds=1) as bench, TcpProxy(bench.address) as proxy:

        def plan(now: str) -> None:
            if now == direction:
                proxy.damage_after(direction, PAYLOAD // 2)

        _, final, download, upload = one_round(bench, proxy, plan)
        assert final["w"].tobytes() == weights(1)["w"].tobytes()
        sent = upload[0] if direction == "up" else download[1]
        assert sent > PAYLOAD  # some or all of it again
    used = [e for e in bench.watch.all("update") if e.data["status"] == "used"]
    assert len(used) == 1


@pytest.mark.parametrize("direction", ["up", "down"])
def test_after_damage_a_transfer_goes_on_behind_the_last_tensor_that_was_right(
    tmp_path: Path, direction: Direction
) -> None:
    """So a transfer arrives after any number of damages, as long as each attempt makes progress."""
    damages = 6
    with serving(tmp_path, 1, rounds=1) as bench, TcpProxy(bench.address) as proxy:

        def plan(now: str) -> None:
            if now == direction:
                proxy.damage_each(direction, 3 * MIB, damages)

        _, final, download, upload = one_round(bench, proxy, plan, weights=many)
        assert {name: array.tobytes() for name, array in final.items()} == {
            name: array.tobytes() for name, array in many(1).items()
        }
        assert proxy.fired == damages
        sent = upload[0] if direction == "up" else download[1]
        assert PAYLOAD < sent < PAYLOAD * 1.02 + proxy.fired * (MIB + IN_FLIGHT)
    assert len([e for e in bench.watch.all("update") if e.data["status"] == "used"]) == 1


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("place", [10, 40, 100, 200, 300, 450, 600, 900, 1300])
def test_a_damaged_byte_of_a_small_run_changes_nothing(tmp_path: Path, direction: Direction, place: int) -> None:
    """Most of its bytes are headers, which no tensor's digest covers: who calls, for what, with what weight."""

    def site(name: str) -> Arrays:
        address = proxy.address if name == "site-1" else ""
        index = int(name[-1])
        return bench.site(name, address=address, patience_s=5.0).take_part(
            {"w": np.zeros(8)}, lambda task: {"w": task.arrays["w"] + index}, num_examples=index
        )

    with serving(tmp_path, 2, rounds=3) as bench, TcpProxy(bench.address) as proxy:
        proxy.damage_after(direction, place, flip=0x04)
        finals = bench.run(site)
    for final in finals.values():
        np.testing.assert_allclose(final["w"], np.full(8, 3 * (1 * 1 + 2 * 2) / 3), rtol=1e-12)
    assert all(result.sites == bench.names for result in bench.server.result().rounds)


@pytest.mark.parametrize("method", ["Join", "Register", "Next", "Submit", "Score", "Leave"])
def test_a_message_that_is_lost_whole_is_taken_for_damage(tmp_path: Path, method: str) -> None:
    """A site sends a lost message again, while a protocol error would make it leave.

    HTTP/2 ignores a frame of unknown type, and one wrong bit can make any frame such.
    """
    with serving(tmp_path, 1, rounds=1) as bench:
        transport = GrpcTransport(bench.address, "secret of site-1")
        with pytest.raises(TransferDamagedError, match="ended before its"):
            list(transport.call(method, iter(())))
        transport.close()


class _Losing:
    """A transport that loses the first reply of a call for a task: the `lost`-th one after it was armed."""

    def __init__(self, inner: GrpcTransport, lost: int) -> None:
        self._inner, self._left, self.armed = inner, lost, False

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Call:
        call = self._inner.call(method, requests)
        if self.armed and method == "Next":
            self._left -= 1
            if self._left == 0:
                next(call)
        return call

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_header_that_is_lost_before_its_frames_is_sent_again(tmp_path: Path, resumed: bool) -> None:
    """In the first attempt at a download, and in one that resumes a broken one."""
    with serving(tmp_path, 1, rounds=1) as bench, TcpProxy(bench.address) as proxy:
        transport = _Losing(GrpcTransport(proxy.address, "secret of site-1"), 2 if resumed else 1)
        site = Site("site-1", transport, WAIT_S)
        bench.made.append(site)
        site.join()
        site.register(weights(0))
        site.submit(site.client.next_task(), weights(0))
        transport.armed = True
        if resumed:
            proxy.cut_after("down", PAYLOAD // 2)
        task = site.client.next_task()
        assert task.arrays["w"].tobytes() == weights(0)["w"].tobytes()
        site.submit(task, weights(1))


def a_waiting_site_survives(folder: Path, trouble: Callable[[TcpProxy], None], patience_s: float = WAIT_S) -> None:
    """Check that site-2 survives this trouble with its connection while it waits for site-1's update."""
    initial: Arrays = {"w": np.zeros(3)}
    with serving(folder, 2, rounds=1) as bench, TcpProxy(bench.address) as proxy:
        one, two = bench.site("site-1"), bench.site("site-2", address=proxy.address, patience_s=patience_s)
        tasks = started([one, two], initial)
        two.submit(tasks["site-2"], {"w": np.ones(3)})

        def meanwhile() -> None:
            trouble(proxy)
            one.submit(tasks["site-1"], {"w": np.ones(3)})

        final, _ = together(two.client.next_task, meanwhile)
        assert (final.kind, final.arrays["w"].tolist()) == ("final", [1.0] * 3)
        assert not bench.watch.all("left")


def test_waiting_sites_survive_a_broken_connection(tmp_path: Path) -> None:
    a_waiting_site_survives(tmp_path, TcpProxy.cut)


def test_a_connection_that_stands_and_carries_nothing_is_made_again(tmp_path: Path) -> None:
    a_waiting_site_survives(tmp_path, TcpProxy.deafen, patience_s=2.0)


def test_a_silent_connection_after_a_broken_one_is_made_again_too(tmp_path: Path) -> None:
    """The silence alone takes all of the patience that started with the break."""

    def trouble(proxy: TcpProxy) -> None:
        before, proxy.deaf_next = proxy.connections, 1
        proxy.cut()
        proxy.wait_connected(before + 2)  # the deaf one, and one that works

    a_waiting_site_survives(tmp_path, trouble, patience_s=2.0)


@pytest.mark.parametrize("call", ["register", "next_task", "report"])
def test_a_site_that_waits_for_the_others_is_not_impatient(tmp_path: Path, call: str) -> None:
    """The server reports meanwhile that it is there."""
    initial: Arrays = {"w": np.zeros(3)}
    with serving(tmp_path, 2, rounds=1) as bench:
        one, two = bench.site("site-1", patience_s=0.4), bench.site("site-2")
        if call == "register":
            one.join()
            two.join()
            waits, ends = (lambda: one.register(initial)), (lambda: two.register(initial))
        else:
            tasks = started([one, two], initial, evaluates=True)
            scores = [Report("test", 0, name, {"loss": 1.0}, 1) for name in bench.names]
            if call == "report":
                waits, ends = (lambda: one.client.report(scores[0], wait=True)), (lambda: two.client.report(scores[1]))
            else:
                one.submit(tasks["site-1"], initial)
                waits, ends = one.client.next_task, (lambda: two.submit(tasks["site-2"], initial))
        hurry = threading.Event()
        began = time.monotonic()
        together(waits, lambda: (hurry.wait(1.5), ends()))
        assert time.monotonic() - began >= 1.5
        assert not bench.watch.all("left")


def test_a_transfer_that_is_damaged_every_time_is_given_up(tmp_path: Path) -> None:
    """Otherwise a broken disk or network card would make a site load the same model for ever."""
    with serving(tmp_path, 1, rounds=1) as bench, TcpProxy(bench.address) as proxy:
        site = bench.site("site-1", address=proxy.address)
        site.join()
        site.register(weights(0))
        site.submit(site.client.next_task(), weights(0))
        for number in range(40):
            proxy.damage_after("down", MIB + number * PAYLOAD // 3)
        with pytest.raises(ConnectionLostError):
            site.client.next_task()


def test_a_break_during_the_handshake_is_survived(tmp_path: Path) -> None:
    with serving(tmp_path, 2, rounds=1) as bench, TcpProxy(bench.address) as proxy:
        one, two = bench.site("site-1", address=proxy.address), bench.site("site-2")
        one.join()
        two.join()

        def second() -> int:
            bench.watch.wait("registered", "site-1")
            proxy.cut()
            return two.register({"w": np.zeros(1)})

        assert together(lambda: one.register({"w": np.zeros(1)}), second) == [1, 1]


@pytest.mark.parametrize("call", ["join", "next_task", "submit", "large submit", "report"])
def test_a_server_that_is_gone_for_good_is_given_up_after_the_patience(tmp_path: Path, call: str) -> None:
    initial: Arrays = {"w": np.zeros(3 * MIB // 8 if call == "large submit" else 3)}
    with serving(tmp_path, 1, rounds=1) as bench, TcpProxy(bench.address) as proxy:
        site = bench.site("site-1", address=proxy.address, patience_s=0.4)
        site.join()
        site.register(initial)
        task = site.start(initial)
        proxy.refuses = True
        proxy.cut()
        calls: dict[str, Callable[[], object]] = {
            "join": site.join,
            "next_task": site.client.next_task,
            "submit": lambda: site.submit(task, initial),
            "large submit": lambda: site.submit(task, initial),
            "report": lambda: site.client.report(Report("test", 0, "site-1", {"loss": 1.0}, 1)),
        }
        began = time.monotonic()
        with pytest.raises(ConnectionLostError, match=r"gave up after 0\.4 s") as caught:
            calls[call]()
        assert time.monotonic() - began >= 0.4
        assert caught.value.fix


def test_a_server_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with serving(tmp_path, 1) as bench, TcpProxy(bench.address) as proxy:
        pass  # the proxy's port is free again
    site = Site("site-1", GrpcTransport(proxy.address, "token"), patience_s=0.2)
    with pytest.raises(ConnectionLostError, match=proxy.address):
        site.join()
    site.vanish()


def test_memory_does_not_grow_with_repeated_breaks_of_one_upload(tmp_path: Path) -> None:
    """A broken upload is kept once, and its file is used again."""
    with serving(tmp_path, 1, rounds=1) as bench, TcpProxy(bench.address) as proxy:
        site = bench.site("site-1", address=proxy.address)
        site.join()
        site.register(weights(0))
        site.submit(site.client.next_task(), weights(0))
        task = site.client.next_task()
        for number in (1, 2, 3):
            proxy.cut_after("up", number * 6 * MIB)
        site.submit(task, weights(1))
        site.client.next_task()
        files = list((tmp_path / "server" / "blobs").iterdir())
        assert len(files) <= 4


def test_a_site_waits_hours_for_its_server_and_says_so_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    clock, tries = MovedClock(), [0]

    def attempt() -> str:
        tries[0] += 1
        if tries[0] == 100:  # after two hours
            return "an answer"
        clock.pass_by(7200 / 99 if tries[0] > 0 else 3600)
        raise ConnectionLostError("connection refused")

    calls = PatientCalls(GrpcTransport("127.0.0.1:1", "token"), 86_400.0, clock)
    assert calls.repeat(attempt) == "an answer"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == [
        "connection refused; waiting up to 24 h",
        "the server has not answered for 73 s; waiting up to 24 h (connection refused)",
    ]
    assert lines[-2:] == [
        "the server has not answered for 1 h 4 min; waiting up to 24 h (connection refused)",
        "the server answers again, after 1 h 59 min",
    ]
    assert len(lines) == 9  # at once, after 1, 2, 4, 8, 16, 32 and 64 minutes
    tries[0] = -(10**9)
    with pytest.raises(ConnectionLostError, match="gave up after 24 h"):
        calls.repeat(attempt)
    calls.close()
