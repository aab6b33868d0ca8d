"""A script: a site that trains with DDP or FSDP2 on two processes. Lightning's launcher runs it once per rank.

Arguments: the package of Lightning, a folder for each rank's result, and "ddp" or "fsdp2".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning_models as m
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from fl_adapters.lightning import FederatedCallback
from fl_adapters.torch.ranks.shards import full_tensor


def fit(pl: Any, kit: str | None, devices: int, *, sharded: bool = False, **more: Any) -> tuple[Any, Any]:
    """Fit with the same batches whatever the number of devices; return the trainer and the module."""
    torch.manual_seed(0)
    module = m.module(pl, net=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), **more)
    options: dict[str, Any] = {}
    if devices > 1:
        strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
        if sharded:
            strategy = pl.strategies.ModelParallelStrategy(devices, 1, process_group_backend="gloo")
            module.configure_model = lambda: shard(module)
        options = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
    trainer = m.trainer(FederatedCallback(kit=kit), pl=pl, **options)
    trainer.fit(module, share(m.rows(0), devices), share(m.rows(99), devices))
    return trainer, module


def shard(module: Any) -> None:
    """Shard the network, as a module's own `configure_model` does, which Lightning may call more than once."""
    if not isinstance(module.net, FSDPModule):
        fully_shard(module.net, mesh=module.device_mesh["data_parallel"])


def share(data: Any, ranks: int) -> DataLoader:
    """Return this rank's rows in order. Together the ranks' n-th batches are the n-th batch of a single process.

    Lightning's own sampler would shuffle the rows, differently for each number of ranks.
    """
    sampler = DistributedSampler(data, ranks, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    return DataLoader(data, batch_size=m.BATCH // ranks, sampler=sampler)


if __name__ == "__main__":
    package, folder, strategy = sys.argv[1:4]
    torch.set_num_threads(1)
    trainer, module = fit(m.package(package), None, devices=2, sharded=strategy == "fsdp2")
    left = {
        "weights": {name: full_tensor(tensor) for name, tensor in module.state_dict().items()},
        "steps": trainer.global_step,
        "logged": float(trainer.callback_metrics["federation_round"]),
    }
    torch.save(left, Path(folder) / f"rank-{os.environ.get('LOCAL_RANK', '0')}.pt")
