"""Secure sums against a server that changes what it sends, over mutual TLS, with the kits of three sites."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hostile_server import Hostile, train
from study import Study, readdressed

from fl_adapters.participant.protocols.sum_record import RECORD
from fl_runtime.errors import AbortedError, PermissionDeniedError
from fl_runtime.secure_sum.travelling import ANSWER
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

SITES = ("north", "south", "west")


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, SITES) as study:
        for name in SITES:
            readdressed(study, name)
        yield study


def site_process(kit: Path) -> subprocess.Popen[bytes]:
    program = f"from hostile_server import train; from pathlib import Path; train(Path({str(kit)!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


class Killing(Hostile):
    """A server that kills the first process of north once it has revealed shares of round 1, and then lies to it."""

    def __init__(self, study: Study) -> None:
        super().__init__(study, self._lied)
        self.answers, self.lie = 0, ""
        self.killed = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def handle(self, method: str, peer: Any, requests: Iterator[bytes]) -> Iterator[bytes]:
        if peer.name != "north":
            yield from self._inner.handle(method, peer, requests)
            return
        yield from super().handle(method, peer, self._killing(requests) if method == "Submit" else requests)

    def _killing(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        for message in requests:
            if not frames.is_frame(message) and not self.killed.is_set():
                update = pb.UpdatePart.FromString(message).update
                self.answers += update.encoding.startswith(ANSWER)
                if self.answers == 3:  # after keys and shares
                    assert self.process is not None
                    self.process.send_signal(signal.SIGKILL)
                    self.process.wait(30)
                    self.killed.set()
            yield message

    def _lied(self, method: str, message: bytes) -> bytes:
        if self.lie == "attempt" and method == "Join":
            reply = pb.JoinReply.FromString(message)
            reply.attempt = 1
            return reply.SerializeToString()
        if self.lie == "round" and method == "Next" and not frames.is_frame(message):
            part = pb.TaskPart.FromString(message)
            config = json.loads(part.task.config_json or "{}")
            if config.get("step") == "shares":
                config["keys"].pop("south", None)
                part.task.config_json, part.task.round = json.dumps(config), 1
                return part.SerializeToString()
        return message


def test_a_server_cannot_ask_a_restarted_site_for_another_set_of_survivors(study: Study) -> None:
    """North reveals shares of a sum over three sites and is killed. Its next process takes part in none over two."""
    study.job(rounds=40, secure_sum=True, min_sites=2, rejoin_s=60)
    hostile, kits = Killing(study), {name: readdressed(study, name) for name in SITES}
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(train, kits[name]) for name in SITES[1:]]
        hostile.process = site_process(kits["north"])
        assert hostile.killed.wait(60)
        signed = json.loads((kits["north"] / "jobs" / "job" / RECORD).read_text())
        assert list(signed["signed"]) == ["1"]
        lies = {"attempt": "number 1 has signed sums", "round": "one set of survivors a round"}
        for hostile.lie, refusal in lies.items():
            with pytest.raises(PermissionDeniedError, match=refusal):
                train(kits["north"])
        study.admin().ask("AbortJob", job="job")
        assert all(isinstance(other.exception(60), AbortedError) for other in others)
