"""The files that a site of the chaos suite writes beside its kit: `acknowledged.txt` and `final.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_adapters.participant.kit import KIT_VARIABLE

FOLDER = Path(os.environ[KIT_VARIABLE]).parent


def acknowledged(round: int) -> None:
    """Note that the server has acknowledged this site's update of the round."""
    with open(FOLDER / "acknowledged.txt", "a") as file:
        file.write(f"{round}\n")


def final(model: Mapping[str, Any]) -> None:
    """Note the final model: name -> array or bytes, with the names of the server's file."""
    digests = {}
    for name, value in model.items():
        digests[name] = hashlib.sha256(value if isinstance(value, bytes) else value.tobytes()).hexdigest()
    partial = FOLDER / "final.json.partial"
    partial.write_text(json.dumps(digests))
    os.replace(partial, FOLDER / "final.json")
