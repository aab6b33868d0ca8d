"""The state of a live torch module: the tensors that travel, and how they are copied in and out.

Tensors are copied in place; modules are never moved, rebuilt or copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_adapters.participant.options import Exchange
from fl_adapters.torch.selection import exchanged_tensors
from fl_adapters.torch.spectral_norm import spectral_layers
from fl_runtime.errors import StateMismatchError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.dtypes import DTYPES

Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensor name -> (shape, dtype name)."""

_DTYPES: dict[torch.dtype, np.dtype[Any]] = {getattr(torch, n): d for n, d in DTYPES.items() if hasattr(torch, n)}
_TORCH_DTYPES = {dtype: torch_dtype for torch_dtype, dtype in _DTYPES.items()}
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16)}  # carry dtypes that torch cannot convert to NumPy
_MAX_DIFFERENCES = 20


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

    def __init__(
        self,
        module: nn.Module,
        exchange: Exchange = "auto",
        keep_local: tuple[str, ...] = (),
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Select the tensors that travel.

        Args:
            module: The live module, with its wrappers or without.
            exchange: What travels: "auto", "trainable", "all", or name patterns; see `exchanged_tensors`.
            keep_local: Name patterns of tensors that never leave the site.
            beside: Live tensors of other modules that may travel too, by name.

        Raises:
            ConfigError: A pattern matches no name, no tensor is selected, or a selected tensor cannot be averaged.
        """
        self.tensors = exchanged_tensors(module, exchange, keep_local, beside)
        self._spectral_layers = list(spectral_layers(module))
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
        self.derive()

    def derive(self) -> None:
        """Compute anew what follows from the weights: singular vectors of spectral normalisation.

        Call it when `copy_in` has set all tensors; `set_state` does so itself.
        """
        for layer in self._spectral_layers:
            layer.estimate()

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


def _describe(spec: tuple[tuple[int, ...], str]) -> str:
    return f"{spec[1]}{list(spec[0])}"
