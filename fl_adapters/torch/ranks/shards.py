"""Tensors of which each rank of a site holds a part: DTensors, as FSDP2's `fully_shard` makes them.

A full tensor exists on a rank for one tensor at a time, while it is read or set. What travels are full tensors, so the
number of ranks is a site's own affair.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fl_runtime.errors import ConfigError

_FIX = "shard it by FSDP2 (torch.distributed.fsdp.fully_shard), or use DDP"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank may hold only a part of the tensor: a DTensor, as FSDP2 makes them.

    Args:
        tensor: The tensor.

    Returns:
        False for a plain tensor.
    """
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor. Collective for a sharded one: every rank must call it.

    Args:
        tensor: A plain or sharded tensor.

    Returns:
        `tensor` itself, or all parts of a sharded one as a new tensor.
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    device = sharded.device_mesh.device_type
    if sharded.device.type != device:  # FSDP2 with an offload policy keeps parts on the host
        sharded = sharded.to(device)
    full: Tensor = sharded.full_tensor()
    return full


@torch.no_grad()
def scatter(tensor: Tensor, full: Tensor | None) -> None:
    """Set a sharded tensor on all ranks from its full value on rank 0. Collective.

    Args:
        tensor: The sharded tensor, which is set in place.
        full: The full value on rank 0; None on the other ranks.
    """
    if full is None:
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=_mesh_device(tensor))
    _set_part(tensor, full, source=0)


@torch.no_grad()
def copy_full(tensor: Tensor, full: Tensor) -> None:
    """Set a tensor from its full value, which every rank has. Not collective.

    Args:
        tensor: The plain or sharded tensor, which is set in place.
        full: The full value.
    """
    if is_sharded(tensor):
        _set_part(tensor, full, source=None)
    else:
        tensor.copy_(full)


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor.

    Args:
        tensor: A plain or sharded tensor.

    Returns:
        The live part, without gradient.
    """
    with torch.no_grad():
        local: Any = tensor.detach()
        return local.to_local() if is_sharded(tensor) else local  # type: ignore[no-any-return]


def reshard(module: nn.Module) -> None:
    """Let every parameter of an FSDP2 module be its shard again.

    A forward pass without a backward pass leaves full parameters behind. The next one would use them again, and not
    the values that have been set meanwhile.

    Args:
        module: The live module. Nothing happens to modules that FSDP2 does not manage.
    """
    for part in module.modules():
        fsdp: Any = part
        if hasattr(fsdp, "reshard") and hasattr(fsdp, "unshard"):
            fsdp.reshard()


def refuse_unknown_shards(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose parts this version cannot gather and set.

    Args:
        name: Name of the tensor.
        tensor: A plain or sharded tensor.

    Raises:
        ConfigError: Its parts are not spread over all ranks of this site, or are sums still to be made.
    """
    if not is_sharded(tensor):
        return
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if "src_data_rank" not in signature(distribute_tensor).parameters:
        raise ConfigError(
            f"PyTorch {torch.__version__} cannot set a parameter that is sharded", where=name, fix="install PyTorch 2.7"
        )
    sharded: Any = tensor
    world = dist.get_world_size() if dist.is_initialized() else 1
    if sharded.device_mesh.size() != world:
        reason = f"lies on {sharded.device_mesh.size()} of this site's {world} ranks"
    elif not all(type(placement) in (Shard, Replicate) for placement in sharded.placements):
        reason = f"is placed as {', '.join(map(str, sharded.placements))}, which has not been tested"
    else:
        return
    raise ConfigError(f"a parameter that should travel {reason}", where=name, fix=_FIX)


def refuse_other_sharding(module: nn.Module) -> None:
    """Refuse a module that is sharded by something else than DTensors.

    Args:
        module: The live module, in its wrapper.

    Raises:
        ConfigError: FSDP1 or DeepSpeed has split its parameters.
    """
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()) or _is_of(module, "deepspeed."):
        reason = "DeepSpeed keeps master copies of the weights that new global weights would not reach"
    elif any(_is_of(part, "torch.distributed.fsdp.fully_sharded") for part in module.modules()):
        reason = "FSDP1 puts the parameters of a layer into one flat tensor, without names and shapes that could travel"
    else:
        return
    raise ConfigError(f"this model cannot be federated: {reason}", where=type(module).__name__, fix=_FIX)


def _is_of(module: nn.Module, package: str) -> bool:
    return any(f"{cls.__module__}.".startswith(package) for cls in type(module).__mro__)


def _mesh_device(tensor: Tensor) -> torch.device:
    sharded: Any = tensor
    kind = sharded.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _set_part(tensor: Tensor, full: Tensor, *, source: int | None) -> None:
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor.detach()
    full = full.to(device=_mesh_device(tensor), dtype=tensor.dtype)
    new = distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=source)
    sharded.to_local().copy_(new.to_local())
