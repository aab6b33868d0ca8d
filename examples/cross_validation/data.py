"""The breast cancer data of scikit-learn, in parts of equal size."""

from __future__ import annotations

from typing import Any

from sklearn.datasets import load_breast_cancer

import fl_adapters


def load(shard: str | None = None) -> tuple[Any, Any]:
    """Return features (rows, 30) and labels (rows,) of one part.

    Args:
        shard: The part, such as "2/5". Default: the site's own in a federation, else all rows.
    """
    x, y = load_breast_cancer(return_X_y=True)
    place = fl_adapters.site()
    part, parts = map(int, shard.split("/")) if shard else (place.index + 1, place.count)
    return x[part - 1 :: parts], y[part - 1 :: parts]
