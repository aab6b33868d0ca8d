"""The exchanged tensors of a model that is sharded over the ranks of a site."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from fl_adapters.participant.options import Exchange
from fl_adapters.torch.ranks.collectives import is_rank_zero, on_rank_zero
from fl_adapters.torch.ranks.shards import copy_full, full_tensor, is_sharded, own_part, reshard
from fl_adapters.torch.selection import unwrap
from fl_adapters.torch.state import TorchState, as_array, as_tensor
from fl_runtime.types import Array, Arrays


class ShardedState(TorchState):
    """The exchanged tensors of a module that FSDP2 has sharded.

    Rank 0 sends full tensors. They are gathered one at a time, so that a device holds at most one of them beside its
    shards. The host buffers of `get_state` exist on rank 0 alone.

    `get_state` is collective. While FSDP2 has gathered the module's parameters, its shards must not be set: call
    `reshard` before.
    """

    @torch.no_grad()
    def get_state(self) -> dict[str, Array]:
        """Gather every tensor into its host buffer on rank 0.

        Returns:
            Name -> view of the buffer, on rank 0; empty on the others. Valid until the next call.
        """
        for name, tensor in self.tensors.items():
            full = full_tensor(tensor)
            if is_rank_zero():
                if name not in self._host:
                    self._host[name] = torch.empty(full.shape, dtype=full.dtype)
                self._host[name].copy_(full)
        return {name: as_array(buffer) for name, buffer in self._host.items()}

    @torch.no_grad()
    def copy_in(self, name: str, array: Array) -> None:
        """Set a tensor from its full values, which every rank has. Not collective.

        Args:
            name: Name of the tensor.
            array: Its values, which `check` has accepted.
        """
        copy_full(self.tensors[name], as_tensor(array))

    def restore_global(self, arrays: Arrays) -> None:
        """Put this rank's parts of the global model back. Not collective.

        Args:
            arrays: What `snapshot_global` returned on this rank.
        """
        with torch.no_grad():
            for name, array in arrays.items():
                own_part(self.tensors[name]).copy_(as_tensor(array))
        self.derive()

    def snapshot_global(self) -> Arrays:
        """Copy this rank's parts of the global model that was set last. Not collective.

        Returns:
            Name -> part, on the host. Owned by the caller.
        """
        return {name: as_array(own_part(tensor).to("cpu", copy=True)) for name, tensor in self.tensors.items()}


def state_of(
    module: nn.Module,
    exchange: Exchange = "auto",
    keep_local: tuple[str, ...] = (),
    beside: Mapping[str, Tensor] | None = None,
) -> TorchState:
    """Return the exchanged tensors of a module, sharded or not. Arguments as for `TorchState`.

    Returns:
        A `ShardedState` if a tensor that travels is sharded, else a `TorchState`.
    """
    state = TorchState(module, exchange, keep_local, beside)
    if any(is_sharded(tensor) for tensor in state.tensors.values()):
        return ShardedState(module, exchange, keep_local, beside)
    return state


@torch.no_grad()
def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Gather what a sharded module saves, for a file that one rank writes. Collective.

    Args:
        module: The live module, with its wrappers or without.

    Returns:
        Name -> host copy, on rank 0; empty on the others. Of a PEFT model only the active adapter. A tied tensor
        appears once, under its first name.
    """
    reshard(module)
    module = unwrap(module)
    adapters: Any = module.active_adapters if hasattr(module, "peft_config") else None
    adapters = adapters() if callable(adapters) else adapters
    found: dict[str, Tensor] = {}
    seen = set[int]()
    for name, tensor in module.state_dict(keep_vars=True).items():
        saved = adapters is None or any(f".{adapter}." in f"{name}." for adapter in adapters)
        if isinstance(tensor, Tensor) and saved and id(tensor) not in seen:
            seen.add(id(tensor))
            full = full_tensor(tensor)
            if is_rank_zero():
                found[name] = full.detach().to("cpu", copy=True)
    return found


def save_module(module: nn.Module, folder: str) -> None:
    """Write a module by its own `save_pretrained` if it has one, else as `model.safetensors`.

    Collective if the module is sharded: rank 0 writes.

    Args:
        module: The live module, with its wrappers or without.
        folder: Folder to write to, on rank 0. It is made if it does not exist.
    """
    module = unwrap(module)
    reshard(module)
    if not any(is_sharded(parameter) for parameter in module.parameters()):
        _write(module, folder, None)
    elif getattr(module, "is_distributed_loading_by_transformers", False) and not hasattr(module, "peft_config"):
        save: Any = module
        save.save_pretrained(folder)  # transformers 5 sharded it, and gathers it itself
    else:
        state = full_state(module)
        on_rank_zero(lambda: _write(module, folder, state))


def _write(module: nn.Module, folder: str, state: dict[str, Tensor] | None) -> None:
    """Write the module, with these tensors in place of its own if there are any."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.safetensors")
    if callable(save_pretrained := getattr(module, "save_pretrained", None)):
        save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    elif state is not None:
        save_file(state, path, metadata={"format": "pt"})
    else:
        save_model(module, path, metadata={"format": "pt"})
