"""The sequence of faults, decided by a seed; chaos_federation.py carries them out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

KINDS = {
    "kill the server": 0.20,
    "kill a site": 0.25,
    "cut a connection": 0.22,
    "delay a connection": 0.10,
    "damage a byte": 0.20,
    "silence a connection": 0.03,
    "fill the disk": 0.08,
}
"""Every kind of fault, and its share. A silenced connection stays open but carries nothing any more."""

_BYTES = 4 * 2**20
_SITES = 6  # twos and threes alike


@dataclass(frozen=True)
class Fault:
    """One planned fault.

    Attributes:
        kind: One of KINDS.
        after_s: Seconds since the fault before.
        site: Index of the site that it hits, modulo the number of sites.
        direction: For a cut or a damaged byte: "up" is from the site to the server.
        at_bytes: For a cut or a damaged byte: number of further bytes before it.
        flip: Bits of the damaged byte that are flipped.
        for_s: How long the process stays dead, the connection delayed or the disk full.
    """

    kind: str
    after_s: float
    site: int
    direction: str
    at_bytes: int
    flip: int
    for_s: float


def faults(seed: int, without: Collection[str] = ()) -> Iterator[Fault]:
    """Yield faults without end, the same for the same arguments; kinds in `without` are left out."""
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in KINDS if kind not in without]
    shares = np.array([KINDS[kind] for kind in kinds])
    while True:
        yield Fault(
            kind=kinds[rng.choice(len(kinds), p=shares / shares.sum())],
            after_s=float(rng.choice([0.0, rng.uniform(0, 0.4)], p=[0.2, 0.8])),
            site=int(rng.integers(_SITES)),
            direction=("up", "down")[rng.integers(2)],
            # most bytes are of tensors: small numbers too, so that headers have their share
            at_bytes=int(_BYTES ** rng.uniform(0, 1)),
            flip=int(rng.choice([0xFF, 1 << rng.integers(8)])),
            for_s=float(rng.choice([0.0, rng.uniform(0, 0.8)])),
        )
