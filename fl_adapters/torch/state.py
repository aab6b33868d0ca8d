"""The state of a live torch module: which tensors travel, under which names, and how they are copied in and out.

Tensors are copied in place; modules are never moved, rebuilt or copied. Of a PEFT model the adapter travels, under the
names that its tensors have in `adapter_model.safetensors`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_adapters.participant.exchange import matches, selected
from fl_adapters.participant.options import Exchange
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.dtypes import DTYPES

Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensor name -> (shape, dtype name)."""

_DTYPES: dict[torch.dtype, np.dtype[Any]] = {getattr(torch, n): d for n, d in DTYPES.items() if hasattr(torch, n)}
_TORCH_DTYPES = {dtype: torch_dtype for torch_dtype, dtype in _DTYPES.items()}
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16)}  # carry dtypes that torch cannot convert to NumPy
_MAX_DIFFERENCES = 20


def unwrap(module: nn.Module) -> nn.Module:
    """Return the user's own module, without its wrappers.

    Args:
        module: A module, possibly inside DistributedDataParallel, DataParallel or torch.compile, in any order.

    Returns:
        The innermost module.
    """
    while True:
        if "_orig_mod" in module._modules:  # torch.compile
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        else:
            return module


def plain_name(name: str) -> str:
    """Return a parameter's name without the parts that torch.compile and activation checkpointing add.

    Args:
        name: Name of a parameter or buffer.

    Returns:
        The name that it has in the unwrapped module.
    """
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


@dataclass(frozen=True)
class NamedTensors:
    """The live parameters and persistent buffers of a module. A tied tensor appears once, under its first name.

    Attributes:
        tensors: Name -> live tensor, in the module's order. Tensors of a PEFT adapter have PEFT's own names.
        adapter: Names of the tensors of the active PEFT adapter; empty without one.
    """

    tensors: dict[str, Tensor]
    adapter: frozenset[str]

    @staticmethod
    def of(module: nn.Module) -> NamedTensors:
        """Return the tensors of a module.

        Args:
            module: The live module, with its wrappers or without.

        Returns:
            Its tensors by name.

        Raises:
            ConfigError: Several PEFT adapters are active.
        """
        module = unwrap(module)
        live = {id(t) for t in (*module.parameters(), *module.buffers())}
        state = {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor) and id(v) in live}
        adapter = {id(tensor): plain_name(name) for name, tensor in _adapter_tensors(module, state).items()}
        first_name = {id(tensor): plain_name(name) for name, tensor in reversed(state.items())}
        tensors = {adapter.get(i, first_name[i]): tensor for tensor in state.values() if (i := id(tensor))}
        return NamedTensors(tensors, frozenset(adapter.values()))


