"""A server in its own process, which a test may kill and start again on the same folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from federation_bench import WAIT_S, Site, settings

import fl_runtime
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.types import Arrays, RunSettings

SERVER = """
import json, sys
from pathlib import Path
from fl_runtime.server import Server
from fl_runtime.types import RunSettings

folder, port, fields = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
run = RunSettings(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
server = Server(run, folder, {name: "secret of " + name for name in run.sites}, port=port, record=True)
print(server.start(), flush=True)
server.wait()
error = server.result().error
for number in range(1, server.training_count + 1):
    server.export(folder / ("model" if number == 1 else f"model-{number}"), training=number)
server.close()
sys.exit(str(error) if error else 0)
"""


class ServerProcess:
    """A server in its own process that always listens on the same port."""

    def __init__(self, folder: Path, run: RunSettings) -> None:
        self.folder, self._run = folder, run
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        root = str(Path(fl_runtime.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.folder), port, json.dumps(asdict(self._run))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the server did not start"

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(WAIT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def finished(self) -> Arrays:
        """Return the final model of a run that has ended well."""
        assert self._process.wait(WAIT_S) == 0
        return read_tensors(self.folder / "model" / "model.safetensors")

    def site(self, name: str, address: str = "") -> Site:
        return Site(name, GrpcTransport(address or self.address, f"secret of {name}"))


@contextmanager
def server_process(folder: Path, sites: int, **fields: Any) -> Iterator[ServerProcess]:
    process = ServerProcess(folder, settings(sites, **fields))
    try:
        yield process
    finally:
        process.kill()
