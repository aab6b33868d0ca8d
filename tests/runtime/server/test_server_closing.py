"""A closed call or server lets go of what it holds, and does not touch what comes after it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from federation_bench import WAIT_S, Site, ended, settings

from fl_runtime.server import Server
from fl_runtime.transport.base import Call
from fl_runtime.transport.memory import MemoryTransport
from fl_runtime.types import Arrays
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

INITIAL: Arrays = {"w": np.zeros(3)}


def models(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "server" / "blobs").glob("model-*"))


def loops() -> int:
    return sum(thread.name == "fl-rounds" for thread in threading.enumerate())


def in_round_two(server: Server) -> tuple[Site, Call]:
    """Return a site that has trained round 1, and a call that still holds the model of that round's task."""
    transport = MemoryTransport(server.service, "site-1")
    site = Site("site-1", transport)
    site.join()
    site.register(INITIAL)
    task = site.start(INITIAL)
    request = pb.NextRequest(session=pb.Session(attempt=site.welcome.attempt))
    open_call = transport.call("Next", request.SerializeToString())
    assert next(iter(open_call))
    site.submit(task, {"w": np.ones(3)})
    assert site.client.next_task().round == 2
    return site, open_call


def test_a_call_that_is_cancelled_lets_go_of_its_model_at_once(tmp_path: Path) -> None:
    server = Server(settings(1), tmp_path, {})
    server.begin()
    site, open_call = in_round_two(server)
    assert models(tmp_path) == ["model-0", "model-1"]
    open_call.cancel()
    assert models(tmp_path) == ["model-1"]
    site.vanish()
    server.close()


def test_a_closed_server_touches_nothing_of_the_one_after_it(tmp_path: Path) -> None:
    """Neither its round loop, which would end the run without sites, nor a call that has outlived it."""
    others = loops()
    first = Server(settings(1, rejoin_s=2.0), tmp_path, {})
    first.begin()
    _, open_call = in_round_two(first)
    first.close()
    assert loops() == others
    second = Server(settings(1, rejoin_s=2.0), tmp_path, {})
    second.begin()
    site = Site("site-1", MemoryTransport(second.service, "site-1"), WAIT_S)
    open_call.cancel()
    final = site.take_part(INITIAL, lambda task: {"w": task.arrays["w"] + task.round})
    ended(second)
    assert final["w"].tolist() == [3.0] * 3
    second.close()
