"""The bare exchange on Flower's simulation engine, for peers.py.   usage: peer_flower.py SITES ROUNDS MIB

Runs in Flower's environment. Prints one JSON object: seconds of the rounds, and of all before and after them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client = ClientApp()
server = ServerApp()


@client.train()
def add_one(message: Message, context: Context) -> Message:
    weights = message.content["arrays"].to_numpy_ndarrays()
    reply = {
        "arrays": ArrayRecord([array + 1 for array in weights]),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(content=RecordDict(reply), reply_to=message)


def main(sites: int, rounds: int, mib: float) -> None:
    ends: list[float] = []
    final: list[float] = []

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        def note(number: int, arrays: ArrayRecord) -> None:
            ends.append(time.monotonic())  # before round 1, and after every round

        strategy: Any = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites
        )
        zeros = ArrayRecord([np.zeros(int(mib * 2**18), np.float32)])
        result = strategy.start(grid=grid, initial_arrays=zeros, num_rounds=rounds, evaluate_fn=note)
        final.append(float(result.arrays.to_numpy_ndarrays()[0][-1]))

    cores = len(os.sched_getaffinity(0))
    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": cores}}
    run_simulation(server_app=server, client_app=client, num_supernodes=sites, backend_config=resources)
    seconds = [after - before for before, after in pairwise(ends)]
    print(json.dumps({"round_s": seconds, "value": final[0]}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
