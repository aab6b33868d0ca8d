"""What mode "levelwise" refuses before the first sum, and the parameters of trees that it honours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fl_runtime.errors import ConfigError

from ..call import TrainCall, installed_version
from .objectives import OBJECTIVES
from .splits import Regularisation

_WHERE = 'train(mode="levelwise")'
_MOST_BINS = 65_534  # bins are numbered by 16 bits, and one number stands for missing values
_GAIN_FROM_WEIGHTS = (3, 4)  # the version from which XGBoost computes gains in another way
_NEUTRAL: dict[str, tuple[str, ...]] = {
    "subsample": ("1",),
    "colsample_bytree": ("1",),
    "colsample_bylevel": ("1",),
    "colsample_bynode": ("1",),
    "grow_policy": ("depthwise",),
    "max_leaves": ("0",),
    "max_delta_step": ("0",),
    "scale_pos_weight": ("1",),
    "monotone_constraints": ("()", ""),
    "interaction_constraints": ("", "[]"),
}
"""Parameters that trees of this mode do not know, with the values that have no effect."""


def check(call: TrainCall) -> None:
    """Raise ConfigError for what this mode cannot do, as far as the script's own arguments show it."""
    params = call.params
    objective = "a custom objective" if call.obj is not None else str(params.get("objective", "reg:squarederror"))
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"{objective} is not known to this mode, which computes gradients itself",
            where=f"{_WHERE}: objective",
            fix=f'use {", ".join(OBJECTIVES[:-1])} or {OBJECTIVES[-1]}, or mode="histogram"',
        )
    for name, allowed in (
        ("booster", ("gbtree",)),
        ("tree_method", ("hist", "auto")),
        ("device", ("cpu",)),
        ("num_parallel_tree", ("1",)),
        ("rate_drop", ("0", "0.0")),
        ("one_drop", ("0", "False")),
    ):
        if str(params.get(name, allowed[0])) not in allowed:
            raise _refused(name, params[name])
    if "c" in (call.dtrain.feature_types or ()):
        raise ConfigError(
            "categorical features are not split in this mode",
            where=f"{_WHERE}: dtrain",
            fix='encode them as numbers (one-hot), or use mode="histogram"',
        )
    labels, rows = call.dtrain.get_label(), call.dtrain.num_row()
    if len(labels) != rows:
        raise ConfigError(
            f"dtrain has {len(labels)} labels for {rows} rows",
            where=_WHERE,
            fix="give every row one label",
        )
    if call.mask_statistics:
        raise ConfigError(
            "mask_statistics would hide nothing: every site sees the sums from which the trees are grown",
            where=_WHERE,
            fix="leave it out",
        )


def check_unused(**arguments: tuple[float, float]) -> None:
    """Raise ConfigError for arguments of mode "histogram" that have another value than their default.

    Args:
        **arguments: Value and default of each.
    """
    reasons = {
        "quantile_noise": "bins are found from counts over all sites, and no site tells points of its own",
        "collective_timeout_s": "there is no collective: a site that is away is waited for as long as the job says",
    }
    for name, (value, default) in arguments.items():
        if value != default:
            raise ConfigError(
                f"{name}={value!r} has no effect in this mode: {reasons[name]}",
                where=_WHERE,
                fix=f'leave {name} out, or use mode="histogram"',
            )


def regularisation(parameters: Mapping[str, str]) -> tuple[Regularisation, int, int]:
    """Return the parameters of trees that decide about splits and leaves, the largest depth, and `max_bin`.

    Args:
        parameters: All parameters with XGBoost's own names and defaults, as `tree_parameters` returns them.

    Raises:
        ConfigError: A parameter asks for something that this mode does not do.
    """
    given = {name.removeprefix("parameter "): value for name, value in parameters.items()}
    for name, allowed in _NEUTRAL.items():
        value = given.get(name, allowed[0])
        if value not in allowed and not _same_number(value, allowed[0]):
            raise _refused(name, value)
    max_bin = int(given["max_bin"])
    if not 2 <= max_bin <= _MOST_BINS:
        raise ConfigError(f"max_bin={max_bin} is out of range", where=_WHERE, fix=f"use 2 to {_MOST_BINS}")
    penalty = Regularisation(
        eta=float(given["eta"]),
        reg_lambda=float(given["reg_lambda"]),
        reg_alpha=float(given["reg_alpha"]),
        min_split_loss=float(given["min_split_loss"]),
        min_child_weight=float(given["min_child_weight"]),
        gain_from_weights=installed_version() >= _GAIN_FROM_WEIGHTS,
    )
    return penalty, int(given["max_depth"]), max_bin


def _refused(name: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{name}={value!r} has no effect in this mode",
        where=f"{_WHERE}: params",
        fix=f'leave {name} out, or use mode="histogram" or "bagging"',
    )


def _same_number(text: str, other: str) -> bool:
    try:
        return bool(np.float32(text) == np.float32(other))
    except ValueError:
        return False
