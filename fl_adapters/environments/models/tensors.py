"""Reads who has written a file of tensors."""

from __future__ import annotations

import json
from pathlib import Path

from fl_runtime.text import parse_json

TENSORS = "model.safetensors"
_HEADER_BYTES = 100 * 2**20


def is_of_torch(path: Path) -> bool:
    """Return whether PyTorch has written a file of tensors, as its metadata say.

    Args:
        path: A file in the safetensors format.
    """
    with open(path, "rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)
        try:
            header = parse_json(file.read(length), limit_chars=_HEADER_BYTES)
            return bool(header["__metadata__"]["format"] == "pt")
        except (ValueError, KeyError, TypeError, json.JSONDecodeError):
            return False
