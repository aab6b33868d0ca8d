"""Histogram mode between sites that can reach the server alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost
import xgboost_data as d
import xgboost_isolated_sites

import fl_adapters
from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import train

pytest.importorskip("cryptography")
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net"]


def why_not() -> str:
    if sys.platform != "linux" or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return "unshare, nsenter and ip are needed, which are Linux's"
    test = "ip link add name left type veth peer name right && unshare -n true"
    done = subprocess.run([*NAMESPACES, "sh", "-c", test], capture_output=True, text=True)
    return f"network namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else ""


@pytest.mark.parametrize("worker", ["isolated", "shared"])
def test_sites_that_reach_only_the_server_grow_the_trees_of_all(tmp_path: Path, worker: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    path = [str(Path(fl_adapters.__file__).parents[1]), str(Path(d.__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [*NAMESPACES, sys.executable, xgboost_isolated_sites.__file__, tmp_path, worker]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    models = [bytearray((tmp_path / f"{name}.ubj").read_bytes()) for name in d.SITES]
    assert models[0] == models[1] == models[2]

    def site(place: Any) -> xgboost.Booster:
        params = d.BASE | {"base_score": 0.0}
        return train(params, d.matrix(place.index), 6, obj=d.logistic(), mode="histogram", kit=place.kit)

    with LocalFederation(sites=d.SITES) as federation:
        expected = federation.run(site, timeout_s=60)["site-1"]
    apart = d.margins(xgboost.Booster(model_file=models[0]), d.matrix(None))
    np.testing.assert_array_equal(apart, d.margins(expected, d.matrix(None)))
