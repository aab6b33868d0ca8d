"""Records what a site and its server of this version say to each other, over real sockets, for later ones to replay.

Before a release: `PYTHONPATH=.:tests/_support python tests/_support/record_exchange.py tests/fixtures/VERSION`.
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from federation_bench import Site, settings

from fl_runtime.server import Server
from fl_runtime.transport.base import Transport
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.types import Arrays, Report

MODELS: dict[str, Arrays] = {
    "small": {
        "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "layer.bias": np.zeros(2, np.float16),
        "steps": np.array(0, np.int64),
    },
    "framed": {"w": np.arange(300_000, dtype=np.float32) % 8},
}


class Recorder:
    """A transport that notes all messages of the calls that a site makes one after the other."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.calls: list[dict[str, Any]] = []

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Any:
        if method == "Attend":  # stays open beside the others
            return self._transport.call(method, requests)
        noted: dict[str, Any] = {"method": method, "requests": [], "replies": []}
        self.calls.append(noted)
        sent = iter([requests] if isinstance(requests, bytes) else requests)
        return _Recorded(self._transport.call(method, _noting(sent, noted["requests"])), noted["replies"])

    def close(self) -> None:
        self._transport.close()


class _Recorded:
    def __init__(self, call: Any, replies: list[str]) -> None:
        self._call, self._replies = call, replies

    def __iter__(self) -> _Recorded:
        return self

    def __next__(self) -> bytes:
        message: bytes = next(self._call)
        self._replies.append(base64.b64encode(message).decode())
        return message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


def _noting(messages: Iterator[bytes], into: list[str]) -> Iterator[bytes]:
    for message in messages:
        into.append(base64.b64encode(bytes(message)).decode())
        yield message


def record(model: str, folder: Path) -> list[dict[str, Any]]:
    """Run a job of one site and two rounds, and return the calls."""
    server = Server(settings(1, rounds=2, seed=7), folder, {"site-1": "secret"})
    recorder = Recorder(GrpcTransport(server.start(), "secret"))
    try:
        site, before = Site("site-1", recorder), MODELS[model]
        site.join()
        site.register(before, evaluates=True, every="epoch")
        task = site.start(before)
        while task.kind == "train":
            trained = {name: (array + np.asarray(1, array.dtype)) for name, array in task.arrays.items()}
            site.submit(task, trained, num_examples=10, local_steps=3, metrics={"train_loss": 0.5})
            task = site.client.next_task()
            site.client.report(Report("test", task.version, "site-1", {"loss": 0.25}, 5))
        site.client.leave("all rounds are done", early=False)
        site.client.close()
        assert server.wait(30)
    finally:
        server.close()
    return recorder.calls


def main(out: Path) -> None:
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            document = json.dumps({"calls": record(model, Path(folder))}).encode()
        (out / "exchange").mkdir(parents=True, exist_ok=True)
        (out / "exchange" / f"{model}.json.gz").write_bytes(gzip.compress(document, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
