"""A site of the chaos suite without training, which may be killed anywhere and started again.

Its update depends on its index, the round, the model and a number carried from round to round.

usage: bare_site.py KIB
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

import fl_adapters as fl

Model = dict[str, npt.NDArray[np.floating]]


def initial(kib: int) -> Model:
    """Return tensors of several sizes and two dtypes, `kib` KiB in all."""
    rest = kib * 2**10 - 8 * 16
    return {
        "large": np.zeros(rest // 8, np.float32),
        "wide": np.ones((rest // 64, 4), np.float64),
        "scalars": np.zeros(16),
    }


def trained(model: Model, index: int, round: int, carried: float) -> tuple[Model, float]:
    """Return an update that differs for every site and round, and the number for the next round.

    Sums of the updates are not associative, so a changed order would show.
    """
    rng = np.random.default_rng([index, round])
    carried = 0.5 * carried + float(np.tanh(model["scalars"][0])) + rng.normal()
    return {
        name: (
            0.5 * array + carried * 10.0**index + np.linspace(0, rng.normal(), array.size).reshape(array.shape)
        ).astype(array.dtype)
        for name, array in model.items()
    }, carried


def main() -> None:
    from site_notes import acknowledged, final

    kib, own = int(sys.argv[1]), {"carried": 0.0}
    with fl.connect(required=True) as site:
        for task in site.tasks(initial=initial(kib), save=lambda: own, load=own.update):
            model = {name: np.asarray(array) for name, array in task.arrays.items()}
            update, own["carried"] = trained(model, site.index, task.round, own["carried"])
            task.submit(update, num_examples=site.index + 1)
            acknowledged(task.round)
        final({name: np.asarray(array) for name, array in site.arrays.items()})


if __name__ == "__main__":
    main()
