"""The bare exchange on NVIDIA FLARE's simulator, for peers.py.   usage: peer_flare.py SITES ROUNDS MIB

Runs in FLARE's environment; its sites run peer_flare_site.py. Prints one JSON object: seconds of the rounds, from one
arrival of the global model at site-1 to the next. The last round is not among them: nothing arrives after it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv

HERE = Path(__file__).parent.resolve()


def main(sites: int, rounds: int, mib: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(HERE)  # the recipe takes a script by its relative name
        os.environ["ARRIVALS"] = f"{folder}/arrivals.txt"
        np.save(f"{folder}/zeros.npy", np.zeros(int(mib * 2**18), np.float32))
        recipe = NumpyFedAvgRecipe(
            name="bare",
            min_clients=sites,
            num_rounds=rounds,
            model=None,
            initial_ckpt=f"{folder}/zeros.npy",
            train_script="peer_flare_site.py",
            train_args="",
        )
        run = recipe.execute(SimEnv(num_clients=sites, num_threads=sites, workspace_root=f"{folder}/workspace"))
        print(run.get_status(), file=sys.stderr)
        lines = Path(os.environ["ARRIVALS"]).read_text().split()
    arrivals, values = [float(line) for line in lines[::2]], [float(line) for line in lines[1::2]]
    seconds = [after - before for before, after in pairwise(arrivals)]
    print(json.dumps({"round_s": seconds, "value": values[-1] + 1}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
