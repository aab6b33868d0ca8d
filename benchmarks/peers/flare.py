"""The bare exchange on NVIDIA FLARE, for compare.py. Runs in FLARE's environment; its sites run flare_site.py.

usage: flare.py simulator|poc SITES ROUNDS MIB

`simulator` runs all in one process tree. `poc` is FLARE's proof of concept: server and sites as separate processes.
Prints one JSON object with the seconds of each round: from one arrival of the global model at site-1 to the next. The
last round is missing, since nothing arrives after it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import PocEnv, SimEnv

HERE = Path(__file__).parent.resolve()
_LONGEST_S = 1800.0


def main(kind: str, sites: int, rounds: int, mib: float) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(HERE)  # the recipe takes a script by its relative name
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.environ.update(ARRIVALS=f"{folder}/arrivals.txt", HOME=folder, PATH=path)
        os.environ["NVFLARE_POC_WORKSPACE"] = f"{folder}/poc"
        np.save(f"{folder}/zeros.npy", np.zeros(int(mib * 2**18), np.float32))
        recipe = NumpyFedAvgRecipe(
            name="bare",
            min_clients=sites,
            num_rounds=rounds,
            model=None,
            initial_ckpt=f"{folder}/zeros.npy",
            train_script="flare_site.py",
            train_args="",
        )
        if kind == "simulator":
            recipe.execute(SimEnv(num_clients=sites, num_threads=sites, workspace_root=f"{folder}/workspace"))
        else:
            deployed(recipe, sites)
        lines = Path(os.environ["ARRIVALS"]).read_text().split()
    arrivals, values = [float(line) for line in lines[::2]], [float(line) for line in lines[1::2]]
    seconds = [after - before for before, after in pairwise(arrivals)]
    print(json.dumps({"round_s": seconds, "value": values[-1] + 1}), flush=True)


def deployed(recipe: NumpyFedAvgRecipe, sites: int) -> None:
    """Run the recipe in a proof of concept."""
    environment = PocEnv(num_clients=sites)
    try:
        run = recipe.execute(environment)
        end = time.monotonic() + _LONGEST_S
        while not any(word in str(environment.get_job_status(run.get_job_id())) for word in ("FINISHED", "ABORT")):
            if time.monotonic() > end:
                sys.exit(f"the run took more than {_LONGEST_S:g} s")
            time.sleep(0.5)
    finally:
        environment.stop(clean_up=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
