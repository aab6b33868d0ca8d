"""A script: one rank of a site that trains with DDP on two processes over gloo. The environment holds the rank.

Argument: a folder for each rank's result.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import monai_models as m
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from fl_adapters.monai import FederatedHandler


def train(kit: str | None, ranks: int, fail_at: int = 0) -> Any:
    """Train with the same batches whatever the number of ranks; return the trainer."""
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    if ranks > 1:
        net = nn.parallel.DistributedDataParallel(net)
    evaluator = m.evaluator(net, share(m.Rows(99, 16), ranks))
    handlers = [m.ValidationHandler(1, evaluator), m.Losses(fail_at), FederatedHandler(kit=kit)]
    training = m.trainer(net, handlers, data=share(m.Rows(0), ranks))
    training.run()
    return training


def share(data: Any, ranks: int) -> DataLoader:
    """Return this rank's rows in order. Together the ranks' n-th batches are the n-th batch of a single process."""
    sampler = DistributedSampler(data, ranks, int(os.environ.get("RANK", "0")), shuffle=False)
    return DataLoader(data, batch_size=m.BATCH // ranks, sampler=sampler)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    training = train(None, dist.get_world_size())
    weights = dict(training.network.module.state_dict())
    left = {"weights": weights, "steps": training.state.iteration}
    left["logged"] = float(training.state.metrics["federation_round"])
    torch.save(left, Path(sys.argv[1]) / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()
