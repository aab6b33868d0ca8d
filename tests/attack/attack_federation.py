"""A federation to be attacked: its server in a process of its own, three honest sites, and kits for the attackers."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from attack_client import Attacker
from attack_table import Attack, Outcome
from federation_bench import Site, at_once, started
from study import ADMINS, project, until

import fl_runtime
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import FederationError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit
from fl_runtime.types import Arrays

HONEST = ("north", "south", "west")
W: Arrays = {"a.weight": np.zeros((300, 1000), np.float32), "b.bias": np.zeros(7, np.float32)}  # travels in frames
REFUSED = (FederationError, OSError)
"""What an attacker that is refused gets: our own errors, or those of sockets and TLS."""
_WAIT_S = 60.0


class Memory:
    """The memory of a process, watched by a thread.

    Attributes:
        peak_bytes: Largest resident memory since `reset`.
    """

    def __init__(self, pid: int) -> None:
        self._process, self._stop, self.peak_bytes = psutil.Process(pid), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.peak_bytes = 0

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            try:
                self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
            except psutil.NoSuchProcess:
                return


class Federation:
    """A provisioned federation whose server runs in its own process.

    Attributes:
        folder: Folder with a kit for each participant, and the server's runs.
        address: Address of the server.
        authority: The authority, whose key signs any certificate that an attacker shall have.
        memory: The memory of the server.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        described = project(self.address, (*HONEST, "evil", "greedy", "gone", "east"))
        self.authority = Authority.create(folder / "authority", described)
        for identity in self.authority.project.participants():
            write_kit(folder / identity.name, self.authority, identity)
        _, crl = self.authority.revoke("gone")
        self.crl = crl.decode()
        self._things = ExitStack()

    def __enter__(self) -> Federation:
        environment = os.environ | {"PYTHONPATH": str(Path(fl_runtime.__file__).parents[1])}
        command = [sys.executable, "-m", "fl_adapters.cli", "server", "--kit", "server"]
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        until(lambda: b"serving at" in self.log() or self.process.poll() is not None, "the server to serve")
        self.memory = Memory(self.process.pid)
        self.ask("ada", "Revoke", crl=self.crl)
        return self

    def __exit__(self, *_: object) -> None:
        self._things.close()
        self.memory.close()
        self.process.terminate()
        self.process.wait(_WAIT_S)

    def log(self) -> bytes:
        return (self.folder / "log").read_bytes()

    def transport(self, name: str) -> GrpcTransport:
        transport = GrpcTransport(self.address, credentials=FileCredentials(self.folder / name))
        self._things.callback(transport.close)
        return transport

    def ask(self, name: str, method: str, **fields: Any) -> dict[str, Any]:
        """Make a call about jobs with the kit of an honest admin."""
        client = ControlClient(self.transport(name))
        try:
            return client.ask(method, **fields)
        finally:
            client.close()

    def attacker(self, who: str) -> Attacker:
        """Return somebody who attacks the server with the kit of a participant, or without any."""
        attacker = Attacker(self, who if who in ("evil", "greedy", *ADMINS) else "")
        self._things.callback(attacker.close)
        return attacker

    def refusals(self) -> list[dict[str, Any]]:
        """The refusals on the server's audit log."""
        lines = (self.folder / "server/audit.jsonl").read_text("utf-8").splitlines()
        return [entry for entry in map(json.loads, lines) if entry["outcome"] == "refused"]


class HonestJob:
    """A job of the three honest sites, whose rounds a test moves on one by one. Two attackers may take part, too.

    Attributes:
        models: The global model before each round, as the sites got it.
    """

    def __init__(self, federation: Federation, name: str, rounds: int) -> None:
        self.federation, self.name, self.rounds = federation, name, rounds
        federation.ask(
            "lena",
            "SubmitJob",
            job={
                "app": "x",
                "name": name,
                "rounds": rounds,
                "sites": [*HONEST, "evil", "greedy"],
                "min_sites": 3,
                "deadline_s": 600.0,
            },
        )
        for name in ("evil", "greedy"):  # so that the honest sites do not wait for them
            attacker = federation.attacker(name)
            attacker.join()
            attacker.leave()
        self.sites = [Site(site, federation.transport(site)) for site in HONEST]
        self.tasks = started(self.sites, W)
        self.models: list[Arrays] = [W]
        self._pool = ThreadPoolExecutor(len(HONEST))

    @contextmanager
    def round(self) -> Iterator[None]:
        """Let the sites train a round. What is done within the context happens while the round is open."""
        first, last = self.sites[:-1], self.sites[-1]
        working = [self._pool.submit(self._submit, site) for site in first]
        try:
            yield
        finally:
            for future in [*working, self._pool.submit(self._submit, last)]:
                assert future.result(_WAIT_S) == "used"
            at_once(self.sites, self._receive)
            found = [self.tasks[site.name].arrays for site in self.sites]
            assert all(np.array_equal(found[0][key], other[key]) for other in found for key in W)
            self.models.append({key: np.copy(array) for key, array in found[0].items()})

    def finish(self) -> Arrays:
        """End the sites' part; return the model that the server has written."""
        assert all(task.kind == "final" for task in self.tasks.values())
        for site in self.sites:
            site.client.leave("done", early=False)
            site.client.close()
        self._pool.shutdown()
        outcome = until(lambda: self.federation.ask("ada", "Status")["ended"].get(self.name), f"{self.name} to end")
        assert outcome["error"] is None, outcome["error"]
        assert [tuple(item["sites"]) for item in outcome["rounds"]] == [HONEST] * self.rounds
        return read_tensors(Path(outcome["folder"]) / "model/model.safetensors")

    def _submit(self, site: Site) -> str:
        task = self.tasks[site.name]
        draw = np.random.default_rng([HONEST.index(site.name), task.round])
        arrays = {key: array + draw.normal(size=array.shape).astype(np.float32) for key, array in task.arrays.items()}
        return site.submit(task, arrays, num_examples=10 + HONEST.index(site.name))

    def _receive(self, site: Site) -> None:
        self.tasks[site.name] = site.client.next_task()


def tried(attack: Attack, attacker: object) -> Outcome:
    """Send a variant, and compare what the attacker got with what must come of it."""
    try:
        got = str(attack.send(attacker))
    except REFUSED as error:
        got = f"{type(error).__name__}: {error}"
    except Exception as error:  # a fault of the attacker's own program, or of ours
        return Outcome(attack, repr(error), "the attack itself failed")
    fault = "" if re.search(attack.gets, got) else f"not what was expected: {attack.gets}"
    return Outcome(attack, got, fault)
