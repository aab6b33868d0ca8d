"""The state of a Keras optimizer, for the `optimizer_state` policies.

Moments are named "<kind>/<variable>", such as "momentums/dense/kernel". The step counter is "step/iterations", int64:
the server takes the maximum of an integer and the average of the moments. The learning rate always stays the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np

from fl_adapters.participant.options import OptimizerPolicy
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.manifest import Manifest, differences

from .state import assign, spec, to_host
from .trainer import holds_partial_gradients, learning_rate, optimized_variables, state_attributes, step_counter

_STEP = "step/iterations"


class KerasOptimizerState:
    """The state of a model's optimizer that belongs to the variables that travel."""

    def __init__(self, model: Any, variables: Mapping[str, Any]) -> None:
        """Read nothing as yet.

        Args:
            model: The compiled model.
            variables: Name -> live variable that travels.
        """
        self._model = model
        self._names = {id(variable): name for name, variable in variables.items()}
        self._initial: list[list[Array]] | None = None

    def check(self, policy: OptimizerPolicy) -> None:
        """Prepare for a policy, and build the optimizer if it must be.

        Raises:
            ConfigError: If the policy cannot work with this optimizer.
        """
        if policy == "keep":
            return
        for optimizer in optimizers(self._model):
            rate = learning_rate(optimizer)
            if policy == "reset" and not isinstance(rate, keras.Variable):
                raise ConfigError(
                    "optimizer_state='reset' sets the optimizer's step counter to zero, and with it this learning-rate "
                    "schedule would begin again in every round",
                    where=f"{type(optimizer).__name__}(learning_rate={type(rate).__name__})",
                    fix="use optimizer_state='keep' or 'average', or change the rate by the callback "
                    "keras.callbacks.LearningRateScheduler",
                )
            build(self._model, optimizer)
        if policy == "reset":
            self._initial = [initial_values(self._model, optimizer) for optimizer in optimizers(self._model)]
        else:
            self._averaged_variables()

    def agreement(self, policy: OptimizerPolicy) -> dict[str, str]:
        """Return what must be equal at all sites so that moments can be averaged."""
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers(self._model))
        return {"optimizer": names} if policy == "average" else {}

    def reset(self) -> None:
        """Set every state variable but the learning rate to its initial value: moments and step counter to zero."""
        assert self._initial is not None
        for optimizer, initial in zip(optimizers(self._model), self._initial, strict=True):
            rate = learning_rate(optimizer)
            for variable, value in zip(optimizer.variables, initial, strict=True):
                if variable is not rate:
                    assign(variable, np.broadcast_to(value, tuple(variable.shape)))

    def get(self) -> dict[str, Array]:
        """Return host copies of the moments and the step counter.

        Raises:
            ConfigError: If they cannot be averaged.
        """
        arrays = {name: to_host(variable) for name, variable in self._averaged_variables().items()}
        return {**arrays, _STEP: arrays[_STEP].astype(np.int64)}  # int32 in JAX

    def set(self, arrays: Arrays) -> None:
        """Copy averaged moments into the live variables.

        Args:
            arrays: Arrays of the names, shapes and dtypes that `get` returns.

        Raises:
            StateMismatchError: If they do not fit the optimizer; nothing has been changed then.
        """
        variables = self._averaged_variables()
        moments = {name: array for name, array in arrays.items() if name != _STEP}
        expected = Manifest(tuple(spec(name, variable) for name, variable in variables.items() if name != _STEP))
        lines = differences(expected, Manifest.of(moments))
        if lines:
            raise StateMismatchError(
                "the optimizer moments that arrived do not fit the optimizer:\n" + "\n".join(lines),
                where=self._where(),
                fix="use the same optimizer at every site, or optimizer_state='keep'",
            )
        for name, array in arrays.items():
            assign(variables[name], array)

    def _averaged_variables(self) -> dict[str, Any]:
        """Return the variables whose values are averaged, by name and in a fixed order."""
        candidates = optimizers(self._model)
        if len(candidates) != 1:
            raise self._refusal(f"this model has {len(candidates)} optimizers")
        optimizer = candidates[0]
        build(self._model, optimizer)
        counter, trained = step_counter(optimizer), optimized_variables(optimizer)
        averaged = {_STEP: counter}
        covered = {id(counter), id(learning_rate(optimizer))}
        for attribute, value in state_attributes(optimizer):
            if isinstance(value, keras.Variable) and id(value) not in covered:
                averaged[f"scalar/{attribute.strip('_')}"] = value  # such as Nadam's product of momenta
                covered.add(id(value))
            elif _is_slot(value, len(trained)):
                covered |= {id(moment) for moment in value}
                for variable, moment in zip(trained, value, strict=True):
                    name = self._names.get(id(variable))
                    if name is not None and moment is not None and not holds_partial_gradients(attribute):
                        averaged[f"{attribute.strip('_')}/{name}"] = self._check_averageable(variable, moment, name)
        if unknown := [v.path for v in optimizer.variables if id(v) not in covered]:
            raise self._refusal(f"its state variable {unknown[0]!r} belongs to no variable of the model")
        return averaged

    def _check_averageable(self, variable: Any, moment: Any, name: str) -> Any:
        if tuple(moment.shape) != tuple(variable.shape):
            raise self._refusal(f"its state for {name} is factored")
        if "float" not in keras.backend.standardize_dtype(moment.dtype):
            raise self._refusal(f"its state for {name} is quantised")
        return moment

    def _where(self) -> str:
        return ", ".join(type(optimizer).__name__ for optimizer in optimizers(self._model))

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"optimizer_state='average' cannot be used with this optimizer: {reason}",
            where=self._where(),
            fix="use optimizer_state='keep' or 'reset', or plain moments such as those of keras.optimizers.Adam",
        )


