"""The targets of the chaos suite: a script per site, and the result that its run must have."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bare_site import initial, trained

HERE = Path(__file__).parent

Bits = dict[str, bytes]
"""Name of a tensor -> its bytes."""


@dataclass(frozen=True, eq=False)
class Target:
    """A script that takes part, and its run.

    Attributes:
        name: Name in the table of faults.
        command: Command of a site's process. It writes the files described in site_notes.py, and must end well when
            killed anywhere and started again.
        sites: Number of sites.
        rounds: Number of rounds.
        wanted: Returns the final model of an undisturbed run; None finds it out by such a run.
        settings: Further fields of RunSettings.
        framework: Whether imports dominate a site's start, so that faults wait until all sites are connected.
    """

    name: str
    command: Sequence[str]
    sites: int
    rounds: int
    wanted: Callable[[], Bits] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    framework: bool = False


@dataclass(frozen=True, eq=False)
class QueueTarget:
    """Jobs of a provisioned federation: its server, and the daemons of its sites, which run scripts without training.

    Attributes:
        name: Name in the table of faults.
        jobs: Names of the jobs, all of them alike, in the order of their submission.
        at_once: Number of jobs that a site runs at a time.
        kib: Size of the model, in KiB.
        rounds: Number of rounds of each job.
        sites: Number of sites.
        acts: What a kind of fault in the plan becomes here, if it is not that kind itself.
        two_servers: Whether two servers share a PostgreSQL, and one stands in for the other.
    """

    name: str
    jobs: Sequence[str]
    at_once: int = 2
    kib: int = 200
    rounds: int = 20
    sites: int = 3
    acts: Mapping[str, str] = field(default_factory=dict)
    two_servers: bool = False
    framework: bool = field(default=True, init=False)  # faults wait until scripts run

    def wanted(self) -> Bits:
        """Return the final model of an undisturbed job."""
        return _averaged(self.kib, self.rounds, self.sites)


def _script(file: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / file), *arguments]


def bare(kib: int, rounds: int, sites: int = 3) -> Target:
    """Return a target whose sites run a loop without training.

    What a site sends depends only on its index, the rounds and the models.
    """
    return Target(
        name=f"bare-{kib}",
        command=_script("bare_site.py", str(kib)),
        sites=sites,
        rounds=rounds,
        wanted=lambda: _averaged(kib, rounds, sites),
    )


def script(name: str, rounds: int, *arguments: str, **settings: Any) -> Target:
    """Return a target that runs an ordinary script of a framework, in `NAME_site.py`."""
    return Target(
        name="-".join([name, *arguments]),
        command=_script(f"{name}_site.py", *arguments),
        sites=2,
        rounds=rounds,
        settings=settings,
        framework=True,
    )


BARE = (bare(3 * 2**10, 25), bare(200, 60), bare(9 * 2**10, 12))
_SIX_JOBS = [f"job-{number}" for number in range(1, 7)]
_AT_SITES = {
    "kill the server": "reboot a site",
    "cut a connection": "kill a site",
    "damage a byte": "stop a site",
    "silence a connection": "stop a site",
    "fill the disk": "reboot a site",
}
_AT_SERVERS = {
    "damage a byte": "freeze the server",
    "silence a connection": "freeze the server",
    "fill the disk": "restart the database",
}

QUEUES = (QueueTarget("queue", _SIX_JOBS), QueueTarget("daemon", _SIX_JOBS, acts=_AT_SITES))
FAILOVER = QueueTarget("failover", _SIX_JOBS, acts=_AT_SERVERS, two_servers=True)
FRAMEWORKS = (
    script("hf", 40),
    script("lightning", 60),
    script("keras", 60),
    script("xgboost", 60, "bagging"),
    script("xgboost", 60, "cyclic"),
)


def _averaged(kib: int, rounds: int, sites: int) -> Bits:
    """Compute federated averaging in plain NumPy as docs/strategies.md defines it: subtract, multiply, add."""
    model, carried = initial(kib), [0.0] * sites
    for number in range(1, rounds + 1):
        updates = []
        for index in range(sites):
            update, carried[index] = trained(model, index, number, carried[index])
            updates.append(update)
        mean = {name: array.copy() for name, array in updates[0].items()}
        weight = 1
        for index in range(1, sites):
            weight += index + 1
            for name, array in updates[index].items():
                share = np.asarray((index + 1) / weight, array.dtype)
                mean[name] = mean[name] + (array - mean[name]) * share
        model = mean
    return {name: array.tobytes() for name, array in model.items()}
