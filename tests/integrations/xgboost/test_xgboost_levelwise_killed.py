"""A site of mode "levelwise" is killed within a run and started again: the trees are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import levelwise_rows
import levelwise_site_process as script

import fl_adapters
from fl_adapters.testing import LocalFederation

ROUNDS = 3
VICTIM = "site-3"


def test_a_site_that_is_killed_comes_back_and_all_get_the_same_trees(tmp_path: Path) -> None:
    path = [str(Path(fl_adapters.__file__).parents[1]), str(Path(levelwise_rows.__file__).parent)]
    path += [str(Path(script.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    codes: list[int] = []

    def run_victim() -> None:
        place = next(place for place in federation.places if place.name == VICTIM)
        for dies_before in (1, -1):
            arguments = [place.kit, str(ROUNDS), str(dies_before), str(tmp_path / "model.ubj")]
            done = subprocess.run([sys.executable, script.__file__, *arguments], env=environment, timeout=90)
            codes.append(done.returncode)

    with LocalFederation(sites=3, sockets=True, rejoin_s=60.0, secure_sum=True) as federation:
        victim = threading.Thread(target=run_victim, daemon=True)
        victim.start()
        others = {name: lambda place: script.trained(place.kit, place.index, ROUNDS) for name in ("site-1", "site-2")}
        outcomes = federation.outcomes(others, timeout_s=120)
        victim.join(60)
    assert codes == [-signal.SIGKILL, 0]
    with LocalFederation(sites=3) as undisturbed:
        expected = undisturbed.run(lambda place: script.trained(place.kit, place.index, ROUNDS))["site-1"]
    found = {outcome.value for outcome in outcomes.values()} | {(tmp_path / "model.ubj").read_bytes()}
    assert found == {expected}
