"""What a run must be when it is over, whatever has happened to it."""

from __future__ import annotations

import csv
import hashlib
import json
import sqlite3
from collections import Counter
from pathlib import Path

from chaos_federation import ChaosError, Federation

from fl_runtime.store.tensorfile import read_tensors


def check(federation: Federation) -> None:
    """The same bits at the server and at every site; every update once. Raises ChaosError."""
    wanted = {name: hashlib.sha256(bits).hexdigest() for name, bits in federation.target.wanted().items()}
    server = federation.disk.folder
    model = read_tensors(server / "model" / "model.safetensors")
    found = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in model.items()}
    _same(found, wanted, "the server's model")
    for own in federation.ended_well():
        _same(json.loads((own / "final.json").read_text()), wanted, f"the final model of {own.name}")
    _check_rounds(federation, server)
    _check_history(federation, server)


def _same(found: dict[str, str], wanted: dict[str, str], what: str) -> None:
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing or set(found) != set(wanted):
        raise ChaosError(f"{what} is not that of an undisturbed run: {', '.join(differing)}")


def _check_rounds(federation: Federation, server: Path) -> None:
    """The journal: every round was closed once, with one update of every site; so was all that was acknowledged."""
    with sqlite3.connect(server / "server" / "journal.sqlite") as db:
        rows = db.execute("SELECT round, result FROM round WHERE round > 0 ORDER BY round").fetchall()
    sites = {number: json.loads(result)["sites"] for number, result in rows if result}
    names = list(federation.settings.sites)
    if sites != dict.fromkeys(range(1, federation.target.rounds + 1), names):
        raise ChaosError(f"the rounds have the updates of: {sites}")
    for process in federation.sites:
        lines = (federation.folder / process.name / "acknowledged.txt").read_text().split("\n")
        lost = {int(line) for line in lines if line} - set(sites)
        if lost:
            raise ChaosError(f"{process.name} had an acknowledgement for rounds {sorted(lost)}, which do not exist")


def _check_history(federation: Federation, server: Path) -> None:
    """history.csv has each round and site once at most (what a killed server had not written is missing there)."""
    with open(server / "history.csv", newline="") as file:
        rows = Counter((row["round"], row["site"]) for row in csv.DictReader(file))
    twice = [key for key, count in rows.items() if count > 1]
    if twice:
        raise ChaosError(f"history.csv has more than one row for {twice}")
