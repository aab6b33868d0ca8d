"""What the name of a tensor says about it."""

from __future__ import annotations

import re

_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")
_STATISTIC = re.compile(rf"(^|[./])({'|'.join(_STATISTICS)})$")

STATISTICS = tuple(f"{start}{name}" for name in _STATISTICS for start in ("", "*.", "*/"))
"""Name patterns (`fnmatch`) of the tensors for which `is_statistic` is true."""


def is_statistic(name: str) -> bool:
    """Whether a tensor holds running statistics of a normalisation layer, judged by its name in PyTorch or Keras.

    They are neither trained nor differences of anything: after noise or the step of a server optimizer, a variance
    could be negative.

    Args:
        name: Name of the tensor.

    Returns:
        True for running or moving means and variances.
    """
    return _STATISTIC.search(name) is not None
