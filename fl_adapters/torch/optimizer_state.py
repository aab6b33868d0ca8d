"""The moments of a torch optimizer by parameter name, for `optimizer_state="reset"` and `"average"`.

A moment is named "<kind>/<parameter>", such as "exp_avg/encoder.weight", and has the parameter's shape. The server
averages moments. A step counter, "step/<parameter>", is a scalar of dtype int64; the server takes the maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_adapters.torch.ranks.collectives import is_rank_zero
from fl_adapters.torch.ranks.shards import full_tensor, is_sharded, scatter
from fl_adapters.torch.state import Specs, as_array, as_tensor, differences, numpy_dtype, specs_of
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Array, Arrays

STEP = "step"
"""Kind of the step counters, in names and in torch's own state."""


class TorchOptimizerState:
    """The moments of one torch optimizer. Implements `fl_adapters.adapter.OptimizerState`.

    Example:
        ```python
        import torch

        from fl_adapters.torch.optimizer_state import TorchOptimizerState

        layer = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(3)).backward()
        optimizer.step()
        moments = TorchOptimizerState(optimizer, dict(layer.named_parameters()))
        moments.set(moments.get())
        ```
    """

    def __init__(self, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
        """Select the parameters whose moments travel.

        Args:
            optimizer: A torch optimizer, or a wrapper with the attribute `optimizer`, such as accelerate's.
            tensors: Name -> live tensor that travels. Those that the optimizer does not train are ignored.
        """
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        optimized = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        self._parameters = {name: tensor for name, tensor in tensors.items() if id(tensor) in optimized}

    @property
    def names(self) -> frozenset[str]:
        """Names of the parameters that the optimizer trains and that travel."""
        return frozenset(self._parameters)

    def reset(self) -> None:
        """Set moments and bias-correction counters to zero. Learning rates and schedules keep their position."""
        self._optimizer.state.clear()  # the next step makes it again, as zeros
        for group in self._optimizer.param_groups:
            if STEP in group:  # some optimizers count steps in the parameter group
                group[STEP] = torch.zeros_like(group[STEP]) if isinstance(group[STEP], Tensor) else 0

    def get(self) -> dict[str, Array]:
        """Copy moments and step counters to the host. Collective if a parameter is sharded.

        Returns:
            "<kind>/<parameter>" -> host array, which the caller owns. A parameter that has had no gradient counts as
            zeros, so that all sites send the same names. Empty before the first step. Of sharded parameters, rank 0
            has the full moments and the other ranks have none.

        Raises:
            ConfigError: The state cannot be averaged.
        """
        kinds = self._kinds()
        arrays: dict[str, Array] = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            for kind in kinds:
                array = _host(kind, state.get(kind), parameter)
                if is_rank_zero() or not is_sharded(parameter):
                    arrays[f"{kind}/{name}"] = array
        return arrays

    def set(self, arrays: Arrays) -> None:
        """Copy moments and step counters into the optimizer in place. Missing state is created.

        Args:
            arrays: Moments under the names of `get`. Borrowed for the call.

        Raises:
            StateMismatchError: Names, shapes or dtypes do not fit the optimizer. Nothing is changed then.
        """
        self.check(specs_of(arrays))
        for full_name, array in arrays.items():
            self.copy_in(full_name, array)

    @torch.no_grad()
    def copy_in(self, full_name: str, array: Array | None) -> None:
        """Copy one moment or step counter into the optimizer. Collective if its parameter is sharded.

        Args:
            full_name: Its name, as `get` gives it.
            array: Its values, which `check` has accepted. None on ranks other than 0 if the moment is sharded.
        """
        kind, _, name = full_name.partition("/")
        parameter = self._parameters[name]
        state, present = self._optimizer.state[parameter], self._optimizer.state[parameter].get(kind)
        if array is None or self.is_sharded(full_name, array.shape):
            if not isinstance(present, Tensor):
                present = state[kind] = torch.zeros_like(parameter.detach())
            scatter(present, None if array is None else as_tensor(array))
        elif isinstance(present, Tensor):
            present.copy_(as_tensor(array))
        elif kind == STEP:
            state[kind] = int(array) if isinstance(present, int) else _new_step(self._optimizer, parameter, array)
        else:
            value = as_tensor(array)
            state[kind] = torch.empty_like(value, device=parameter.device).copy_(value)

    def is_sharded(self, full_name: str, shape: tuple[int, ...]) -> bool:
        """Return whether each rank holds a part of a moment.

        Args:
            full_name: Its name, as `get` gives it.
            shape: Its shape. Scalars, such as step counters, are complete on every rank.
        """
        parameter = self._parameters.get(full_name.partition("/")[2])
        return bool(shape) and parameter is not None and is_sharded(parameter)

    def refuse_if_not_averageable(self) -> None:
        """Refuse an optimizer whose class is known to keep state that cannot be averaged.

        Raises:
            ConfigError: Its moments are factored or quantised.
        """
        name = type(self._optimizer).__name__
        module = type(self._optimizer).__module__
        if "adafactor" in name.lower():
            raise _refusal("its second moments are factored into rows and columns", name)
        if "bitsandbytes" in module or "8bit" in name.lower() or "4bit" in name.lower():
            raise _refusal("its moments are quantised", name)

    def _kinds(self) -> list[str]:
        """Return the kinds of state that any parameter has, in a fixed order, after checking each value."""
        self.refuse_if_not_averageable()
        kinds: dict[str, None] = {}
        for name, parameter in self._parameters.items():
            for kind, value in self._optimizer.state.get(parameter, {}).items():
                if value is None:  # SGD before its first step with momentum
                    continue
                _check_averageable(kind, value, parameter, f"{type(self._optimizer).__name__}, {name}")
                kinds[kind] = None
        return sorted(kinds)

    def check(self, received: Specs) -> None:
        """Check that moments fit the optimizer.

        Args:
            received: Name, as `get` gives it -> (shape, dtype name).

        Raises:
            StateMismatchError: They do not fit; a line for each moment.
        """
        kinds = sorted({name.partition("/")[0] for name in received})
        expected: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, parameter in self._parameters.items():
            for kind in kinds:
                value = self._optimizer.state.get(parameter, {}).get(kind)
                like = value if isinstance(value, Tensor) else parameter
                shape = tuple(like.shape)
                if value is None and received.get(f"{kind}/{name}", (shape,))[0] == ():
                    shape = ()  # a scalar that this optimizer will make in its first step
                expected[f"{kind}/{name}"] = ((), "int64") if kind == STEP else (shape, numpy_dtype(like.dtype).name)
        if lines := differences(expected, received):
            raise StateMismatchError(
                "the optimizer moments that arrived do not fit the optimizer:\n" + "\n".join(lines),
                where=type(self._optimizer).__name__,
                fix="use the same optimizer and the same parameters at every site, or optimizer_state='keep'",
            )


def _host(kind: str, value: object, parameter: Tensor) -> Array:
    """Return one piece of state as a new host array; zeros if there is none yet."""
    if kind == STEP:
        return np.array(0 if value is None else int(value), dtype=np.int64)  # type: ignore[call-overload]
    if isinstance(value, Tensor):
        return as_array(full_tensor(value).detach().to("cpu", copy=True))
    return as_array(torch.zeros(parameter.shape, dtype=parameter.dtype))


def _check_averageable(kind: str, value: object, parameter: Tensor, where: str) -> None:
    if kind == STEP and (isinstance(value, int) or (isinstance(value, Tensor) and value.numel() == 1)):
        return
    if not isinstance(value, Tensor):
        raise _refusal(f"its state {kind!r} is not a tensor", where)
    if not value.is_floating_point():
        raise _refusal(f"its state {kind!r} is quantised or an index ({value.dtype})", where)
    if value.shape != parameter.shape and value.numel() != 1:
        shapes = f"{list(value.shape)} for a parameter of {list(parameter.shape)}"
        raise _refusal(f"its state {kind!r} is factored, of shape {shapes}", where)


def _refusal(reason: str, where: str) -> ConfigError:
    return ConfigError(
        f"optimizer_state='average' cannot be used with this optimizer: {reason}",
        where=where,
        fix="use optimizer_state='keep' or 'reset', or an optimizer with plain moments such as torch.optim.AdamW",
    )


def _new_step(optimizer: torch.optim.Optimizer, parameter: Tensor, array: Array) -> Tensor | int:
    if not type(optimizer).__module__.startswith("torch.optim"):
        return int(array)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    on_device = bool(group.get("capturable") or group.get("fused"))  # otherwise torch keeps the counter on the host
    return torch.tensor(float(array), dtype=torch.float32, device=parameter.device if on_device else "cpu")
