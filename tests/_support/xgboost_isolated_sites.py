"""A script for its own user and network namespace: sites that can reach the server and nothing else.

Each site has a network namespace with one link, which leads to the server.

usage: xgboost_isolated_sites.py FOLDER ISOLATED
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import xgboost_data as d
import xgboost_site_process

from fl_adapters.participant.kit import Kit
from fl_runtime.server import Server
from fl_runtime.types import RunSettings

SITE_SCRIPT = """
import sys, runpy
from fl_adapters.xgboost import engine
engine.ISOLATED = {isolated}
sys.argv[1:] = {arguments!r}
runpy.run_path({script!r}, run_name="__main__")
"""
REACH = "import socket, sys; s = socket.socket(); s.settimeout(2); sys.exit(s.connect_ex(({host!r}, {port})))"


def ip(*words: str, inside: int | None = None) -> None:
    enter = ["nsenter", "-t", str(inside), "-n"] if inside else []
    subprocess.run([*enter, "ip", *words], check=True)


def connected(index: int, command: list[str]) -> subprocess.Popen[bytes]:
    """Start a process in its own network: its address is 10.9.<index>.2, the server's end is 10.9.<index>.1."""
    process = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", 'read go; exec "$@"', "-", *command], stdin=subprocess.PIPE
    )
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{process.pid}/ns/net") == own:
        time.sleep(0.01)
    ip("link", "add", "name", f"v{index}", "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
    ip("addr", "add", f"10.9.{index}.1/24", "dev", f"v{index}")
    ip("link", "set", f"v{index}", "up")
    for words in (("addr", "add", f"10.9.{index}.2/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
        ip(*words, inside=process.pid)
    ip("link", "set", "lo", "up", inside=process.pid)
    ip("route", "add", "default", "dev", "lo", inside=process.pid)  # to nowhere: XGBoost 2 wants one
    return process


def main() -> None:
    folder, isolated = Path(sys.argv[1]), sys.argv[2] == "isolated"
    ip("link", "set", "lo", "up")
    settings = RunSettings("apart", d.SITES, len(d.SITES))
    server = Server(settings, folder / "run", {name: f"secret of {name}" for name in d.SITES}, host="0.0.0.0")
    port = server.start().rpartition(":")[2]
    processes = []
    for index, name in enumerate(d.SITES):
        kit = Kit("apart", name, index, len(d.SITES), f"10.9.{index}.1:{port}", f"secret of {name}")
        arguments = [str(kit.save(folder / name)), "histogram", "6", "0", str(folder / f"{name}.ubj")]
        script = SITE_SCRIPT.format(isolated=isolated, arguments=arguments, script=xgboost_site_process.__file__)
        processes.append(connected(index, [sys.executable, "-c", script]))

    def reaches(index: int, host: str) -> bool:
        enter = ["nsenter", "-t", str(processes[index].pid), "-n"]
        test = REACH.format(host=host, port=port)
        return subprocess.run([*enter, sys.executable, "-c", test]).returncode == 0

    assert reaches(0, "10.9.0.1") and not reaches(0, "10.9.1.2") and not reaches(0, "10.9.1.1")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
    statuses = [process.wait(90) for process in processes]
    assert statuses == [0] * len(processes), statuses
    assert server.wait(60)
    server.close()


if __name__ == "__main__":
    main()
