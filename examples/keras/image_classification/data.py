"""The example's data, as `model.fit` takes it. What it is and how it is divided among the sites: ../../images.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import images

ROWS = 8000  # for training, all sites together; keeps the example quick


def load(source: str | None = None, shard: str | None = None, rows: int = ROWS) -> images.Images:
    """As `images.load`, the images with a channel: [rows, side, side, 1]."""
    data = images.load(source, shard, rows)

    def part(given: images.Part) -> images.Part:
        return given[0][..., None], given[1]

    return images.Images(part(data.train), part(data.validation), part(data.test), data.name)
