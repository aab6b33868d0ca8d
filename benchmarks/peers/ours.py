"""The bare exchange on fl-adapters, for compare.py.

usage: ours.py KIND SITES ROUNDS MIB

KIND is `simulation` (large models in shared files), `grpc` (all bytes through sockets), or `virtual` (a function for
all sites, in one worker process per core). Prints one JSON object: seconds of each round, and of all before and after
them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from fl_adapters import Job, Simulation
from fl_runtime.store.tensorfile import read_tensors

BENCHMARKS = Path(__file__).parents[1]


def main(kind: str, sites: int, rounds: int, mib: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "virtual":
            os.environ["MIB"] = mib
            app = f"{BENCHMARKS / 'virtual_site.py'}:train"
            simulation = Simulation(sites=sites, engine="processes", folder=folder, quiet=True)
        else:
            app = str(BENCHMARKS / "bare_site.py")
            simulation = Simulation(sites=sites, args=(mib,), folder=folder, quiet=True, share=kind == "simulation")
        result = Job(app=app, rounds=rounds).run(simulation)
        assert result.model is not None
        value = float(read_tensors(result.model / "model.safetensors")["w"][-1])
    seconds = [item.seconds for item in result.rounds]
    print(json.dumps({"round_s": seconds, "around_s": result.wall_s - sum(seconds), "value": value}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
