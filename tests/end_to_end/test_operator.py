"""A week at a federation, by its commands alone: five jobs of two admins, while machines fail and come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from study import project
from tcp_proxy import TcpProxy

from fl_adapters.environments.processes import free_ports
from fl_runtime.client.control import ControlClient
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.trust import audit
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit

Until = Callable[[Callable[[], Any], str], None]

SITES = ("north", "south", "west")
ROUNDS = 4
REJOIN_S = 1.0

# A site's work depends on its number, the round and the model, so that a lost or repeated step would show. The script
# waits in a round, or dies, as files in its working directory say.
SCRIPT = """
import os, signal, time
from pathlib import Path
import numpy as np
import fl_adapters as fl

me = fl.site()
job = me.job.partition("/")[0]

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3)}):
        Path(f"at-{job}-{me.name}-{task.round}").write_text(str(os.getpid()))
        while Path(f"hold-{job}-{task.round}").exists():
            time.sleep(0.01)
        for trap in sorted(Path(".").glob(f"die-{job}-{me.name}-*")):
            trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        task.submit({"w": task.arrays["w"] * 0.75 + site.index + 1 / task.round}, num_examples=1)
"""


def undisturbed(sites: int, pooled: Callable[[list[Any]], Any]) -> list[float]:
    """The final model of a job in a quiet week, as a plain loop."""
    w = np.zeros(3)
    for number in range(1, ROUNDS + 1):
        w = pooled([w * 0.75 + index + 1 / number for index in range(sites)])
    return w.tolist()  # type: ignore[no-any-return]


def mean(updates: list[Any]) -> Any:
    """The mean as docs/strategies.md defines it: subtract, multiply, add."""
    result = updates[0]
    for count, update in enumerate(updates[1:], 2):
        result = result + (update - result) * (1 / count)
    return result


class Federation:
    """Kits, and the processes of a server and of each site's daemon. South reaches the server through a proxy."""

    def __init__(self, bench: Any, proxy: TcpProxy, until: Until) -> None:
        self.bench, self.folder, self.until, self.south_line = bench, bench.folder, until, proxy
        bench.script("train.py", SCRIPT)
        for name, address in [("", proxy.target), ("south", proxy.address)]:
            self._provision(address, only=name)
        for site in SITES:
            apps = f'apps: {{train: "{sys.executable} train.py"}}\nresources: {{processes: 2}}\n'
            only = "strategies: [fedavg]\n" if site == "west" else ""
            (self.folder / "kits" / site / "policy.yml").write_text(apps + only)
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def _provision(self, address: str, only: str) -> None:
        """Write the kits for a server's address, or the kit of one participant alone."""
        kits, plan = self.folder / "kits", project(address, SITES)
        if not only:
            self._authority = Authority.create(kits / "authority", plan)
        self._authority.project = plan
        for identity in plan.participants():
            if (identity.name == only) if only else (identity.name != "south"):
                write_kit(kits / identity.name, self._authority, identity)

    def start(self, *names: str) -> None:
        for name in names:
            command = ("server", "--folder", "server-runs") if name == "server" else ("site",)
            self.processes[name] = self.bench.start(*command, "--kit", f"kits/{name}")

    def power_off(self, name: str) -> None:
        """Kill a machine's process, and with a site's daemon the scripts that it runs."""
        self.processes[name].kill()
        self.processes[name].communicate()

    def admin(self, who: str, *command: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.bench.json("job", *command, "--kit", f"kits/{who}")
        return answer

    def submit(self, who: str, name: str, **fields: Any) -> None:
        lines = {"name": name, "app": "train", "rounds": ROUNDS, "min_sites": 3, "rejoin_s": REJOIN_S, **fields}
        (self.folder / f"{name}.yml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        self.admin(who, "submit", f"{name}.yml")

    def hold(self, *names: str) -> None:
        for name in names:
            (self.folder / f"hold-{name}").touch()

    def release(self, *names: str) -> None:
        for name in names:
            (self.folder / f"hold-{name}").unlink()

    def at(self, job: str, round: int, sites: Sequence[str] = SITES) -> None:
        """Wait until scripts of these sites are in this round of a job."""
        for site in sites:
            place = self.folder / f"at-{job}-{site}-{round}"
            self.until(place.exists, f"{site} in round {round} of {job}")
            place.unlink()

    def states(self) -> dict[str, str]:
        """Ask the server, for a minute if need be, for the state of every job."""
        with closing(ControlClient.of_kit(self.folder / "kits" / "lena", self.south_line.target)) as control:
            return {job["job"]: job["state"] for job in control.ask("Status", patience_s=60)["jobs"]}

    def reach(self, job: str, state: str) -> None:
        record = self.folder / "server-runs" / job / "job.json"
        self.until(lambda: json.loads(record.read_text())["state"] == state, f"{job} to be {state}")


@pytest.fixture
def federation(bench: Any, until: Until, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with TcpProxy(f"127.0.0.1:{free_ports(1)[0]}") as proxy:
        yield Federation(bench, proxy, until)


@pytest.mark.slow
def test_five_jobs_of_a_week_end_as_in_a_quiet_one(federation: Federation) -> None:
    here = federation
    here.hold("heart-2", "lung-2", "liver-2", "spleen-2", "kidney-2")
    here.start("server", *SITES)
    assert here.states() == {}
    here.submit("lena", "heart")
    here.submit("lena", "lung", strategy="median", min_sites=2)
    here.submit("lars", "liver")
    here.submit("lars", "spleen")
    here.submit("lena", "kidney")

    # Two jobs run at a time. West's policy refuses one of them, which goes on without it.
    here.at("heart", 2)
    here.at("lung", 2, ("north", "south"))
    states = here.states()
    assert [job for job in states if states[job] == "running"] == ["heart", "lung"], states

    # The server is killed in the middle of a round, and the machine of north with it.
    here.power_off("server")
    here.power_off("north")
    here.start("server", "north")
    here.release("heart-2", "lung-2")
    here.reach("heart", "finished")
    here.reach("lung", "finished")

    # The script of liver dies twice at north; lars has changed his mind on spleen.
    for number in (1, 2):
        (here.folder / f"die-liver-north-{number}").touch()
    here.at("liver", 2)
    here.at("spleen", 2)
    here.release("liver-2")
    here.admin("lars", "abort", "spleen")
    here.reach("liver", "finished")

    # South is cut off for longer than rejoin_s; then kidney is aborted by mistake, and resumed.
    here.at("kidney", 2)
    here.south_line.refuses = True
    here.south_line.cut()
    here.release("kidney-2")
    time.sleep(3 * REJOIN_S)  # the length of the outage
    assert here.states()["kidney"] == "running"
    here.admin("lena", "abort", "kidney")
    here.power_off("server")
    here.start("server")
    assert here.states()["kidney"] == "aborted"
    here.admin("lena", "resume", "kidney")
    here.south_line.refuses = False
    here.reach("kidney", "finished")

    assert here.states() == dict.fromkeys(("heart", "lung", "liver", "kidney"), "finished") | {"spleen": "aborted"}
    models = dict.fromkeys(("heart", "liver", "kidney"), undisturbed(3, mean))
    models["lung"] = undisturbed(2, lambda updates: np.median(updates, axis=0))
    for job, wanted in models.items():
        here.admin("lars", "download", job, "--out", f"fetched-{job}")
        model = read_tensors(here.folder / f"fetched-{job}" / "model" / "model.safetensors")
        assert model["w"].tolist() == wanted, job
        for site in SITES if job != "lung" else ("north", "south"):
            at_site = here.folder / "kits" / site / "jobs" / job / "model" / "model.safetensors"
            here.until(at_site.exists, f"the model of {job} at {site}")
            assert read_tensors(at_site)["w"].tolist() == wanted, (job, site)
    for name in ("server", *SITES):
        process = here.processes[name]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM), err
        kit = here.folder / "kits" / name
        assert audit.verify(kit, audit.Anchor(kit=kit))[1] == []
    assert not [entry for entry in os.listdir(here.folder) if entry.startswith("die-")]
