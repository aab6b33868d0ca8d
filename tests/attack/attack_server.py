"""A hostile server: it holds the kit of the federation's server, and answers each call as a script says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fl_adapters import connect
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_runtime.errors import ProtocolError
from fl_runtime.transport.base import Peer
from fl_runtime.transport.grpc import GrpcServer
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.trust.audit.lines import COUNTER_FILE, HEAD_FILE, LOG_FILE
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit
from fl_runtime.trust.policy import POLICY_FILE
from fl_runtime.trust.project import Project
from fl_runtime.types import Arrays, RunSettings
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest
from fl_runtime.wire.software import FEATURE_NAMES

MODEL: Arrays = {"body": np.zeros((4, 3), np.float32), "head": np.ones(3, np.float32)}
_WRITTEN = (LOG_FILE, HEAD_FILE, COUNTER_FILE, POLICY_FILE)
SECRET = "SECRET-OF-THE-SITE"


@dataclass(frozen=True)
class Script:
    """What a hostile server answers. A field that is not given is answered as an honest server does.

    Attributes:
        settings: Settings of the job, changed.
        join: Fields of the answer to Join, changed.
        rounds: Number of rounds that the site is told.
        task: Fields of a task to train, changed.
        model: The model of that task.
        raw: Method -> messages to send in place of any answer.
        policy: The policy file of the site.
        task_change: Changes a task before it is sent.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    join: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1
    task: Mapping[str, Any] = field(default_factory=dict)
    model: Arrays | None = None
    raw: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    policy: str = ""
    task_change: Callable[[pb.TaskHeader], object] = lambda task: None


class HostileServer:
    """A server that a site with a valid kit calls, and that turns on it.

    Attributes:
        script: What it answers from now on.
        updates: The updates that sites have sent, but for the initial model.
    """

    def __init__(self, folder: Path) -> None:
        self.script, self.updates = Script(), list[pb.UpdateHeader]()
        self._folder = folder
        self._asked = 0
        authority = Authority.create(folder / "authority", _project("127.0.0.1:8443"))
        write_kit(folder / "server", authority, authority.project.participant("server"))
        self._server = GrpcServer(self, None, 16, 2, FileCredentials(folder / "server"))
        authority.project = _project(self._server.start("127.0.0.1", 0))
        self._kit = folder / "north"
        write_kit(self._kit, authority, authority.project.participant("north"))
        (folder / "secret.txt").write_text(SECRET)

    def close(self) -> None:
        self._server.stop(0)

    def besiege(self, script: Script) -> str:
        """Let an honest site train with this server; return what became of the site."""
        self.script, self._asked = script, 0
        self.updates.clear()
        (self._kit / "policy.yml").write_text(script.policy)
        before = self._files()
        try:
            with connect(kit=str(self._kit)) as site:
                for task in site.tasks(initial=MODEL):
                    task.submit({name: array + 1 for name, array in task.arrays.items()}, num_examples=1)
            got = f"the site has trained, and sent {len(self.updates)} updates"
        finally:
            close_sessions("its script ended before the last round", read_kit(self._kit))
            assert self._files() == before, "the server has changed files of the site"
        return got

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        if method in self.script.raw:
            next(requests, None)
            yield from self.script.raw[method]
            return
        if not hasattr(self, f"_{method.lower()}"):
            raise ProtocolError(f"this server does not answer {method}")
        first = next(requests)
        yield from getattr(self, f"_{method.lower()}")(first, requests)

    def _join(self, first: bytes, requests: Iterator[bytes]) -> Iterator[bytes]:
        settings = RunSettings("job", ("north", "south"), 1, rounds=1)
        fields = {**vars(settings), **self.script.settings}
        answer = {"protocol": 1, "features": FEATURE_NAMES, "attempt": 1, "site": "north", "count": 2}
        yield pb.JoinReply(**{**answer, "settings_json": json.dumps(fields), **self.script.join}).SerializeToString()

    def _register(self, first: bytes, requests: Iterator[bytes]) -> Iterator[bytes]:
        yield pb.RegisterReply(rounds=self.script.rounds).SerializeToString()

    def _attend(self, first: bytes, requests: Iterator[bytes]) -> Iterator[bytes]:
        yield pb.Notice(kind="attending").SerializeToString()
        for _ in requests:
            pass

    def _next(self, first: bytes, requests: Iterator[bytes]) -> Iterator[bytes]:
        self._asked += 1
        if self._asked == 1 and "kind" not in self.script.task:
            yield pb.TaskPart(task=pb.TaskHeader(job="job", kind="initial", config_json="{}")).SerializeToString()
            return
        kind = "train" if self._asked <= 2 else "final"
        model = MODEL if self.script.model is None else self.script.model
        manifest = Manifest.of(model)
        payload = frames.describe(manifest, manifest.digests(model, {}), known=False)
        payload.inline = b"".join(np.ascontiguousarray(model[spec.name]).tobytes() for spec in manifest.tensors)
        fields = {"job": "job", "round": 1, "kind": kind, "config_json": "{}", "payload": payload, **self.script.task}
        task = pb.TaskHeader(**fields)
        self.script.task_change(task)
        yield pb.TaskPart(task=task).SerializeToString()

    def _submit(self, first: bytes, requests: Iterator[bytes]) -> Iterator[bytes]:
        header = pb.UpdatePart.FromString(first).update
        if header.round:
            self.updates.append(header)
        yield pb.SubmitReply(accepted=pb.Accepted(status="used")).SerializeToString()

    def _score(self, first: bytes, requests: Iterator[bytes]) -> Iterator[bytes]:
        yield pb.ScoreReply().SerializeToString()

    def _leave(self, first: bytes, requests: Iterator[bytes]) -> Iterator[bytes]:
        yield pb.Done().SerializeToString()

    def _files(self) -> dict[str, bytes]:
        """The files of the site, but for those that it writes itself."""
        return {
            str(path): path.read_bytes()
            for path in self._folder.rglob("*")
            if path.is_file() and path.name not in _WRITTEN and self._kit / "jobs" / "job" not in path.parents
        }


def _project(address: str) -> Project:
    server = {"address": address, "listen": address}
    sites = [{"name": name, "organisation": "hospital"} for name in ("north", "south")]
    return Project.model_validate({"federation": "study", "server": server, "sites": sites})
