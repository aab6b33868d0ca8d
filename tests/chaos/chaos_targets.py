"""What is run under faults: a script per site, and what its run must come to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bare_site import initial, trained

HERE = Path(__file__).parent

Bits = dict[str, bytes]
"""Name of a tensor -> its bytes."""


@dataclass(frozen=True, eq=False)
class Target:
    """A script that takes part, and its run.

    command: of a site's process, which leaves in its own folder what site_notes.py says. It must end well when it is
    killed anywhere and started again with the same command. settings: of RunSettings. wanted(): the final model of
    an undisturbed run; None: it is found out by one. framework: the imports of one dominate a site's start, so that
    faults wait until all sites are there (again).
    """

    name: str
    command: Sequence[str]
    sites: int
    rounds: int
    wanted: Callable[[], Bits] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    framework: bool = False


def _script(file: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / file), *arguments]


def bare(kib: int, rounds: int, sites: int = 3) -> Target:
    """A loop of its own without training: what a site sends depends on its index, the rounds and the models alone."""
    return Target(
        name=f"bare-{kib}",
        command=_script("bare_site.py", str(kib)),
        sites=sites,
        rounds=rounds,
        wanted=lambda: _averaged(kib, rounds, sites),
    )


def script(name: str, rounds: int, *arguments: str, **settings: Any) -> Target:
    """An ordinary script of a framework, in `NAME_site.py`."""
    return Target(
        name="-".join([name, *arguments]),
        command=_script(f"{name}_site.py", *arguments),
        sites=2,
        rounds=rounds,
        settings=settings,
        framework=True,
    )


BARE = (bare(3 * 2**10, 25), bare(200, 60), bare(9 * 2**10, 12))
FRAMEWORKS = (
    script("hf", 40),
    script("lightning", 60),
    script("keras", 60),
    script("xgboost", 60, "bagging"),
    script("xgboost", 60, "cyclic"),
)


def _averaged(kib: int, rounds: int, sites: int) -> Bits:
    """Federated averaging in plain NumPy, as docs/strategies.md writes it down: subtract, multiply, add."""
    model, carried = initial(kib), [0.0] * sites
    for number in range(1, rounds + 1):
        updates = []
        for index in range(sites):
            update, carried[index] = trained(model, index, number, carried[index])
            updates.append(update)
        mean = {name: array.copy() for name, array in updates[0].items()}
        weight = 1
        for index in range(1, sites):
            weight += index + 1
            for name, array in updates[index].items():
                share = np.asarray((index + 1) / weight, array.dtype)
                mean[name] = mean[name] + (array - mean[name]) * share
        model = mean
    return {name: array.tobytes() for name, array in model.items()}