def exchanged_tensors(
    module: nn.Module, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a module that travel.

    Args:
        module: The live module, with its wrappers or without.
        exchange: "auto" (trainable parameters and persistent buffers; of a PEFT model only the adapter), "trainable",
            "all", or name patterns with the wildcards of the shell.
        keep_local: Name patterns of tensors that never leave the site.

    Returns:
        Name -> live tensor, in the module's order.

    Raises:
        ConfigError: A pattern matches no name, no tensor is selected, or a selected tensor cannot be averaged.
    """
    named = NamedTensors.of(module)
    admitted = set(selected(named.tensors, exchange, keep_local)) & _names_of_kind(named, exchange)
    tensors = {name: tensor for name, tensor in named.tensors.items() if name in admitted}
    if not tensors:
        raise ConfigError(
            "no tensor of the model would travel",
            where=f"exchange={exchange!r}, keep_local={list(keep_local)!r}",
            fix="train at least one parameter, or choose what travels with exchange=",
        )
    for name, tensor in tensors.items():
        _check_can_travel(name, tensor)
    return tensors


def frozen_base(module: nn.Module, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return the parameters that neither travel nor are trained: the base that must be equal at all sites.

    Args:
        module: The live module, with its wrappers or without.
        exchange: What travels; see `exchanged_tensors`.
        keep_local: Name patterns of tensors that never leave the site. They are left out here too.

    Returns:
        Name -> live parameter, in the module's order.

    Raises:
        ConfigError: As `exchanged_tensors` does.
    """
    exchanged = exchanged_tensors(module, exchange, keep_local)
    return {
        name: tensor
        for name, tensor in NamedTensors.of(module).tensors.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if name not in exchanged and not matches(name, keep_local)
        if ".original_module." not in name  # PEFT's untrained copy of a module to save; the model does not use it
    }


class TorchState:
    """The exchanged tensors of a live torch module. Implements `fl_adapters.adapter.Adapter`.

    It keeps references to the live tensors, and one host buffer for each of them, made by the first `get_state`.

    Attributes:
        tensors: Name -> live tensor that travels, in the module's order.
        capabilities: Empty; the handshake reads those of `LiveModel`.

    Example:
        ```python
        from torch import nn

        from fl_adapters.torch.state import TorchState

        state = TorchState(nn.Linear(3, 1))
        arrays = {name: array + 1 for name, array in state.get_state().items()}
        state.set_state(arrays)
        ```
    """

    capabilities: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()) -> None:
        """Select the tensors that travel.

        Args:
            module: The live module, with its wrappers or without.
            exchange: What travels: "auto", "trainable", "all", or name patterns; see `exchanged_tensors`.
            keep_local: Name patterns of tensors that never leave the site.

        Raises:
            ConfigError: A pattern matches no name, no tensor is selected, or a selected tensor cannot be averaged.
        """
        self.tensors = exchanged_tensors(module, exchange, keep_local)
        self._host: dict[str, Tensor] = {}

    @property
    def specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of the tensors that travel: name -> (shape, dtype name)."""
        return {name: (tuple(t.shape), _DTYPES[t.dtype].name) for name, t in self.tensors.items()}

    @torch.no_grad()
    def get_state(self) -> dict[str, Array]:
        """Copy every tensor to its host buffer.

        Returns:
            Name -> view of the buffer, in the module's order. Valid until the next call. bfloat16 and float8 have the
            dtypes of `ml_dtypes`.
        """
        for name, tensor in self.tensors.items():
            if name not in self._host:
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._host[name].copy_(tensor)
        return {name: as_array(buffer) for name, buffer in self._host.items()}

    def set_state(self, arrays: Arrays) -> None:
        """Copy arrays into the live tensors, in place.

        Args:
            arrays: Arrays with the names, shapes and dtypes of `get_state`. Borrowed for the call.

        Raises:
            StateMismatchError: They do not fit the model; a line for each tensor. Nothing is changed then.
        """
        self.check(specs_of(arrays))
        for name, array in arrays.items():
            self.copy_in(name, array)

    def restore_global(self, arrays: Arrays) -> None:
        """Set the final global model, with which the user's own code continues.

        Args:
            arrays: The arrays of the last task, or those of `snapshot_global`. Borrowed for the call.

        Raises:
            StateMismatchError: They do not fit the model. Nothing is changed then.
        """
        self.set_state(arrays)

    def snapshot_global(self) -> Arrays:
        """Return the global model that was set last, for `restore_global`. Call it before further training.

        Returns:
            Name -> host array. Borrowed until the next call of `get_state`.
        """
        return self.get_state()

    def check(self, specs: Specs) -> None:
        """Check that tensors fit the model.

        Args:
            specs: Tensor name -> (shape, dtype name).

        Raises:
            StateMismatchError: They do not fit; a line for each tensor.
        """
        lines = differences(self.specs, specs)
        if lines:
            raise StateMismatchError(
                "the tensors that arrived do not fit the model:\n" + "\n".join(lines),
                where="the model of this process",
                fix="build the same model, and choose the same `exchange` and `keep_local`, at every site",
            )

    @torch.no_grad()
    def copy_in(self, name: str, array: Array) -> None:
        """Copy an array into a live tensor.

        Args:
            name: Name of the tensor.
            array: Its values, which `check` has accepted. Borrowed for the call.
        """
        self.tensors[name].copy_(as_tensor(array))


def specs_of(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes of host arrays.

    Args:
        arrays: Name -> array.

    Returns:
        Name -> (shape, dtype name).
    """
    return {name: (tuple(array.shape), array.dtype.name) for name, array in arrays.items()}


