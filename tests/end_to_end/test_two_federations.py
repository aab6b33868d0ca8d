"""Two federations on the same machines: two servers behind one port of a balancer, and one site that is in both.

The site and the admin reach the balancer through an HTTP proxy that wants a password.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from middle import ConnectProxy, SniBalancer
from study import project

from fl_adapters.environments.processes import free_ports
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit
from fl_runtime.trust.project import Project

ROUNDS = {"liver": 2, "lung": 3}
PASSWORD = "geheim%40home"

# Adds 1 in each round. Round 2 waits while there is a file "hold".
SCRIPT = """
import time
from pathlib import Path
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3)}):
        if task.round == 2:
            Path(f"waits-{task.rounds}").touch()
            while Path("hold").exists():
                time.sleep(0.01)
        task.submit({"w": task.arrays["w"] + 1.0}, num_examples=1)
"""


class Federations:
    """The kits of both, with the processes of their servers and of the daemons of north."""

    def __init__(self, bench: Any) -> None:
        self.bench, self.folder = bench, bench.folder
        self.ports = dict(zip(ROUNDS, free_ports(2), strict=True))
        bench.script("train.py", SCRIPT)
        for name, port in self.ports.items():
            plan = project(f"{name}.example.org:443", ("north",)).model_dump()
            server = {**plan["server"], "listen": f"127.0.0.1:{port}"}
            described = Project(**{**plan, "federation": name, "server": server})
            authority = Authority.create(self.folder / name / "authority", described)
            for who in ("server", "north", "lena"):
                write_kit(self.folder / name / who, authority, described.participant(who))
            policy = f'apps: {{train: "{sys.executable} train.py"}}\nmin_cohort: 1\n'
            (self.folder / name / "north" / "policy.yml").write_text(policy)
            (self.folder / f"{name}.yml").write_text(f"{{name: tumour, app: train, rounds: {ROUNDS[name]}}}\n")

    def lena(self, name: str, *command: str) -> dict[str, Any]:
        """Run a command with the kit of an admin of one federation."""
        answer: dict[str, Any] = self.bench.json(*command, "--kit", f"{name}/lena")
        return answer


@pytest.fixture
def federations(bench: Any) -> Federations:
    (bench.folder / "hold").touch()
    return Federations(bench)


def test_two_federations_share_machines_a_port_and_a_proxy_that_dies(
    federations: Federations, until: Callable[[Callable[[], Any], str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, folder = federations.bench, federations.folder
    servers = {f"{name}.example.org": f"127.0.0.1:{port}" for name, port in federations.ports.items()}
    outputs: list[Any] = []
    with (
        SniBalancer(servers) as balancer,
        ConnectProxy({f"{host}:443": balancer.address for host in servers}, "lena:geheim@home") as proxy,
    ):
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", f"//lena:{PASSWORD}@"))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        processes = []
        for name in ROUNDS:
            processes += [
                bench.start("server", "--kit", f"{name}/server"),
                bench.start("site", "--kit", f"{name}/north"),
            ]
        for name in ROUNDS:
            until(lambda at=servers[f"{name}.example.org"]: _accepts(at), f"the server of {name}")  # type: ignore[misc]
            outputs.append(federations.lena(name, "job", "submit", f"{name}.yml"))
        for name, rounds in ROUNDS.items():
            until((folder / f"waits-{rounds}").exists, f"round 2 of {name}")
            status = federations.lena(name, "status")
            assert status["federation"] == name
            outputs.append(status)
        proxy.refuses = True
        proxy.cut()
        until(lambda: proxy.refused, "somebody to find the proxy closed")
        refused = bench.run("status", "--kit", "liver/lena")
        assert refused.returncode == 1
        assert "the proxy in $https_proxy" in refused.stderr
        (folder / "hold").unlink()
        proxy.refuses = False
        for name, rounds in ROUNDS.items():
            job = folder / name / "server-data" / "tumour" / "job.json"
            until(lambda job=job: '"finished"' in job.read_text(), f"the job of {name}")  # type: ignore[misc]
            outputs.append(federations.lena(name, "job", "download", "tumour", "--out", f"results/{name}"))
            model = read_tensors(folder / "results" / name / "model" / "model.safetensors")
            np.testing.assert_array_equal(model["w"], np.full(3, float(rounds)))
            assert (folder / name / "north" / "jobs" / "tumour" / "log.txt").exists()
        other = bench.run("server", "--kit", "lung/server", "--data", "other", "--listen", servers["liver.example.org"])
        for process in processes:
            process.terminate()
        outputs += [process.communicate(timeout=60) for process in processes]
    assert set(balancer.names) == set(servers), "each federation is asked for by its name"
    assert other.returncode == 1
    assert f"port {federations.ports['liver']} on 127.0.0.1 cannot be used" in other.stderr
    told = f"{outputs}{refused}{other}" + "".join(_texts(folder))
    assert PASSWORD not in told
    assert "geheim@home" not in told


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 10).close()
    except OSError:
        return False
    return True


def _texts(folder: Path) -> Iterator[str]:
    """Everything that both federations have written."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_text(errors="replace")
