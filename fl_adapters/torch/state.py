"""State in and out of a torch module: which tensors travel, under which names, and the one copy in each direction.

Works on the live parameters: nothing here moves, rebuilds or copies a module. PEFT models travel as their adapter,
under the names that PEFT gives the tensors in `adapter_model.safetensors`.
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
"""Tensor name -> (shape, dtype name): what two states must have in common."""

_DTYPES: dict[torch.dtype, np.dtype[Any]] = {getattr(torch, n): d for n, d in DTYPES.items() if hasattr(torch, n)}
_TORCH_DTYPES = {dtype: torch_dtype for torch_dtype, dtype in _DTYPES.items()}
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16)}  # how types that torch and NumPy do not share travel
_SHOWN_DIFFERENCES = 20


def unwrap(module: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if "_orig_mod" in module._modules:  # torch.compile
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        else:
            return module


def plain_name(name: str) -> str:
    """`name` without what torch.compile and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


@dataclass(frozen=True)
class NamedTensors:
    """Every live parameter and persistent buffer of a module; a tied tensor once, under its first name.

    tensors: name -> live tensor, in the module's order; those of a PEFT adapter under PEFT's own names.
    adapter: the names of the active PEFT adapter, empty without one.
    """

    tensors: dict[str, Tensor]
    adapter: frozenset[str]

    @staticmethod
    def of(module: nn.Module) -> NamedTensors:
        module = unwrap(module)
        live = {id(t) for t in (*module.parameters(), *module.buffers())}
        state = {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor) and id(v) in live}
        adapter = {id(tensor): plain_name(name) for name, tensor in _adapter_tensors(module, state).items()}
        first_name = {id(tensor): plain_name(name) for name, tensor in reversed(state.items())}
        tensors = {adapter.get(i, first_name[i]): tensor for tensor in state.values() if (i := id(tensor))}
        return NamedTensors(tensors, frozenset(adapter.values()))


def travelling(module: nn.Module, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Name -> live tensor of what travels, in the module's order.

    exchange: "auto" (trainable parameters and persistent buffers; for a PEFT model the adapter alone), "trainable",
    "all", or shell patterns over the names. keep_local: patterns of tensors that stay.
    Raises ConfigError for a pattern without a match, an empty choice, and tensors that cannot be averaged.
    """
    named = NamedTensors.of(module)
    admitted = set(selected(named.tensors, exchange, keep_local)) & _of_kind(named, exchange)
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


def frozen_rest(module: nn.Module, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Name -> live parameter of what neither travels nor is trained: the base that all sites must share."""
    travels = travelling(module, exchange, keep_local)
    return {
        name: tensor
        for name, tensor in NamedTensors.of(module).tensors.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if name not in travels and not matches(name, keep_local)
        if ".original_module." not in name  # PEFT's untrained twin of a module to save: not a part of the model
    }


class TorchState:
    """The tensors of one module that travel: `get_state` to host arrays, `set_state` in place.

    Holds the live tensors and one reused host buffer per tensor.
    """

    capabilities: frozenset[str] = frozenset()

    def __init__(self, module: nn.Module, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()) -> None:
        self.tensors = travelling(module, exchange, keep_local)
        self._host: dict[str, Tensor] = {}

    @property
    def specs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype name) of every tensor that travels."""
        return {name: (tuple(t.shape), _DTYPES[t.dtype].name) for name, t in self.tensors.items()}

    @torch.no_grad()
    def get_state(self) -> dict[str, Array]:
        """Copy every tensor to its host buffer. The arrays are views of these buffers: valid until the next call."""
        for name, tensor in self.tensors.items():
            if name not in self._host:
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._host[name].copy_(tensor)
        return {name: as_array(buffer) for name, buffer in self._host.items()}

    def set_state(self, arrays: Arrays) -> None:
        """Copy `arrays` into the live tensors, in place. Raises StateMismatchError, before touching any of them."""
        self.check(specs_of(arrays))
        for name, array in arrays.items():
            self.copy_in(name, array)

    def set_final(self, arrays: Arrays) -> None:
        """`set_state` with the global model after the last round, which the user's own code goes on with."""
        self.set_state(arrays)

    def set_apart(self) -> Arrays:
        """The global model that was set last, for `set_final`. Borrowed like that of `get_state`."""
        return self.get_state()

    def check(self, specs: Specs) -> None:
        """Raise StateMismatchError with a line per tensor where `specs` differ from the module's own."""
        lines = differences(self.specs, specs)
        if lines:
            raise StateMismatchError(
                "the tensors that arrived do not fit the model:\n" + "\n".join(lines),
                where="the model of this process",
                fix="build the same model, and choose the same `exchange` and `keep_local`, at every site",
            )

    @torch.no_grad()
    def copy_in(self, name: str, array: Array) -> None:
        """Copy one checked array into the live tensor `name`."""
        self.tensors[name].copy_(as_tensor(array))


