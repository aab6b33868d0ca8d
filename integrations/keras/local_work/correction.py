"""Corrects the gradients of a Keras model before each optimizer step, and records these steps.

A compiled training function cannot be changed while it runs: JAX freezes it when it is compiled, together with what
its closures hold, and on TensorFlow an earlier `fit` may have compiled it already. So everything that changes from
round to round is a variable of the optimizer, which the compiled step takes and gives back. The training function is
made again when the correction is attached and when it is detached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from fl_runtime.types import Array, Arrays

from ..optimizer import build, optimizers, scope
from ..state import assign, to_host
from ..trainer import OptimizerStep


class GradientCorrection:
    """Adds mu * (w - anchor) + offset to each gradient g, from `attach` to `detach`.

    Its variables belong to the optimizer while the model trains. `hide` takes them off before the optimizer is
    saved or inspected. Only for a model with one optimizer.
    """

    def __init__(self, model: Any, variables: Mapping[str, Any], *, offsets: bool, gradients: bool) -> None:
        """Make the variables of the correction; attach nothing as yet.

        Args:
            model: The compiled model.
            variables: Name -> live variable whose gradient is corrected.
            offsets: Whether there are offsets.
            gradients: Whether to sum up the gradients before they are corrected.
        """
        (optimizer,) = optimizers(model)
        self._model = model
        self._names = {id(variable): name for name, variable in variables.items()}
        build(model, optimizer)
        with scope(model):
            self._mu, self._rates, self._steps = (_zeros((), "float32", n) for n in ("mu", "rates", "steps"))
            self._anchors = {n: _zeros(v.shape, v.dtype, "anchor") for n, v in variables.items()}
            self._offsets = {n: _zeros(v.shape, v.dtype, "offset") for n, v in variables.items() if offsets}
            self._sums = {n: _zeros(v.shape, "float32", "sum") for n, v in variables.items() if gradients}
        tables = (self._anchors, self._offsets, self._sums)
        self._variables = [self._mu, self._rates, self._steps, *(v for table in tables for v in table.values())]
        self._step = OptimizerStep(optimizer)

    def attach(self) -> None:
        """Correct gradients from the next step on."""
        self._step.replace(self._corrected_step)
        self.show()
        self._model.make_train_function(force=True)

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        self.hide()
        if self._step.restore():
            self._model.make_train_function(force=True)

    def show(self) -> None:
        """Add the variables of the correction to the optimizer's own."""
        self._step.add_variables(self._variables)

    def hide(self) -> None:
        """Take the variables of the correction off the optimizer. The model must not train meanwhile."""
        self._step.remove_variables()

    def set_anchors(self, anchors: Arrays) -> None:
        """Copy the weights that the proximal term pulls to, by variable name."""
        for name, array in anchors.items():
            assign(self._anchors[name], array)

    def begin(self, *, mu: float = 0.0, offsets: Arrays | None = None) -> None:
        """Choose what corrects gradients from the next step on, and forget the steps so far.

        Args:
            mu: Weight of the proximal term; 0 for none.
            offsets: Variable name -> offset. Copied; those of before stay if it is None.
        """
        assign(self._mu, np.array(mu, np.float32))
        for name, array in (offsets or {}).items():
            assign(self._offsets[name], array)
        for variable in (self._rates, self._steps, *self._sums.values()):
            assign(variable, np.zeros(tuple(variable.shape), np.float32))

    @property
    def steps(self) -> int:
        """Number of steps since `begin`."""
        return int(to_host(self._steps))

    def rates(self) -> dict[str, float]:
        """Return variable name -> sum of the learning rates of the steps since `begin`."""
        return dict.fromkeys(self._names.values(), float(to_host(self._rates)))

    def means(self) -> dict[str, Array]:
        """Return variable name -> mean of its gradients since `begin`. A step without a gradient counts as zero."""
        steps = max(self.steps, 1)
        return {name: to_host(total) / np.float32(steps) for name, total in self._sums.items()}

    def _corrected_step(self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        corrected = [self._correct(grad, variable) for grad, variable in zip(grads, variables, strict=True)]
        self._rates.assign_add(ops.cast(learning_rate, "float32"))
        self._steps.assign_add(1.0)
        self._step.run(corrected, variables, learning_rate)

    def _correct(self, grad: Any, variable: Any) -> Any:
        name = self._names.get(id(variable))
        if name is None:
            return grad
        grad = ops.convert_to_tensor(grad)  # TensorFlow may give sparse ones
        if name in self._sums:
            self._sums[name].assign_add(ops.cast(grad, "float32"))
        pull = ops.cast(self._mu, variable.dtype) * (ops.convert_to_tensor(variable) - self._anchors[name])
        grad = grad + ops.cast(pull, grad.dtype)
        return grad + ops.cast(self._offsets[name], grad.dtype) if name in self._offsets else grad


def is_plain_sgd(optimizer: Any) -> bool:
    """Whether each step of the optimizer is w -= lr * g. Weight decay counts as a part of g."""
    is_keras_sgd = type(optimizer).__module__.startswith("keras.") and isinstance(optimizer, keras.optimizers.SGD)
    return is_keras_sgd and not optimizer.momentum and not optimizer.use_ema


def can_correct(model: Any) -> bool:
    """Whether gradients of this model can be corrected: it has one optimizer, and trains on one device."""
    strategy = getattr(model, "distribute_strategy", None) if keras.backend.backend() == "tensorflow" else None
    several = strategy is not None and strategy.num_replicas_in_sync > 1
    return len(optimizers(model)) == 1 and not several and keras.distribution.distribution() is None


def _zeros(shape: Any, dtype: Any, name: str) -> Any:
    dtype = keras.backend.standardize_dtype(dtype)
    return keras.Variable(initializer="zeros", shape=tuple(shape), dtype=dtype, trainable=False, name=f"fl_{name}")
