"""Corrects the gradients of a torch model before each optimizer step, and records these steps.

Corrections are added to the gradients after accumulation; the user's loss stays as it is. Nothing here depends on a
trainer: its adapter calls `add` before each step, or `follow` once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fl_adapters.torch.state import as_array
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

_Number = float | Tensor


class PrivateGradients(Protocol):
    """What changes gradients before they are corrected; see `fl_adapters.torch.local_work.dp_sgd.PrivateTraining`."""

    def change_gradients(self, optimizer: Any) -> None:
        """Replace the gradients before a step.

        Args:
            optimizer: The optimizer that is about to make a step.
        """
        ...

    def close(self) -> None:
        """Remove everything from the model."""
        ...


class GradientCorrection:
    """Adds mu * (w - anchor) + offset to the gradient of each parameter w. All ranks add the same.

    It keeps copies of anchors and offsets on the devices of the parameters. It does nothing before `begin`.

    Attributes:
        meter: Records the steps; None if nobody needs them.
        steps: Number of corrected steps since `begin`.
        private: DP-SGD, whose gradients are corrected; None without.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Correct nothing as yet.

        Args:
            parameters: Name -> live parameter whose gradient is corrected.
        """
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._handles: list[RemovableHandle] = []
        self._mu = 0.0
        self._anchors: dict[str, Tensor] = {}
        self._offsets: dict[str, Tensor] = {}
        self._active = False
        self.meter: StepMeter | None = None
        self.steps = 0
        self.private: PrivateGradients | None = None

    def follow(self, optimizers: Sequence[Any]) -> None:
        """Call `add` before every step of these optimizers, until `close`.

        For trainers that call `step()` with complete gradients, through a gradient scaler if they have one.

        Args:
            optimizers: All optimizers of the model, wrapped or not.
        """
        for optimizer in optimizers:
            handle = plain(optimizer).register_step_pre_hook(self._before_step)
            self._handles.append(handle)

    def close(self) -> None:
        """End the corrections and remove the hooks of `follow`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end()
        if self.private is not None:
            self.private.close()
            self.private = None

    def begin(
        self,
        *,
        mu: float = 0.0,
        anchors: Mapping[str, Tensor] | None = None,
        offsets: Mapping[str, Tensor] | None = None,
        meter: StepMeter | None = None,
    ) -> None:
        """Choose what corrects gradients from the next step on.

        Args:
            mu: Weight of the proximal term.
            anchors: Parameter name -> weights that the proximal term pulls to, on any device; copied. A parameter
                without an anchor is not pulled.
            offsets: Parameter name -> offset, on any device; copied. A parameter without one gets none.
            meter: Records the steps.
        """
        self._mu, self.meter, self.steps, self._active = mu, meter, 0, True
        self._anchors = self._copies(anchors or {}, self._anchors)
        self._offsets = self._copies(offsets or {}, self._offsets)

    def end(self) -> None:
        """Leave gradients as the script computes them, from the next step on."""
        self._active, self._anchors, self._offsets, self.meter = False, {}, {}, None

    @torch.no_grad()
    def add(self, optimizer: Any, *, scale: _Number | None = None, may_skip: bool = False) -> None:
        """Correct the gradients for the next step of an optimizer.

        Args:
            optimizer: The optimizer that is about to make a step, wrapped or not.
            scale: Factor that the gradients still contain; None if they are unscaled.
            may_skip: Whether a gradient scaler skips the step if a gradient is not finite. Such a step is not
                recorded.

        Raises:
            ConfigError: For sparse gradients.
        """
        if self.private is not None:
            if scale is not None:
                raise ConfigError(
                    "DP-SGD cannot clip gradients that a scaler has enlarged (float16)",
                    where="dp_sgd",
                    fix="train in float32 or bfloat16",
                )
            self.private.change_gradients(optimizer)
        if not self._active:
            return
        groups = [self._with_gradients(group) for group in plain(optimizer).param_groups]
        gradients = [(name, gradient) for group in groups for name, gradient, _ in group]
        if not gradients:
            return
        self.steps += 1
        if self.meter is not None:
            self.meter.note(plain(optimizer), groups, scale, _all_finite(gradients) if may_skip else 1.0)
        for name, gradient, parameter in (entry for group in groups for entry in group):
            if (anchor := self._anchors.get(name)) is not None:
                _add(gradient, (parameter - anchor).mul_(self._mu), scale)
            if (offset := self._offsets.get(name)) is not None:
                _add(gradient, offset, scale)

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        others = (value for value in (*args, kwargs.get("closure")) if value is not optimizer)
        if self._active and any(value is not None for value in others):
            raise ConfigError(
                "gradients cannot be corrected if the optimizer computes them itself, in a closure",
                where=type(optimizer).__name__,
                fix="choose another optimizer, or a strategy that does not change gradients, such as fedavg",
            )
        scale = getattr(optimizer, "grad_scale", None)  # set while a scaler leaves unscaling to a fused optimizer
        self.add(optimizer, scale=scale, may_skip=scale is not None)

    def _with_gradients(self, group: Mapping[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        entries = []
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
            entries.append((name, parameter.grad, parameter))
        return entries

    @torch.no_grad()
    def _copies(self, tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors on the parameters' devices. Buffers of the round before are used again."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = buffers.get(name)
            copies[name] = torch.empty_like(self._parameters[name]) if buffer is None else buffer
            copies[name].copy_(tensor)
        return copies


class StepMeter:
    """Records the optimizer steps of one round. Read it once, at the round's end.

    Attributes:
        gradients: Whether gradients are recorded before their correction, beside learning rates.
    """

    def __init__(self, *, gradients: bool) -> None:
        """Begin with no steps.

        Args:
            gradients: Whether to record gradients beside learning rates. It takes the memory of one more model.
        """
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
        """Record one step of an optimizer.

        Args:
            optimizer: The optimizer, without its wrapper.
            groups: For each of its parameter groups (name, gradient, parameter) of what has a gradient.
            scale: Factor that the gradients still contain; None if they are unscaled.
            applied: 1, or 0 for a step that is skipped. A tensor stays on its device, so that no step waits for it.
        """
        for index, (group, entries) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
            key = (id(optimizer), index)
            self._rates[key] = self._rates.get(key, 0.0) + group["lr"] * applied
            self._counts[key] = self._counts.get(key, 0.0) + applied
            for name, gradient, _ in entries:
                self._group_of[name] = key
                if self.gradients:
                    self._sum(name, gradient, scale, applied)

    def rates(self) -> dict[str, float]:
        """Return parameter name -> sum of the learning rates of its steps."""
        values = {key: float(rate) for key, rate in self._rates.items()}
        return {name: values[key] for name, key in self._group_of.items()}

    def means(self) -> dict[str, Array]:
        """Return parameter name -> mean of its gradients, on the host. A step without a gradient counts as zero."""
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
    """Return the torch optimizer inside a wrapper such as accelerate's, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def is_plain_sgd(optimizer: Any) -> bool:
    """Return whether each step of the optimizer is w -= lr * g. Weight decay counts as a part of g."""
    inner = plain(optimizer)
    return type(inner) is torch.optim.SGD and all(not g["momentum"] and not g["maximize"] for g in inner.param_groups)


def _add(gradient: Tensor, value: Tensor, scale: _Number | None) -> None:
    gradient.add_(value if scale is None else value * scale)


def _all_finite(gradients: Sequence[tuple[str, Tensor]]) -> Tensor:
    flags = [gradient.isfinite().all().to(torch.float32) for _, gradient in gradients]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).min()
