"""What is added to the gradients of a Keras model before each optimizer step, and what is noted of these steps.

The step of a compiled training function cannot be changed from outside while it runs: on JAX it is frozen when it is
compiled, with what its closures held, and on TensorFlow an earlier `fit` may have compiled it already. So everything
that changes from round to round is a variable of the optimizer, which the compiled step takes and gives back, and the
training function is made anew when the correction begins and when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from fl_runtime.types import Array, Arrays

from .optimizer import build, optimizers, scope
from .state import assign, to_host

_STEP = "_backend_update_step"
"""What every Keras optimizer calls once per step, on all backends, with gradients that are complete: accumulated,
unscaled, clipped."""


class GradientCorrection:
    """gradient += mu (w - anchor) + offset for each of `variables` (name -> live variable), from `attach` to `detach`.

    offsets: whether there are any. gradients: whether the sums of the gradients are kept, as they come.

    Its variables are the optimizer's while the model trains; `hide` takes them off, for whoever saves or looks at
    the optimizer. Only for a model with one optimizer.
    """

    def __init__(self, model: Any, variables: Mapping[str, Any], *, offsets: bool, gradients: bool) -> None:
        (self._optimizer,) = optimizers(model)
        self._model = model
        self._names = {id(variable): name for name, variable in variables.items()}
        build(model, self._optimizer)
        with scope(model):
            self._mu, self._rates, self._steps = (_zeros((), "float32", n) for n in ("mu", "rates", "steps"))
            self._anchors = {n: _zeros(v.shape, v.dtype, "anchor") for n, v in variables.items()}
            self._offsets = {n: _zeros(v.shape, v.dtype, "offset") for n, v in variables.items() if offsets}
            self._sums = {n: _zeros(v.shape, "float32", "sum") for n, v in variables.items() if gradients}
        tables = (self._anchors, self._offsets, self._sums)
        self._own = [self._mu, self._rates, self._steps, *(v for table in tables for v in table.values())]
        self._variables: Sequence[Any] = vars(self._optimizer)["_variables"]

    def attach(self) -> None:
        """From the next step on."""
        vars(self._optimizer)[_STEP] = self._step  # not by assignment: Keras and TensorFlow would track it
        self.show()
        self._model.make_train_function(force=True)

    def detach(self) -> None:
        """The optimizer is what it was."""
        self.hide()
        if vars(self._optimizer).pop(_STEP, None) is not None:
            self._model.make_train_function(force=True)

    def show(self) -> None:
        """The optimizer has the variables of the correction among its own."""
        vars(self._optimizer)["_variables"] = [*self._variables, *self._own]

    def hide(self) -> None:
        """It has not. The model must not train meanwhile."""
        vars(self._optimizer)["_variables"] = self._variables

    def set_anchors(self, anchors: Arrays) -> None:
        """Copy the weights that the proximal term pulls to, by variable name."""
        for name, array in anchors.items():
            assign(self._anchors[name], array)

    def begin(self, *, mu: float = 0.0, offsets: Arrays | None = None) -> None:
        """Choose what corrects the gradients from the next step on, and forget the steps so far."""
        assign(self._mu, np.array(mu, np.float32))
        for name, array in (offsets or {}).items():
            assign(self._offsets[name], array)
        for variable in (self._rates, self._steps, *self._sums.values()):
            assign(variable, np.zeros(tuple(variable.shape), np.float32))

    @property
    def steps(self) -> int:
        """Steps since `begin`."""
        return int(to_host(self._steps))

    def rates(self) -> dict[str, float]:
        """Variable name -> sum of the learning rates of these steps."""
        return dict.fromkeys(self._names.values(), float(to_host(self._rates)))

    def means(self) -> dict[str, Array]:
        """Variable name -> mean of its gradients; a step that gave it none counts as zero."""
        steps = max(self.steps, 1)
        return {name: to_host(total) / np.float32(steps) for name, total in self._sums.items()}

    def _step(self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        corrected = [self._corrected(grad, variable) for grad, variable in zip(grads, variables, strict=True)]
        self._rates.assign_add(ops.cast(learning_rate, "float32"))
        self._steps.assign_add(1.0)
        getattr(type(self._optimizer), _STEP)(self._optimizer, corrected, variables, learning_rate)

    def _corrected(self, grad: Any, variable: Any) -> Any:
        name = self._names.get(id(variable))
        if name is None:
            return grad
        grad = ops.convert_to_tensor(grad)  # TensorFlow's sparse ones, too
        if name in self._sums:
            self._sums[name].assign_add(ops.cast(grad, "float32"))
        pull = ops.cast(self._mu, variable.dtype) * (ops.convert_to_tensor(variable) - self._anchors[name])
        grad = grad + ops.cast(pull, grad.dtype)
        return grad + ops.cast(self._offsets[name], grad.dtype) if name in self._offsets else grad


def is_plain_sgd(optimizer: Any) -> bool:
    """Whether a step is w -= lr g and no more (weight decay counts as a part of g)."""
    own = type(optimizer).__module__.startswith("keras.") and isinstance(optimizer, keras.optimizers.SGD)
    return own and not optimizer.momentum and not optimizer.use_ema


def can_correct(model: Any) -> bool:
    """Whether gradients of this model can be corrected: one optimizer, on one device."""
    strategy = getattr(model, "distribute_strategy", None) if keras.backend.backend() == "tensorflow" else None
    several = strategy is not None and strategy.num_replicas_in_sync > 1
    return len(optimizers(model)) == 1 and not several and keras.distribution.distribution() is None


def _zeros(shape: Any, dtype: Any, name: str) -> Any:
    dtype = keras.backend.standardize_dtype(dtype)
    return keras.Variable(initializer="zeros", shape=tuple(shape), dtype=dtype, trainable=False, name=f"fl_{name}")
