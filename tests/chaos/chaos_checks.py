"""Checks of a finished run, whatever faults it has been through."""

from __future__ import annotations

import csv
import hashlib
import json
import sqlite3
from collections import Counter
from pathlib import Path

from chaos_federation import Federation
from chaos_processes import ChaosError
from chaos_targets import Bits

from fl_runtime.store.tensorfile import read_tensors


def model_of(federation: Federation) -> Bits:
    """Return the final global model from the file that the server wrote."""
    (file,) = (federation.disk.folder / "model").iterdir()
    if file.suffix == ".ubj":
        import xgboost

        return {file.name: bytes(xgboost.Booster(model_file=file).save_raw("ubj"))}  # as a site's booster says it
    return {name: array.tobytes() for name, array in read_tensors(file).items()}


def check(federation: Federation, wanted: Bits) -> None:
    """Check that the server and every site have the same bits, and that each update counts once. Raises ChaosError.

    Args:
        federation: The finished run.
        wanted: The final model of an undisturbed run.
    """
    digests = _digests(wanted)
    _same(_digests(model_of(federation)), digests, "the server's model")
    for own in federation.ended_well():
        _same(json.loads((own / "final.json").read_text()), digests, f"the final model of {own.name}")
    _check_rounds(federation, federation.disk.folder)
    _check_history(federation, federation.disk.folder)


def _digests(bits: Bits) -> dict[str, str]:
    return {name: hashlib.sha256(value).hexdigest() for name, value in bits.items()}


def _same(found: dict[str, str], wanted: dict[str, str], what: str) -> None:
    differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if differing:
        raise ChaosError(f"{what} is not that of an undisturbed run: {', '.join(differing)}")


def _check_rounds(federation: Federation, server: Path) -> None:
    """Check the journal: each round was closed once, with one update of every site and every acknowledged update."""
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
    """Check that history.csv has each round and site at most once.

    Rows that a killed server had not written yet are missing there.
    """
    with open(server / "history.csv", newline="") as file:
        rows = Counter((row["round"], row["site"]) for row in csv.DictReader(file))
    twice = [key for key, count in rows.items() if count > 1]
    if twice:
        raise ChaosError(f"history.csv has more than one row for {twice}")
