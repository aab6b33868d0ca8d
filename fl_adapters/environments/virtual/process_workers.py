"""Worker processes for virtual sites on this machine. Models and updates travel in memory-mapped files."""

from __future__ import annotations

import json
import selectors
import shutil
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fl_adapters.environments.logs import tail
from fl_adapters.environments.processes import describe_status
from fl_adapters.environments.virtual.function import RunInfo
from fl_adapters.environments.virtual.launch import Launcher
from fl_runtime.errors import FederationError, SiteFailedError
from fl_runtime.server.courses.workers import TRIES, Done, Failed, Order
from fl_runtime.store.blobs import Blob, Blobs
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.manifest import Manifest

_CHUNK_BYTES = 2**16


@dataclass
class _WorkerProcess:
    """One worker process.

    Attributes:
        name: Name of the worker.
        line: Socket for its orders and answers.
        ready: Whether it has loaded the function.
        order: The order that it works on, or None.
        blob: Buffer for the update of that order, or None.
        unread: Bytes of an incomplete answer.
    """

    name: str
    line: socket.socket
    ready: bool = False
    order: Order | None = None
    blob: Blob | None = None
    unread: bytes = b""

    @property
    def free(self) -> bool:
        return self.ready and self.order is None


class ProcessWorkers:
    """Worker processes on this machine; implements `fl_runtime.server.courses.workers.Workers`.

    A worker that dies is replaced, and its order is run again.

    Args:
        launcher: Starts and ends the processes.
        names: Names of the workers.
        folder: Folder for the files of updates. `close` deletes it.
        logs: Folder with the workers' output, for error messages.
    """

    def __init__(self, launcher: Launcher, names: Sequence[str], folder: Path, logs: Path) -> None:
        self._launcher, self._folder, self._logs = launcher, folder, logs
        self._blobs = Blobs(folder)
        self._selector = selectors.DefaultSelector()
        self._workers: dict[str, _WorkerProcess] = {}
        self._again: list[Order] = []
        self._deaths: Counter[tuple[str, int]] = Counter()
        self._held: dict[int, Blob] = {}
        self._info: RunInfo | None = None
        self._manifest = Manifest(())
        self._model = ""
        try:
            for name in names:
                self._start(name)
        except BaseException:
            self.close()
            raise

    def initial(self) -> Arrays:
        """Initial weights as the function's module returns them in a worker. Raises the worker's error."""
        path = self._folder / "initial.safetensors"
        first = next(iter(self._workers.values()))
        self._say(first, {"initial": str(path)})
        while not any("written" in answer for answer in self._first_answers(first)):
            pass
        return read_tensors(path)

    def begin(self, info: RunInfo, manifest: Manifest) -> None:
        """Tell all workers about the run, before the first order, and wait until they are ready.

        Raises the error of a worker that cannot load the function or died.
        """
        self._info, self._manifest = info, manifest
        for each in self._workers.values():
            while not each.ready:
                self._first_answers(each)
            self._say(each, {"run": asdict(info)})

    def _first_answers(self, each: _WorkerProcess) -> list[dict[str, Any]]:
        """Wait for answers before round 1, when a worker that dies is not replaced."""
        try:
            answers = self._answers(each)
        except ConnectionError:
            raise self._died(each, "before round 1") from None
        for answer in answers:
            each.ready |= "ready" in answer
            if "failed" in answer:
                raise FederationError.from_wire(answer["failed"])
        return answers

    @property
    def room(self) -> int:
        return max(sum(each.free for each in self._workers.values()) - len(self._again), 0)

    def publish(self, file: Path, payload: Array) -> None:
        self._model = str(file)

    def give(self, order: Order) -> None:
        free = next(each for each in self._workers.values() if each.free)
        free.order = order
        free.blob = self._blobs.create(f"{order.site}-{free.name}", self._manifest)
        files = {"model": self._model, "update": str(self._blobs.path(free.blob)), "nbytes": self._manifest.nbytes}
        self._say(free, {**order.to_json(), **files})

    def wait(self, timeout_s: float) -> list[Done | Failed]:
        outcomes: list[Done | Failed] = []
        for key, _ in self._selector.select(timeout_s):
            each: _WorkerProcess = key.data
            try:
                for answer in self._answers(each):
                    outcomes += self._outcome(each, answer)
            except ConnectionError:
                outcomes += self._replaced(each)
        while self._again and any(each.free for each in self._workers.values()):
            self.give(self._again.pop())
        return outcomes

    def release(self, done: Done) -> None:
        self._blobs.free(self._held.pop(id(done)))

    def drop(self) -> None:
        self._again.clear()
        for each in list(self._workers.values()):
            if each.order is not None:
                self._launcher.kill(each.name)
                self._launcher.status(each.name)
                self._restart(each)

    def close(self) -> None:
        """End all workers and delete the files of their updates."""
        self._launcher.close()  # first, whatever state an interrupt has left
        self._selector.close()
        for each in self._workers.values():
            each.line.close()
        self._workers.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._launcher.start(name, theirs, [ours, *(each.line for each in self._workers.values())])
        self._workers[name] = _WorkerProcess(name, ours)
        self._selector.register(ours, selectors.EVENT_READ, self._workers[name])
        if self._info is not None:
            self._say(self._workers[name], {"run": asdict(self._info)})

    def _restart(self, each: _WorkerProcess) -> None:
        self._selector.unregister(each.line)
        each.line.close()
        if each.blob is not None:
            self._blobs.free(each.blob)
        self._start(each.name)

    def _say(self, each: _WorkerProcess, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # `_answers` reports a dead worker
            each.line.sendall(json.dumps(message).encode() + b"\n")

    def _answers(self, each: _WorkerProcess) -> list[dict[str, Any]]:
        """Wait for bytes and return the complete answers among them. Raises ConnectionError if the worker has ended."""
        data = each.line.recv(_CHUNK_BYTES)
        if not data:
            raise ConnectionError
        *lines, each.unread = (each.unread + data).split(b"\n")
        answers = [json.loads(line) for line in lines]
        for answer in answers:
            if "broken" in answer:  # it cannot load the function, and neither can others
                raise FederationError.from_wire(answer["broken"])
        return answers

    def _outcome(self, each: _WorkerProcess, answer: dict[str, Any]) -> list[Done | Failed]:
        if "ready" in answer:
            each.ready = True
            return []
        order, blob = each.order, each.blob
        assert order is not None and blob is not None
        each.order = each.blob = None
        if "failed" in answer:
            self._blobs.free(blob)
            return [Failed(order, FederationError.from_wire(answer["failed"]))]
        done = Done.of(order, blob.buffer, answer)
        self._held[id(done)] = blob
        return [done]

    def _replaced(self, each: _WorkerProcess) -> list[Done | Failed]:
        """Replace a worker that has ended. Its order runs again, unless it has ended several workers already."""
        order = each.order
        key = (order.site, order.round) if order else ("", 0)
        self._deaths[key] += 1
        last = self._deaths[key] == TRIES
        when = f"at {order.site} in round {order.round}" if order else "between orders"
        error = self._died(each, f"{when}, {TRIES} times" if last else when)
        if last and order is None:
            raise error
        with open(self._logs / f"{each.name}.txt", "a", encoding="utf-8") as log:
            print(f"fl-adapters: {error.what}; a new process takes its place", file=log)
        self._restart(each)
        if order is not None and last:
            return [Failed(order, error)]
        self._again += [order] if order else []
        return []

    def _died(self, each: _WorkerProcess, when: str) -> SiteFailedError:
        status = describe_status(self._launcher.status(each.name))
        log = self._logs / f"{each.name}.txt"
        lines = [f"{log} ends with", *(f"    | {line}" for line in tail(log, 8))]
        return SiteFailedError(
            f"a worker process died {when}: {status}",
            where="\n".join(lines),
            fix="check the function for what ends its process; use fewer workers if memory runs out",
        )
