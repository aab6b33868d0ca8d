"""A script: one rank of a site that trains a loop of its own under DDP. Arguments: rank, folder for the results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch_loops import BATCH, RATE, cross_entropy, rows

from fl_adapters.testing import failing
from fl_adapters.torch import FederatedLoop


def train(kit: str | None, ranks: int = 1, rank: int = 0, fail_at: int = 0, **arguments: Any) -> tuple[Any, Any]:
    """Train with the same batches whatever the number of ranks; return the network and the loop."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model: nn.Module = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    sampler = DistributedSampler(rows(0), ranks, rank, shuffle=False)  # together the ranks' batches are those of one
    data = DataLoader(rows(0), batch_size=BATCH // ranks, sampler=sampler)

    def evaluate() -> tuple[dict[str, float], int]:
        x, y = rows(99, 16).tensors
        return {"loss": cross_entropy(net(x), y).item()}, len(y)

    loop = FederatedLoop(model, optimizer, evaluate=evaluate, kit=kit, **arguments)
    steps = 0
    for round in loop.rounds(data):
        for x, y in round:
            steps += 1
            if steps == fail_at:
                failing()
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            round.add_loss(loss)
    return net, loop


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net, loop = train(None, ranks=2, rank=rank)
    torch.save({"weights": net.state_dict(), "stats": dict(loop.exchange_stats)}, folder / f"rank-{rank}.pt")
