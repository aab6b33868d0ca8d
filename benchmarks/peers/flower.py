"""The bare exchange on Flower, for compare.py. Runs in Flower's environment, as the app that Flower runs, too.

usage: flower.py simulation|deployed SITES ROUNDS MIB

`simulation` is Flower's simulation engine, on Ray. `deployed` is a SuperLink, a SuperNode per site, and `flwr run`.
Prints one JSON object with the seconds of each round.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client = ClientApp()
server = ServerApp()

_APP = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "exchange"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "exchange.app:server"
clientapp = "exchange.app:client"

[tool.flwr.app.config]
sites = 2
rounds = 3
mib = 1.0
out = ""
"""
_STARTING_S, _LONGEST_S = 60.0, 1800.0


@client.train()
def add_one(message: Message, context: Context) -> Message:
    weights = message.content["arrays"].to_numpy_ndarrays()
    reply = {
        "arrays": ArrayRecord([array + 1 for array in weights]),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(content=RecordDict(reply), reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    wanted: Any = dict(context.run_config) or json.loads(os.environ["EXCHANGE"])
    ends: list[float] = []

    def note(number: int, arrays: ArrayRecord) -> None:
        ends.append(time.monotonic())  # before round 1, and after every round

    sites = wanted["sites"]
    strategy: Any = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    zeros = ArrayRecord([np.zeros(int(wanted["mib"] * 2**18), np.float32)])
    result = strategy.start(grid=grid, initial_arrays=zeros, num_rounds=wanted["rounds"], evaluate_fn=note)
    value = float(result.arrays.to_numpy_ndarrays()[0][-1])
    seconds = [after - before for before, after in pairwise(ends)]
    partial = Path(wanted["out"] + ".partial")
    partial.write_text(json.dumps({"round_s": seconds, "value": value}))
    partial.rename(wanted["out"])


def simulated(sites: int, rounds: int, mib: float, out: Path) -> None:
    os.environ["EXCHANGE"] = json.dumps({"sites": sites, "rounds": rounds, "mib": mib, "out": str(out)})
    cores = len(os.sched_getaffinity(0))
    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": cores}}
    run_simulation(server_app=server, client_app=client, num_supernodes=sites, backend_config=resources)


def deployed(sites: int, rounds: int, mib: float, out: Path) -> None:
    folder = out.parent
    app, home = folder / "app", folder / "home"
    (app / "exchange").mkdir(parents=True)
    (app / "pyproject.toml").write_text(_APP)
    (app / "exchange" / "__init__.py").touch()
    shutil.copy(__file__, app / "exchange" / "app.py")
    link, *nodes = free_ports(sites + 1)
    (home / ".flwr").mkdir(parents=True)
    named = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    (home / ".flwr" / "config.toml").write_text(named)
    os.environ.update(HOME=str(home), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    address = ["--superlink", f"127.0.0.1:{link}"]
    superlink = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(link)]
    with running(superlink, folder):
        wait_for(lambda: listens(link), _STARTING_S, "the SuperLink")
        with running_all([["flower-supernode", "--insecure", *address, "--port", str(p)] for p in nodes], folder):
            config = f'sites={sites} rounds={rounds} mib={float(mib)} out="{out}"'
            subprocess.run(["flwr", "run", str(app), "here", "-c", config], check=True, stdout=sys.stderr)
            wait_for(out.exists, _LONGEST_S, "the run")


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[None]:
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def running_all(commands: list[list[str]], folder: Path) -> Iterator[None]:
    if not commands:
        yield
        return
    with running(commands[0], folder), running_all(commands[1:], folder):
        yield


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Any, limit_s: float, what: str) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"{what} took more than {limit_s:g} s")
        time.sleep(0.1)


def main(kind: str, sites: int, rounds: int, mib: float) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out = Path(folder) / "rounds.json"
        (simulated if kind == "simulation" else deployed)(sites, rounds, mib, out)
        print(out.read_text(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
