"""A server that changes what it sends to its sites, and a script that meets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from study import Study

from fl_adapters import connect
from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_runtime.transport.base import Peer
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

W = {"body": np.zeros((4, 3), np.float32), "head": np.ones(3, np.float32)}


class Hostile:
    """A server whose answers are changed on their way to the sites."""

    def __init__(self, study: Study, change: Callable[[str, bytes], bytes]) -> None:
        self._inner, self._change = study.server, change
        study.server._guard._service = self
        self.received: list[pb.UpdateHeader] = []

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        for message in self._inner.handle(method, peer, self._watched(method, requests)):
            yield self._change(method, message)

    def _watched(self, method: str, requests: Iterator[bytes]) -> Iterator[bytes]:
        for message in requests:
            if method == "Submit" and not frames.is_frame(message):
                self.received.append(pb.UpdatePart.FromString(message).update)
            yield message


def train(kit: Path, **options: Any) -> Any:
    try:
        with connect(kit=str(kit), **options) as site:
            for task in site.tasks(initial=W):
                task.submit({name: array + 1 for name, array in task.arrays.items()}, num_examples=1)
        return site.arrays
    finally:
        close_sessions("its script ended before the last round", read_kit(kit))


def changed_task(change: Callable[[pb.TaskHeader], None], kinds: tuple[str, ...] = ("train",)) -> Any:
    def work(method: str, message: bytes) -> bytes:
        part = pb.TaskPart.FromString(message) if method == "Next" and not frames.is_frame(message) else None
        if part is None or part.task.kind not in kinds:
            return message
        change(part.task)
        return part.SerializeToString()

    return work
