"""How many jobs a site runs at a time, and which GPUs each of them sees."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fl_runtime.trust.policy import Resources


@dataclass(frozen=True)
class Slots:
    """The places for jobs at a site.

    Attributes:
        count: Number of jobs at a time, at least 1.
        gpus: The site's devices, which the places divide among them; None leaves `CUDA_VISIBLE_DEVICES` alone.
    """

    count: int
    gpus: tuple[str, ...] | None

    @classmethod
    def of(cls, resources: Resources) -> Slots:
        """The places that a policy allows; one if it does not say."""
        return cls(resources.processes or 1, resources.gpus)

    def gpus_of(self, slot: int) -> str | None:
        """Return the devices of one place.

        Args:
            slot: Number of the place, from 0.

        Returns:
            A value for `CUDA_VISIBLE_DEVICES`; None leaves the variable alone. If there are fewer devices than places,
            several places share one.
        """
        if not self.gpus:
            return None if self.gpus is None else ""
        if len(self.gpus) < self.count:
            return self.gpus[slot % len(self.gpus)]
        return ",".join(self.gpus[slot % self.count :: self.count])  # the policy may allow fewer places than before

    def told(self) -> Mapping[str, int]:
        """Return what the server is told, so that it assigns no more than fits."""
        return {"slots": self.count, "gpus": len(self.gpus or ()), "memory_bytes": _memory_bytes()}


def _memory_bytes() -> int:
    """Size of this machine's memory; 0 if it is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
