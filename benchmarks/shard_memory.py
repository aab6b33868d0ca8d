"""Measures the memory of each rank of sites whose model FSDP2 has sharded, alone and in a federation. Linux only.

    python benchmarks/shard_memory.py [--mib 512] [--tensor-mib 16] [--rounds 3] [--lora]

Two sites of two ranks each train a stack of linear layers with AdamW in float32, over gloo on the CPU: the same scripts
first alone, then in a federation in which every tensor travels. With `--lora` only two small matrices beside each layer
are trained and travel, and the layers are frozen.

Columns: peak of a process's anonymous memory in MiB above what it had before the model was made, from samples every
20 ms. Mapped pages of files are left out, since the system reclaims them when it needs to. In a federation the peak of
rounds leaves out the end of the run, where the final model is written.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SITES, RANKS, STEPS = 2, 2, 2
EVERY_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the model (default: %(default)s)")
    parser.add_argument("--tensor-mib", type=int, default=16, help="size of a layer's weight (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(train(json.loads(args.rank))))
        return

    from fl_adapters.testing import LocalFederation

    shape = {"mib": args.mib, "tensor_mib": args.tensor_mib, "rounds": args.rounds, "lora": args.lora}
    alone = measure([None] * SITES, shape)
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalFederation(
            sites=SITES, sockets=True, rounds=args.rounds, every=STEPS, folder=Path(folder) / "run"
        ) as federation,
    ):
        together = measure([place.kit for place in federation.places], shape)
        seconds = [f"{r.seconds:.1f}" for r in federation.result().rounds]
    table = Table(title=f"Peak memory in MiB, model of {args.mib} MiB", title_justify="left")
    for column in ("site, rank", "alone", "rounds of a federation", "whole run"):
        table.add_column(column, justify="right")
    for (place, local), (_, shared) in zip(alone.items(), together.items(), strict=True):
        table.add_row(place, f"{local['rounds']:.0f}", f"{shared['rounds']:.0f}", f"{shared['all']:.0f}")
    Console().print(table)
    Console().print(f"Seconds of each round: {', '.join(seconds)}.")


def measure(kits: list[str | None], shape: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Start all ranks of all sites; return their peaks."""
    started = {}
    for site, kit in enumerate(kits):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(RANKS):
            values = json.dumps({**shape, "rank": rank, "port": port, "kit": kit})
            started[f"{site + 1}, {rank}"] = subprocess.Popen(
                [sys.executable, __file__, "--rank", values], stdout=subprocess.PIPE, text=True, env=environment()
            )
    outputs = {place: process.communicate()[0] for place, process in started.items()}
    if any(process.returncode for process in started.values()):
        raise SystemExit("a rank failed; its error stands above")
    return {place: json.loads(output.splitlines()[-1]) for place, output in outputs.items()}


def environment() -> dict[str, str]:
    top = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([top, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


class Peak:
    """The largest anonymous memory of this process since a moment, in MiB."""

    def __init__(self) -> None:
        self.before = self.highest = anonymous_mib()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.highest = max(self.highest, anonymous_mib())
            time.sleep(EVERY_S)

    def above(self) -> float:
        self.highest = max(self.highest, anonymous_mib())
        return self.highest - self.before


def anonymous_mib() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def train(values: dict[str, Any]) -> dict[str, float]:
    """Train one rank; return its peaks during the rounds and in all."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from fl_adapters.torch import FederatedLoop

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(values["port"]))
    dist.init_process_group("gloo", rank=values["rank"], world_size=RANKS)
    width = int((values["tensor_mib"] * 2**20 / 4) ** 0.5)
    torch.manual_seed(0)
    peak = Peak()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(width, width, bias=False)
            self.a, self.b = nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False)
            self.base.requires_grad_(not values["lora"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.b(self.a(x))

    net = nn.Sequential()
    for _ in range(values["mib"] // values["tensor_mib"]):
        net.append(fully_shard(Layer()))
    fully_shard(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    loop = FederatedLoop(net, optimizer, kit=values["kit"], every=STEPS)
    batches = [torch.ones(4, width)] * STEPS
    during = 0.0
    for round in loop.rounds(batches, epochs=values["rounds"]):
        for batch in round:
            net(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        during = peak.above()
    return {"rounds": during, "all": peak.above()}


if __name__ == "__main__":
    main()
