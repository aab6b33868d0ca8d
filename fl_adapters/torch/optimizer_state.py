"""Optimizer state in and out of a torch optimizer, keyed by parameter name, for the `optimizer_state` policies.

Moments are named "<kind>/<parameter>", such as "exp_avg/encoder.weight", and have the parameter's shape; the step
counters "step/<parameter>" are int64, so that the server combines them by maximum and averages the moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_adapters.torch.state import as_array, as_tensor, differences, numpy_dtype, specs_of
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Array, Arrays

STEP = "step"


class OptimizerState:
    """The state of `optimizer` that belongs to `tensors` (parameter name -> live parameter).

    `optimizer` is a torch optimizer or a thin wrapper around one (accelerate's), with `state` and `param_groups`.
    """

    def __init__(self, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        optimized = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        self._parameters = {name: tensor for name, tensor in tensors.items() if id(tensor) in optimized}

    @property
    def names(self) -> frozenset[str]:
        """The parameters whose state this is."""
        return frozenset(self._parameters)

    def reset(self) -> None:
        """Zero moments and bias-correction counters; learning rates and schedules keep their position."""
        self._optimizer.state.clear()  # rebuilt, as zeros, by the next step
        for group in self._optimizer.param_groups:
            if STEP in group:  # optimizers that count in the group
                group[STEP] = torch.zeros_like(group[STEP]) if isinstance(group[STEP], Tensor) else 0

    def get(self) -> dict[str, Array]:
        """Host copies of every moment, and the step counters. Empty before the first step.

        A parameter without state as yet (no gradient so far) counts as zeros, so that all sites send the same names.
        Raises ConfigError where the state cannot be averaged.
        """
        kinds = self._kinds()
        arrays: dict[str, Array] = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            for kind in kinds:
                arrays[f"{kind}/{name}"] = _host(kind, state.get(kind), parameter)
        return arrays

    @torch.no_grad()
    def set(self, arrays: Arrays) -> None:
        """Copy averaged moments in place; state that the optimizer has not made yet is made.

        Raises StateMismatchError, before touching anything, when names, shapes or dtypes do not fit.
        """
        self._check(arrays)
        for full_name, array in arrays.items():
            kind, _, name = full_name.partition("/")
            parameter = self._parameters[name]
            state, present = self._optimizer.state[parameter], self._optimizer.state[parameter].get(kind)
            if isinstance(present, Tensor):
                present.copy_(as_tensor(array))
            elif kind == STEP:
                state[kind] = int(array) if isinstance(present, int) else _new_step(self._optimizer, parameter, array)
            else:
                value = as_tensor(array)
                state[kind] = torch.empty_like(value, device=parameter.device).copy_(value)

    def refuse_if_not_averageable(self) -> None:
        """Raise ConfigError when this optimizer is known to keep state that cannot be averaged."""
        where = type(self._optimizer).__name__
        module = type(self._optimizer).__module__
        if "adafactor" in where.lower():
            raise _refusal("its second moments are factored into rows and columns", where)
        if "bitsandbytes" in module or "8bit" in where.lower() or "4bit" in where.lower():
            raise _refusal("its moments are quantised", where)

    def _kinds(self) -> list[str]:
        """The kinds of state to send, in a fixed order: those that any parameter has, each checked."""
        self.refuse_if_not_averageable()
        kinds: dict[str, None] = {}
        for name, parameter in self._parameters.items():
            for kind, value in self._optimizer.state.get(parameter, {}).items():
                if value is None:  # SGD without a momentum buffer as yet
                    continue
                _check_averageable(kind, value, parameter, f"{type(self._optimizer).__name__}, {name}")
                kinds[kind] = None
        return sorted(kinds)

    def _check(self, arrays: Arrays) -> None:
        got = specs_of(arrays)
        kinds = sorted({name.partition("/")[0] for name in got})
        expected: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, parameter in self._parameters.items():
            for kind in kinds:
                value = self._optimizer.state.get(parameter, {}).get(kind)
                like = value if isinstance(value, Tensor) else parameter
                shape = tuple(like.shape)
                if value is None and got.get(f"{kind}/{name}", (shape,))[0] == ():
                    shape = ()  # a scalar that this optimizer has not made yet
                expected[f"{kind}/{name}"] = ((), "int64") if kind == STEP else (shape, numpy_dtype(like.dtype).name)
        if lines := differences(expected, got):
            raise StateMismatchError(
                "the optimizer moments that arrived do not fit the optimizer:\n" + "\n".join(lines),
                where=type(self._optimizer).__name__,
                fix="use the same optimizer and the same parameters at every site, or optimizer_state='keep'",
            )


def _host(kind: str, value: object, parameter: Tensor) -> Array:
    """A fresh host array of one piece of state; zeros where there is none as yet."""
    if kind == STEP:
        return np.array(0 if value is None else int(value), dtype=np.int64)  # type: ignore[call-overload]
    if isinstance(value, Tensor):
        return as_array(value.detach().to("cpu", copy=True))
    return as_array(torch.zeros(parameter.shape, dtype=parameter.dtype))


def _check_averageable(kind: str, value: object, parameter: Tensor, where: str) -> None:
    if kind == STEP and (isinstance(value, int) or (isinstance(value, Tensor) and value.numel() == 1)):
        return
    if not isinstance(value, Tensor):
        raise _refusal(f"{kind!r} is no tensor", where)
    if not value.is_floating_point():
        raise _refusal(f"{kind!r} is quantised or an index ({value.dtype})", where)
    if value.shape != parameter.shape and value.numel() != 1:
        shapes = f"{list(value.shape)} for a parameter of {list(parameter.shape)}"
        raise _refusal(f"{kind!r} is factored, of shape {shapes}", where)


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
    on_device = bool(group.get("capturable") or group.get("fused"))  # else torch keeps the counter on the host
    return torch.tensor(float(array), dtype=torch.float32, device=parameter.device if on_device else "cpu")
