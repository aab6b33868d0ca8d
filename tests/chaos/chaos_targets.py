"""What is run under faults: a script per site, and what its run must come to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bare_site import initial, trained

HERE = Path(__file__).parent

Bits = dict[str, bytes]
"""Name of a tensor -> its bytes."""


@dataclass(frozen=True)
class Target:
    """A script that takes part, and its run.

    command: of a site's process, given the site's own folder, where it leaves `final.json` (`bits_of` of the final
    model) and `acknowledged.txt` (a line per round that the server has acknowledged). It must end well when it is
    killed anywhere and started again with the same command. settings: of RunSettings. wanted(): the final model of
    an undisturbed run.
    """

    name: str
    command: Callable[[Path], list[str]]
    sites: int
    rounds: int
    wanted: Callable[[], Bits]
    settings: Mapping[str, Any] = field(default_factory=dict)


def bare(kib: int, rounds: int, sites: int = 3) -> Target:
    """A loop of its own without training: what a site sends depends on its index, the round and the model alone."""
    return Target(
        name=f"bare site, {kib} KiB, {rounds} rounds",
        command=lambda folder: [sys.executable, str(HERE / "bare_site.py"), str(folder), str(kib)],
        sites=sites,
        rounds=rounds,
        wanted=lambda: _averaged(kib, rounds, sites),
    )


def _averaged(kib: int, rounds: int, sites: int) -> Bits:
    """Federated averaging in plain NumPy, as docs/strategies.md writes it down: subtract, multiply, add."""
    model = initial(kib)
    for number in range(1, rounds + 1):
        updates = [trained(model, index, number) for index in range(sites)]
        mean = {name: array.copy() for name, array in updates[0].items()}
        weight = 1
        for index in range(1, sites):
            weight += index + 1
            for name, array in updates[index].items():
                share = np.asarray((index + 1) / weight, array.dtype)
                mean[name] = mean[name] + (array - mean[name]) * share
        model = mean
    return {name: array.tobytes() for name, array in model.items()}
