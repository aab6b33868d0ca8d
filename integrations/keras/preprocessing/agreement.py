"""Layers that follow the data they saw before `fit`: adapted statistics, bins and vocabularies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from fl_runtime.types import Array
from fl_runtime.wire.names import Names, names_of

from ..names import named_layers
from ..trainer import compile_again, own_variables

LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup, keras.layers.TextVectorization)
_COMPARED = (
    *(keras.layers.Hashing, keras.layers.HashedCrossing, keras.layers.CategoryEncoding, keras.layers.Discretization),
    *(keras.layers.Normalization, keras.layers.Rescaling, *LOOKUPS),
)
_LISTED = {"vocabulary", "idf_weights", "bin_boundaries", "vocabulary_size", "has_input_vocabulary"} | {
    *("name", "dtype", "trainable"),  # may differ between sites
}
"""Fields of a config that are not compared as settings."""

_MOST_LISTS = 48


@contextmanager
def deriving_again(model: Any) -> Iterator[list[str]]:
    """Let layers compute what they derive from their variables again, if this block changes these variables.

    `Normalization` computes with a copy of its variables, which Keras makes in `finalize_state` alone; a layer of the
    user's own with that method is treated likewise. TensorFlow and JAX compile the copy into the training step as a
    constant, so the model's functions are made anew, and compiled again at their next call.

    Args:
        model: The built model, whose variables hold their values.

    Yields:
        A list that holds the names of the layers that changed, once the block is over.
    """
    layers = {id(layer): (name, layer) for name, layer in named_layers(model) if _derives(layer)}
    before = {key: _values(layer) for key, (_, layer) in layers.items()}
    changed: list[str] = []
    yield changed
    for key, (name, layer) in layers.items():
        if before[key] != _values(layer):
            layer.finalize_state()
            changed.append(name)
    if changed:
        compile_again(model)


def facts(model: Any) -> dict[str, Names]:
    """What the preprocessing layers of a model do to their input, beside their variables.

    Returns:
        Lists for the handshake: the layers' settings together, and the vocabulary, bins and weights of each. What a
        layer adapted to this site's data is marked as such.
    """
    settings: list[str] = []
    found: dict[str, Names] = {}
    within = "/"
    for name, layer in named_layers(model):
        if not isinstance(layer, _COMPARED) or name.startswith(within):
            continue
        config = layer.get_config()
        settings += [f"{name}: {entry}" for entry in settings_of(layer)]
        if isinstance(layer, keras.layers.Discretization):
            found[f"bins of {name}"] = names_of(
                config["bin_boundaries"] or (), from_data=config["num_bins"] is not None
            )
        if isinstance(layer, LOOKUPS):
            within = f"{name}/"  # a TextVectorization holds a StringLookup
            adapted = config.get("vocabulary") is None
            found[f"vocabulary of {name}"] = names_of(layer.get_vocabulary(), from_data=adapted)
            weights: dict[str, Array] = {}
            layer.save_own_variables(weights)
            if "idf_weights" in weights:  # with output_mode="tf_idf"
                found[f"idf weights of {name}"] = names_of(weights["idf_weights"].tolist(), from_data=adapted)
    if settings:
        found["settings of preprocessing layers"] = names_of(settings)
    return found if len(found) <= _MOST_LISTS else _together(found)


def settings_of(layer: Any) -> list[str]:
    """Settings of a preprocessing layer that must be equal at all sites, such as "max_tokens=100"."""
    config = layer.get_config()
    return [entry for key in sorted(config.keys() - _LISTED) for entry in _flat(config[key], key)]


def _together(lists: dict[str, Names]) -> dict[str, Names]:
    """One list in place of many, since a registration has room for few."""
    entries = [f"{name}: {entry}" for name, names in lists.items() for entry in names.entries]
    return {"preprocessing layers": names_of(entries, from_data=any(names.from_data for names in lists.values()))}


def _derives(layer: Any) -> bool:
    return callable(getattr(layer, "finalize_state", None)) and any(own_variables(layer))


def _values(layer: Any) -> list[bytes]:
    variables = [variable for kind in own_variables(layer) for variable in kind]
    return [np.asarray(keras.ops.convert_to_numpy(variable)).tobytes() for variable in variables]


def _flat(value: Any, name: str) -> Iterator[str]:
    """Each leaf of a config as "name=value", such as "mean[1]=0.5"."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _flat(value[key], f"{name}.{key}")
    elif isinstance(value, list | tuple | np.ndarray):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}[{number}]")
    else:  # the text of a function would hold its address
        yield f"{name}={getattr(value, '__qualname__', type(value).__name__) if callable(value) else value}"
