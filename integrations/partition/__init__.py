"""Divide one data set among the sites of a simulation: at random, by label, by size, by a feature, or by a column.

Example:
    >>> import numpy as np
    >>> from fl_adapters.partition import by_label
    >>> labels = np.repeat(["cat", "dog"], 50)
    >>> parts = by_label(np.arange(100), labels, sites=3, alpha=0.5, seed=0)
    >>> sum(len(part) for part in parts)
    100
"""

from .parts import Partition
from .splits import by_column, by_feature, by_label, by_quantity, iid

__all__ = ["Partition", "by_column", "by_feature", "by_label", "by_quantity", "iid"]
