"""The processes of one run: a server, sites and a proxy before each, and the effect of each fault on them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos_disk import Disk
from chaos_plan import Fault
from chaos_processes import ChaosError, FaultyRun, Process, environment_of
from chaos_targets import HERE, Target
from tcp_proxy import TcpProxy

from fl_adapters.environments.processes import free_ports
from fl_adapters.participant.kit import KIT_VARIABLE, Kit
from fl_runtime.types import RunSettings

_FIRES_S = 3.0
_LAST_WORDS_S = 5.0
_EXIT_S = 90.0  # of an interpreter with a framework in it, on a busy machine


class Federation(FaultyRun):
    """One run of a target in `folder`; the server's files are on `disk`."""

    def __init__(self, target: Target, folder: Path, disk: Disk) -> None:
        super().__init__(folder, disk)
        self.target = target
        port = free_ports(1)[0]
        names = tuple(f"site-{index + 1}" for index in range(target.sites))
        fields: dict[str, Any] = {"name": "chaos", "sites": names, "min_sites": len(names), "rounds": target.rounds}
        fields |= {"deadline_s": 1800.0, "rejoin_s": 900.0}  # beyond a restart on a machine that is busy
        self.settings = RunSettings(**{**fields, "exact_restart": True, **target.settings})
        environment = environment_of()
        command = [
            sys.executable,
            str(HERE / "server.py"),
            str(disk.folder),
            str(port),
            json.dumps(asdict(self.settings)),
        ]
        self.server = Process("server", command, environment, folder / "server.txt")
        self.proxies = [TcpProxy(f"127.0.0.1:{port}") for _ in names]
        self._met = [0] * len(names)  # connections of earlier processes of each site
        self.sites = []
        for index, name in enumerate(names):
            own = folder / name
            kit = Kit(
                "chaos", name, index, len(names), self.proxies[index].address, f"secret of {name}", patience_s=20.0
            )
            kit.save(own / "kit")
            self.sites.append(
                Process(name, target.command, {**environment, KIT_VARIABLE: str(own / "kit")}, own / "log.txt")
            )

    def gather(self, timeout_s: float) -> None:
        """Wait until every started site has connected to the server, so that its script's imports are over."""
        end = time.monotonic() + timeout_s
        while not self.over and (
            late := [site for site, absent in zip(self.sites, self._absent(), strict=True) if absent]
        ):
            self.watch()
            if time.monotonic() > end:
                raise self._hangs(late)
            time.sleep(0.02)

    def _absent(self) -> list[bool]:
        zipped = zip(self.sites, self.proxies, self._met, strict=True)
        return [site.status is None and proxy.connections == met for site, proxy, met in zipped]

    @property
    def over(self) -> bool:
        """Whether the server has ended well."""
        return self.server.status == 0

    @property
    def may_end(self) -> bool:
        return True

    def _ended_by_the_disk(self) -> None:
        """Start a server again that a full disk has ended, once there is room.

        The server must have said so in a message of ours; else ChaosError.
        """
        if self.disk.full:
            return
        if self.disk.mounted:  # else the limit was on its log too
            words = json.loads(self.server.log.read_text(errors="replace").splitlines()[-1])
            if words["code"] != "store" or not (words["where"] and words["fix"]):
                raise ChaosError(f"the server ended for want of disk and said: {words}")
        super()._ended_by_the_disk()

    def suffer(self, fault: Fault) -> None:
        """Make a fault happen, and return once everything that it ended is running again."""
        number = fault.site % len(self.sites)
        site, proxy = self.sites[number], self.proxies[number]
        before = proxy.fired
        match fault.kind:
            case "kill the server":
                self._killed(self.server, fault)
            case "kill a site":
                self._killed(site, fault)
            case "delay a connection":
                proxy.hold(fault.for_s)
                self._count(fault)
            case "silence a connection":
                proxy.deafen()
                self._count(fault)
            case "cut a connection":
                proxy.cut_after(fault.direction, fault.at_bytes)  # type: ignore[arg-type]
            case "damage a byte":
                proxy.damage_after(fault.direction, fault.at_bytes, fault.flip)  # type: ignore[arg-type]
            case "fill the disk":
                self._fill(fault)
        if fault.kind in ("cut a connection", "damage a byte"):
            end = time.monotonic() + _FIRES_S
            while not (fired := proxy.wait_fired(before + 1, 0.1)) and time.monotonic() < end and not self.over:
                pass
            if fired:
                self._count(fault)

    def _killed(self, process: Process, fault: Fault) -> None:
        with self._lock:
            if process.status is not None or self.over:
                return
            process.kill()
            self._met = [
                proxy.connections if site is process else met
                for site, proxy, met in zip(self.sites, self.proxies, self._met, strict=True)
            ]
        self._count(fault)
        time.sleep(fault.for_s)
        with self._lock:
            if not self.over:
                process.start()

    def _count(self, fault: Fault) -> None:
        self.counts[fault.kind] += 1

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self, timeout_s: float) -> None:
        """Wait for all processes to end. Raises ChaosError, with their threads' stacks, if they do not."""
        end, alone, over = time.monotonic() + timeout_s, 0.0, False
        while late := [process for process in self.processes if process.status is None]:
            self.watch()
            now = time.monotonic()
            if self.over and not over:
                over, alone, end = True, now + _LAST_WORDS_S, now + _EXIT_S
            if over and now > alone and all(process.kills for process in late):
                return  # killed after its last word to the server, and started again after the end
            if now > end:
                raise self._hangs(late)
            time.sleep(0.02)

    def _hangs(self, late: Sequence[Process]) -> ChaosError:
        return self.hangs(f"{', '.join(process.name for process in late)} did not end:", 150)

    def close(self) -> None:
        super().close()
        for proxy in self.proxies:
            proxy.__exit__()

    def ended_well(self) -> Iterator[Path]:
        """The folders of the sites that stayed to the end."""
        for site in self.sites:
            own = self.folder / site.name
            if (own / "final.json").exists():
                yield own
            elif not site.kills:
                raise ChaosError(f"{site.name} has left no final model:\n{site.tail()}")
