"""Reads and sets the variables of a Keras model that travel, and what all sites must have in common."""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
import xxhash

from fl_adapters.participant.exchange import matches, selected
from fl_adapters.participant.options import Exchange
from fl_runtime.capabilities import OPTIMIZER_STATE
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Array, Arrays
from fl_runtime.wire.manifest import Manifest, TensorSpec, differences
from fl_runtime.wire.names import TENSORS_OF, Facts, Names, names_of

from .names import Named, named_variables
from .preprocessing import deriving_again, facts

_ROLES = {"auto": ("trainable", "buffer"), "trainable": ("trainable",)}
_SHOWN_DIFFERENCES = 20


class KerasState:
    """The variables of one built model that travel. It holds the live variables.

    Attributes:
        capabilities: What a strategy may require of every Keras model.
        variables: Name -> live variable that travels.
    """

    capabilities = frozenset({OPTIMIZER_STATE})

    def __init__(self, model: Any, exchange: Exchange = "auto", keep_local: tuple[str, ...] = ()) -> None:
        """Select the variables that travel.

        Args:
            model: A built model.
            exchange: "auto" (trainable variables, and what trained layers keep beside them, such as the moving
                averages of a batch normalization), "trainable", "all", or patterns over the names of all weights.
            keep_local: Patterns of names that never travel.

        Raises:
            ConfigError: If a pattern matches nothing, or no variable would travel.
        """
        named = named_variables(model)
        admitted = set(selected(named, exchange, keep_local))
        roles = _ROLES.get(exchange) if isinstance(exchange, str) else None
        self._model = model
        self._told = False
        self.variables = {n: v.variable for n, v in named.items() if n in admitted and (not roles or v.role in roles)}
        if not self.variables:
            raise ConfigError(
                "no variable of the model would travel",
                where=f"exchange={exchange!r}, keep_local={list(keep_local)!r}",
                fix="train at least one variable, or choose what travels with exchange=",
            )
        self._manifest = Manifest(tuple(spec(name, v) for name, v in self.variables.items()))
        frozen = {name: v for name, v in named.items() if v.role == "frozen" and not matches(name, keep_local)}
        self._base = {name: v for name, v in frozen.items() if name not in self.variables}

    def get_state(self) -> dict[str, Array]:
        """Return a fresh host array for each variable; they belong to the caller."""
        return {name: to_host(variable) for name, variable in self.variables.items()}

    def set_state(self, arrays: Arrays) -> None:
        """Copy arrays into the live variables, and let layers compute what they derive from them again.

        The first time that this changes adapted statistics, such as those of `Normalization`, one line says so.

        Args:
            arrays: Arrays of the names, shapes and dtypes that `get_state` returns.

        Raises:
            StateMismatchError: If they do not fit; no variable has been changed then.
        """
        lines = differences(self._manifest, Manifest.of(arrays))
        if lines:
            more = [f"... and {len(lines) - _SHOWN_DIFFERENCES} more"] if len(lines) > _SHOWN_DIFFERENCES else []
            raise StateMismatchError(
                "the weights that arrived do not fit the model:\n" + "\n".join(lines[:_SHOWN_DIFFERENCES] + more),
                where="model variables",
                fix="build the same model at every site",
            )
        with deriving_again(self._model) as changed:
            for name, array in arrays.items():
                assign(self.variables[name], array)
        if changed and not self._told:
            self._told = True
            print(
                f"fl-adapters: {', '.join(changed)} now has the statistics of the global model, in place of those that "
                "this site adapted to its own data",
                file=sys.stderr,
                flush=True,
            )

    def set_result(self, arrays: Arrays) -> bool:
        """Copy arrays into the live variables, as `set_state` does, unless all have these values already.

        Returns:
            Whether a variable had another value, to the bit.
        """
        if all(to_host(variable).tobytes() == arrays[name].tobytes() for name, variable in self.variables.items()):
            return False
        self.set_state(arrays)
        return True

    def agreement(self, model: Any) -> Facts:
        """Return what must be equal at all sites beside the variables that travel."""
        common: dict[str, str | Names] = {"framework": "keras", "model": type(model).__name__}
        if self._base:
            common["frozen tensors"] = str(len(self._base))
            digests = _fingerprints(self._base)
            common["frozen layers"] = xxhash.xxh3_128_hexdigest("\n".join(digests).encode())
            common[f"{TENSORS_OF}frozen layers"] = names_of(digests)
        return common | facts(model)


def to_host(variable: Any) -> Array:
    """A fresh array in C order with the value of a Keras variable."""
    return np.asarray(keras.ops.convert_to_numpy(variable), order="C")


def assign(variable: Any, array: Array) -> None:
    """Copy `array` into a Keras variable."""
    variable.assign(np.array(array))  # a copy, since JAX and TensorFlow may keep the array's memory


def spec(name: str, variable: Any) -> TensorSpec:
    """Name, dtype and shape with which a Keras variable travels."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return TensorSpec(name, dtype, tuple(int(n) for n in variable.shape))


def _fingerprints(named: dict[str, Named]) -> list[str]:
    """Hash over a layer's names, shapes, dtypes and contents, and its name; against mistakes, not an attacker."""
    layers: dict[str, xxhash.xxh3_64] = {}
    for name in sorted(named):
        value: Any = to_host(named[name].variable)
        digest = layers.setdefault(name.rpartition("/")[0] or name, xxhash.xxh3_64())
        digest.update(f"{name}|{list(value.shape)}|{value.dtype}|".encode())
        digest.update(value.reshape(-1).view(np.uint8))
    return [f"{digest.hexdigest()} {layer}" for layer, digest in layers.items()]