def _is_slot(value: Any, count: int) -> bool:
    """Whether an attribute of an optimizer holds one kind of state: a variable or None for each trained one."""
    listed = isinstance(value, list) and len(value) == count > 0
    return listed and all(v is None or isinstance(v, keras.Variable) for v in value)


def all_optimizers(model: Any) -> list[Any]:
    """The model's optimizers with their loss scaling, including those that a custom `train_step` uses."""
    attributes = [v for v in vars(model).values() if isinstance(v, keras.optimizers.Optimizer)]
    return list({id(o): o for o in (model.optimizer, *attributes) if o is not None}.values())


def optimizers(model: Any) -> list[Any]:
    """Return the model's optimizers, each without the loss scaling around it."""
    return [getattr(optimizer, "inner_optimizer", optimizer) for optimizer in all_optimizers(model)]


def build(model: Any, optimizer: Any) -> None:
    """Make the optimizer's variables, if Keras has not done so yet."""
    if not optimizer.built:
        with scope(model):
            optimizer.build(model.trainable_variables)


def initial_values(model: Any, optimizer: Any) -> list[Array]:
    """The value of each of the optimizer's variables when it was made; a scalar if all elements are equal.

    Raises:
        ConfigError: If the optimizer cannot be made again from its configuration.
    """
    try:
        with scope(model):
            fresh = type(optimizer).from_config(optimizer.get_config())
            fresh.build(optimized_variables(optimizer))
    except Exception as error:
        raise ConfigError(
            f"the initial state of this optimizer cannot be determined: {error}",
            where=type(optimizer).__name__,
            fix="give it a get_config() that from_config() takes; or use optimizer_state='keep', and no personal model",
        ) from error
    values = [to_host(variable) for variable in fresh.variables]
    return [v.reshape(-1)[:1].reshape(()) if v.size and (v == v.reshape(-1)[0]).all() else v for v in values]


def scope(model: Any) -> Any:
    """Context in which variables beside the model's own must be made: that of a TensorFlow strategy, if any."""
    strategy = getattr(model, "distribute_strategy", None) if keras.backend.backend() == "tensorflow" else None
    return nullcontext() if strategy is None else strategy.scope()
