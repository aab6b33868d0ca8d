"""A site without training, for the chaos suite: its result depends on its index, the round and the model alone, so
that it may be killed anywhere and simply be started again.   usage: bare_site.py FOLDER KIB"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

import fl_adapters as fl

Model = dict[str, npt.NDArray[np.floating]]


def initial(kib: int) -> Model:
    """Tensors of several sizes and two types, `kib` KiB in all."""
    rest = kib * 2**10 - 8 * 16
    return {
        "large": np.zeros(rest // 8, np.float32),
        "wide": np.ones((rest // 64, 4), np.float64),
        "scalars": np.zeros(16),
    }


def trained(model: Model, index: int, round: int) -> Model:
    """Different for every site and round, and not associative to add up."""
    rng = np.random.default_rng([index, round])
    return {
        name: (
            0.5 * array + rng.normal() * 10.0**index + np.linspace(0, rng.normal(), array.size).reshape(array.shape)
        ).astype(array.dtype)
        for name, array in model.items()
    }


def main() -> None:
    folder, kib = Path(sys.argv[1]), int(sys.argv[2])
    with fl.connect(required=True) as site, open(folder / "acknowledged.txt", "a") as acknowledged:
        for task in site.tasks(initial=initial(kib)):
            model = {name: np.asarray(array) for name, array in task.arrays.items()}
            task.submit(trained(model, site.index, task.round), num_examples=site.index + 1)
            acknowledged.write(f"{task.round}\n")
            acknowledged.flush()
        bits = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in site.arrays.items()}
    partial = folder / "final.json.partial"
    partial.write_text(json.dumps(bits))
    os.replace(partial, folder / "final.json")


if __name__ == "__main__":
    main()