def differences(expected: Specs, received: Specs) -> list[str]:
    """Describe the tensors that are missing, unexpected, or of another shape or dtype.

    Args:
        expected: Shapes and dtypes in this process.
        received: Shapes and dtypes of what arrived.

    Returns:
        One line for each tensor: at most 20, then a count of the others. Empty if nothing differs.
    """
    lines = [f"  missing: {name} {_describe(spec)}" for name, spec in expected.items() if name not in received]
    lines += [f"  unexpected: {name} {_describe(spec)}" for name, spec in received.items() if name not in expected]
    for name, spec in expected.items():
        if name in received and received[name] != spec:
            lines.append(f"  differs: {name} is {_describe(spec)} here and {_describe(received[name])} in what arrived")
    if len(lines) > _MAX_DIFFERENCES:
        lines = [*lines[:_MAX_DIFFERENCES], f"  and {len(lines) - _MAX_DIFFERENCES} more"]
    return lines


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the NumPy dtype of the same values.

    Args:
        dtype: A torch dtype.

    Returns:
        NumPy's own dtype, or that of `ml_dtypes` for bfloat16 and float8.

    Raises:
        KeyError: There is none, so tensors of this dtype cannot travel.
    """
    return _DTYPES[dtype]


def as_array(tensor: Tensor) -> Array:
    """Return a NumPy view of a host tensor.

    Args:
        tensor: A tensor on the CPU.

    Returns:
        An array over the same memory. bfloat16 and float8 have the dtypes of `ml_dtypes`.
    """
    dtype = _DTYPES[tensor.dtype]
    if hasattr(np, dtype.name):
        return tensor.numpy()
    return tensor.view(_BITS[dtype.itemsize][0]).numpy().view(dtype)


def as_tensor(array: Array) -> Tensor:
    """Return a host tensor with the values of an array.

    Args:
        array: The array.

    Returns:
        A tensor over the same memory; over a copy if the array is read-only.

    Raises:
        StateMismatchError: torch has no such dtype.
    """
    if not array.flags.writeable:
        array = array.copy()
    dtype = _TORCH_DTYPES.get(array.dtype)
    if dtype is None:
        raise StateMismatchError(f"torch has no dtype {array.dtype.name}", fix="send arrays of a dtype that torch has")
    if hasattr(np, array.dtype.name):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(_BITS[array.dtype.itemsize][1])).view(dtype)


def _names_of_kind(named: NamedTensors, exchange: Exchange) -> set[str]:
    """Return the names that "auto", "trainable" or "all" selects. For patterns, return all names."""
    trainable = {name for name, tensor in named.tensors.items() if tensor.requires_grad}
    if exchange == "trainable":
        return trainable
    if exchange != "auto":
        return set(named.tensors)
    if not named.adapter:
        return trainable | {name for name, tensor in named.tensors.items() if not isinstance(tensor, nn.Parameter)}
    if outside := sorted(trainable - named.adapter):
        warnings.warn(
            f"these parameters are trained but not exchanged, because they are not a part of the PEFT adapter: "
            f"{', '.join(outside[:4])}{' ...' if len(outside) > 4 else ''}; to exchange them, use "
            "exchange='trainable' or PEFT's modules_to_save",
            stacklevel=2,
        )
    return set(named.adapter)


def _adapter_tensors(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the active adapter under PEFT's names; none if `module` is not a PEFT model."""
    if not hasattr(module, "peft_config") or not hasattr(module, "active_adapters"):
        return {}
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(module, PeftModel):
        return {}  # transformers has injected the adapter itself: its parameters are the trainable ones
    active: list[str] = list(module.active_adapters)
    if len(active) != 1:
        raise ConfigError(
            f"{len(active)} PEFT adapters are active: {', '.join(active)}",
            where=type(module).__name__,
            fix="activate the one to be exchanged with model.set_adapter(name)",
        )
    # PEFT's names are known only to PEFT's save function, which may copy tensors. So it gets stand-ins instead, each
    # filled with the number of a live tensor. A stand-in that it has cut no longer stands for a live tensor.
    raw_names = list(state)
    stand_ins = {
        name: torch.full((1,) * tensor.dim(), float(number), dtype=torch.float64).expand(tensor.shape)
        for number, (name, tensor) in enumerate(state.items())
    }
    saved = get_peft_model_state_dict(module, stand_ins, adapter_name=active[0], save_embedding_layers=False)
    numbers = {name: _number(tensor) for name, tensor in saved.items()}
    if all(
        n in range(len(raw_names)) and saved[name].shape == state[raw_names[n]].shape for name, n in numbers.items()
    ):
        return {name: state[raw_names[number]] for name, number in numbers.items()}
    # prompt learning saves a computed prompt, but what must travel is its parameters
    return {name: tensor for name, tensor in state.items() if tensor.requires_grad}


def _number(stand_in: Tensor) -> int:
    """Return the number that a stand-in is filled with, or -1 for a tensor that is not a stand-in."""
    if stand_in.dtype != torch.float64 or stand_in.numel() == 0:
        return -1
    return int(stand_in[(0,) * stand_in.dim()])


def _check_can_travel(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ConfigError(
            "a tensor that should travel is not in memory (meta device)", where=name, fix="do not offload it"
        )
    if is_sharded(tensor):
        raise ConfigError(
            "of a model sharded by FSDP, only a PEFT adapter can travel",
            where=name,
            fix="train an adapter with peft, or use DDP",
        )
    if tensor.dtype not in _DTYPES:
        raise ConfigError(
            f"tensors of dtype {tensor.dtype} cannot travel",
            where=name,
            fix=f"keep it at the site: keep_local=[{name!r}]",
        )
    if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        raise ConfigError(
            f"a quantised weight ({tensor.dtype}) cannot be averaged",
            where=name,
            fix="train a PEFT adapter on the quantised model, and exchange only that (exchange='auto')",
        )


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a part of the tensor: a DTensor, as FSDP2 makes them.

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
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _describe(spec: tuple[tuple[int, ...], str]) -> str:
    return f"{spec[1]}{list(spec[0])}"
