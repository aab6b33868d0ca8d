"""What is added to the gradients of a torch model before each optimizer step, and what is noted of these steps.

Unscaled gradients, after accumulation; the user's loss is as it was. Nothing here knows of a trainer: its adapter
calls `add`, or lets `follow` hang it on the optimizer's own step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fl_adapters.torch.state import as_array
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

_Number = float | Tensor


class GradientCorrection:
    """gradient += mu (w - anchor) + offset, for each of `parameters` (name -> live parameter) that has a gradient.

    Holds a copy of the anchors and offsets on the parameters' devices. All ranks add the same. Does nothing, and notes
    nothing, until `begin`.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._handles: list[RemovableHandle] = []
        self._mu = 0.0
        self._anchors: dict[str, Tensor] = {}
        self._offsets: dict[str, Tensor] = {}
        self._active = False
        self.meter: StepMeter | None = None
        self.steps = 0

    def follow(self, optimizers: Sequence[Any]) -> None:
        """Let every step of these optimizers call `add` first, until `close`: where the trainer calls `step()` with
        gradients that are complete, and through a gradient scaler if it has one."""
        for optimizer in optimizers:
            handle = plain(optimizer).register_step_pre_hook(self._before_step)
            self._handles.append(handle)

    def close(self) -> None:
        """No more corrections."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end()

    def begin(
        self,
        *,
        mu: float = 0.0,
        anchors: Mapping[str, Tensor] | None = None,
        offsets: Mapping[str, Tensor] | None = None,
        meter: StepMeter | None = None,
    ) -> None:
        """What holds from the next step on. anchors, offsets: by parameter name, on any device; copied.

        A parameter without an anchor or an offset gets none. meter: notes the steps.
        """
        self._mu, self.meter, self.steps, self._active = mu, meter, 0, True
        self._anchors = self._copied(anchors or {}, self._anchors)
        self._offsets = self._copied(offsets or {}, self._offsets)

    def end(self) -> None:
        """Gradients are the script's own from here on."""
        self._active, self._anchors, self._offsets, self.meter = False, {}, {}, None

    @torch.no_grad()
    def add(self, optimizer: Any, *, scale: _Number | None = None, may_skip: bool = False) -> None:
        """Correct the gradients that the next step of `optimizer` uses.

        scale: what the gradients are multiplied by still; None: nothing. may_skip: a gradient scaler leaves the step
        out where a gradient is not finite; such a step is not noted. Raises ConfigError for sparse gradients.
        """
        if not self._active:
            return
        groups = [self._with_gradients(group) for group in plain(optimizer).param_groups]
        found = [(name, gradient) for group in groups for name, gradient, _ in group]
        if not found:
            return
        self.steps += 1
        if self.meter is not None:
            self.meter.note(plain(optimizer), groups, scale, _all_finite(found) if may_skip else 1.0)
        for name, gradient, parameter in (entry for group in groups for entry in group):
            if (anchor := self._anchors.get(name)) is not None:
                _add(gradient, (parameter - anchor).mul_(self._mu), scale)
            if (offset := self._offsets.get(name)) is not None:
                _add(gradient, offset, scale)

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        others = (value for value in (*args, kwargs.get("closure")) if value is not optimizer)
        if self._active and any(value is not None for value in others):
            raise ConfigError(
                "gradients cannot be corrected where the optimizer computes them itself, in a closure",
                where=type(optimizer).__name__,
                fix="choose another optimizer, or a strategy that leaves gradients alone, such as fedavg",
            )
        scale = getattr(optimizer, "grad_scale", None)  # there while a scaler lets a fused optimizer unscale
        self.add(optimizer, scale=scale, may_skip=scale is not None)

    def _with_gradients(self, group: Mapping[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        found = []
        for parameter in group["params"]:
            name = self._names.get(id(parameter))
            if name is None or parameter.grad is None:
                continue
            if parameter.grad.layout != torch.strided:
                raise ConfigError(
                    "a sparse gradient cannot be corrected",
                    where=name,
                    fix="make the embedding with sparse=False, or keep it at the site: keep_local=",
                )
            found.append((name, parameter.grad, parameter))
        return found

    @torch.no_grad()
    def _copied(self, given: Mapping[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in given.items():
            kept = before.get(name)
            copies[name] = torch.empty_like(self._parameters[name]) if kept is None else kept
            copies[name].copy_(tensor)
        return copies


class StepMeter:
    """The steps of one round: for each parameter the sum of the rates it was trained with, and (`gradients`) the sum
    of its gradients before they were corrected. Read it once, at the round's end."""

    def __init__(self, *, gradients: bool) -> None:
        self.gradients = gradients
        self._rates: dict[tuple[int, int], _Number] = {}
        self._counts: dict[tuple[int, int], _Number] = {}
        self._group_of: dict[str, tuple[int, int]] = {}
        self._sums: dict[str, Tensor] = {}

    def note(
        self,
        optimizer: Any,
        groups: Sequence[Sequence[tuple[str, Tensor, Tensor]]],
        scale: _Number | None,
        applied: _Number,
    ) -> None:
        """One step of `optimizer`. applied: 1, or 0 for one that is left out; on the device, so that nobody waits."""
        for index, (group, found) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
            key = (id(optimizer), index)
            self._rates[key] = self._rates.get(key, 0.0) + group["lr"] * applied
            self._counts[key] = self._counts.get(key, 0.0) + applied
            for name, gradient, _ in found:
                self._group_of[name] = key
                if self.gradients:
                    self._sum(name, gradient, scale, applied)

    def rates(self) -> dict[str, float]:
        """Parameter name -> sum of the learning rates of its steps."""
        values = {key: float(rate) for key, rate in self._rates.items()}
        return {name: values[key] for name, key in self._group_of.items()}

    def means(self) -> dict[str, Array]:
        """Parameter name -> mean of its gradients; a step that gave it none counts as zero."""
        counts = {key: float(count) for key, count in self._counts.items()}
        trained = {name: total for name, total in self._sums.items() if counts[self._group_of[name]]}
        return {n: as_array((total / counts[self._group_of[n]]).cpu()) for n, total in trained.items()}

    def _sum(self, name: str, gradient: Tensor, scale: _Number | None, applied: _Number) -> None:
        wide = gradient.dtype if gradient.dtype == torch.float64 else torch.float32
        value = gradient.to(wide) if scale is None else gradient.to(wide) / scale
        if isinstance(applied, Tensor):
            value = torch.where(applied.to(value.device) > 0, value, torch.zeros_like(value))
        total = self._sums.get(name)
        self._sums[name] = value.clone() if total is None else total.add_(value)


def plain(optimizer: Any) -> Any:
    """The torch optimizer within a thin wrapper such as accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def is_plain_sgd(optimizer: Any) -> bool:
    """Whether a step is w -= lr g and no more (weight decay counts as a part of g)."""
    own = plain(optimizer)
    return type(own) is torch.optim.SGD and all(not g["momentum"] and not g["maximize"] for g in own.param_groups)


def _add(gradient: Tensor, value: Tensor, scale: _Number | None) -> None:
    gradient.add_(value if scale is None else value * scale)


def _all_finite(found: Sequence[tuple[str, Tensor]]) -> Tensor:
    flags = [gradient.isfinite().all().to(torch.float32) for _, gradient in found]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).min()
