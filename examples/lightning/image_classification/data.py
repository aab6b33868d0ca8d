"""Data of the example as data sets of PyTorch: `examples/image_tensors.py` makes them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import images
from image_tensors import ROWS, Data, load

__all__ = ["ROWS", "Data", "images", "load"]
