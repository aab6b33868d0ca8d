"""Data of the example as arrays for `model.fit`. `examples/images.py` loads and divides it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import images

ROWS = 8000  # training rows of all sites together; few, to keep the example quick


def load(source: str | None = None, shard: str | None = None, rows: int = ROWS) -> images.Images:
    """Load images as `images.load` does, with a channel axis: [rows, side, side, 1]."""
    data = images.load(source, shard, rows)

    def part(given: images.Part) -> images.Part:
        return given[0][..., None], given[1]

    return images.Images(part(data.train), part(data.validation), part(data.test), data.name)
