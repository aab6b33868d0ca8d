"""A script: a site that trains with DDP on two processes. Lightning's launcher runs it once more for each rank.

Arguments: the package of Lightning, and a folder for each rank's result.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning_models as m
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from fl_adapters.lightning import FederatedCallback


def fit(pl: Any, kit: str | None, devices: int, **more: Any) -> tuple[Any, Any]:
    """Fit with the same batches whatever the number of devices; return the trainer and the module."""
    torch.manual_seed(0)
    module = m.module(pl, net=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), **more)
    options: dict[str, Any] = {}
    if devices > 1:
        strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
        options = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
    trainer = m.trainer(FederatedCallback(kit=kit), pl=pl, **options)
    trainer.fit(module, share(m.rows(0), devices), share(m.rows(99), devices))
    return trainer, module


def share(data: Any, ranks: int) -> DataLoader:
    """Return this rank's rows in order. Together the ranks' n-th batches are the n-th batch of a single process.

    Lightning's own sampler would shuffle the rows, differently for each number of ranks.
    """
    sampler = DistributedSampler(data, ranks, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    return DataLoader(data, batch_size=m.BATCH // ranks, sampler=sampler)


if __name__ == "__main__":
    package, folder = sys.argv[1:3]
    torch.set_num_threads(1)
    trainer, module = fit(m.package(package), None, devices=2)
    left = {
        "weights": module.state_dict(),
        "steps": trainer.global_step,
        "logged": float(trainer.callback_metrics["federation_round"]),
    }
    torch.save(left, Path(folder) / f"rank-{os.environ.get('LOCAL_RANK', '0')}.pt")
