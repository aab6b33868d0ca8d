"""Arrays that a script hands over: checked, and reduced to those that travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fl_adapters.participant.exchange import selected
from fl_adapters.participant.options import SiteSettings
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array, Arrays


def selected_arrays(initial: Arrays, settings: SiteSettings) -> Iterator[tuple[str, Array]]:
    given = named(initial, "site.tasks(initial=...)")
    for name in selected(given, settings.exchange, settings.keep_local):
        yield name, as_array(name, given[name], "initial")


def named(arrays: object, where: str) -> Mapping[str, Any]:
    """Return a dict of arrays that a script has passed. Raises ConfigError if it is something else, or empty."""
    if not isinstance(arrays, Mapping):
        raise ConfigError(
            f"{where} got a {type(arrays).__name__} instead of a dict of name -> NumPy array",
            fix='give every array a name, as in {"weight": w, "bias": b}',
        )
    if not arrays:
        raise ConfigError(f"{where} got no arrays", fix="pass a dict of name -> NumPy array")
    return arrays


def as_array(name: str, value: object, where: str) -> Array:
    """Return a value that a script gives as an array.

    Args:
        name: Name of the tensor.
        value: An array, a number, or an object that NumPy reads as an array.
        where: Where the script gives it, for errors.

    Returns:
        The array, not copied if it is one.

    Raises:
        ConfigError: It is a list or something else that is neither an array nor a number.
    """
    fix = f"pass np.asarray(value, dtype) for {name!r}"
    if isinstance(value, list | tuple | Mapping | str | bytes) or value is None:
        raise ConfigError(f"{name!r} is a {type(value).__name__}, not an array", where=where, fix=fix)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on another device, or one with a gradient
        raise ConfigError(
            f"{name!r} is a {type(value).__name__} that NumPy cannot read: {error}",
            where=where,
            fix=f"pass a NumPy array for {name!r}, for a tensor of PyTorch tensor.detach().cpu().numpy()",
        ) from error
    if array.dtype == object:
        raise ConfigError(f"{name!r} is a {type(value).__name__}, not an array of numbers", where=where, fix=fix)
    return array