def specs_of(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype name) of host arrays."""
    return {name: (tuple(array.shape), array.dtype.name) for name, array in arrays.items()}


def differences(expected: Specs, got: Specs) -> list[str]:
    """One line per tensor that is missing, unexpected, or of another shape or dtype; at most 20, then a count."""
    lines = [f"  missing: {name} {_spec(spec)}" for name, spec in expected.items() if name not in got]
    lines += [f"  unexpected: {name} {_spec(spec)}" for name, spec in got.items() if name not in expected]
    for name, spec in expected.items():
        if name in got and got[name] != spec:
            lines.append(f"  differs: {name} is {_spec(spec)} here and {_spec(got[name])} in what arrived")
    if len(lines) > _SHOWN_DIFFERENCES:
        lines = [*lines[:_SHOWN_DIFFERENCES], f"  and {len(lines) - _SHOWN_DIFFERENCES} more"]
    return lines


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """NumPy's or `ml_dtypes`' twin of a torch dtype. KeyError where there is none."""
    return _DTYPES[dtype]


def as_array(tensor: Tensor) -> Array:
    """A NumPy view of a host tensor, bit for bit; bfloat16 and float8 as their `ml_dtypes` twins."""
    dtype = _DTYPES[tensor.dtype]
    if hasattr(np, dtype.name):
        return tensor.numpy()
    return tensor.view(_BITS[dtype.itemsize][0]).numpy().view(dtype)


def as_tensor(array: Array) -> Tensor:
    """A host tensor over the bytes of `array` (of a copy where the array is read-only)."""
    if not array.flags.writeable:
        array = array.copy()
    dtype = _TORCH_DTYPES.get(array.dtype)
    if dtype is None:
        raise StateMismatchError(f"torch has no dtype for {array.dtype.name}", fix="send a dtype that torch knows")
    if hasattr(np, array.dtype.name):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(_BITS[array.dtype.itemsize][1])).view(dtype)


def _of_kind(named: NamedTensors, exchange: Exchange) -> set[str]:
    """The names that the word `exchange` stands for; all of them for patterns."""
    trainable = {name for name, tensor in named.tensors.items() if tensor.requires_grad}
    if exchange == "trainable":
        return trainable
    if exchange != "auto":
        return set(named.tensors)
    if not named.adapter:
        return trainable | {name for name, tensor in named.tensors.items() if not isinstance(tensor, nn.Parameter)}
    if left := sorted(trainable - named.adapter):
        warnings.warn(
            f"trained here, but not a part of the PEFT adapter, so not exchanged: {', '.join(left[:4])}"
            f"{' ...' if len(left) > 4 else ''}; to exchange it use exchange='trainable' or modules_to_save",
            stacklevel=2,
        )
    return set(named.adapter)


def _adapter_tensors(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's name -> live tensor of the active adapter; empty where `module` is no PEFT model."""
    if not hasattr(module, "peft_config") or not hasattr(module, "active_adapters"):
        return {}
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(module, PeftModel):
        return {}  # adapters that transformers injected itself: their parameters are the trainable ones
    active: list[str] = list(module.active_adapters)
    if len(active) != 1:
        raise ConfigError(
            f"{len(active)} PEFT adapters are active: {', '.join(active)}",
            where=type(module).__name__,
            fix="activate the one to be federated with model.set_adapter(name)",
        )
    # Stand-ins go in, each filled with the number of a live tensor, and come out under the names that PEFT saves
    # them by. PEFT may copy them on the way, or cut them (then they do not stand for a live tensor any more).
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
    # prompt learning saves a computed prompt instead of its parameters: take the parameters
    return {name: tensor for name, tensor in state.items() if tensor.requires_grad}


def _number(stand_in: Tensor) -> int:
    """What a stand-in is filled with; -1 for a tensor that is none."""
    if stand_in.dtype != torch.float64 or stand_in.numel() == 0:
        return -1
    return int(stand_in[(0,) * stand_in.dim()])


def _check_can_travel(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ConfigError("a tensor that travels is not loaded (meta device)", where=name, fix="do not offload it")
    if is_sharded(tensor):
        raise ConfigError(
            "a model sharded by FSDP can be federated by its PEFT adapter alone",
            where=name,
            fix="train an adapter with peft, or use DDP",
        )
    if tensor.dtype not in _DTYPES:
        raise ConfigError(f"tensors of dtype {tensor.dtype} cannot travel", where=name, fix="leave it out: keep_local=")
    if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        raise ConfigError(
            f"a quantised weight ({tensor.dtype}) cannot be averaged",
            where=name,
            fix="train an adapter on the quantised model and exchange that alone (exchange='auto')",
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of `tensor` only (a DTensor, of FSDP2)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself; a sharded one gathered, which is a collective of all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _spec(spec: tuple[tuple[int, ...], str]) -> str:
    return f"{spec[1]}{list(spec[0])}"
