"""Which jobs a site has room for, and which GPUs each of them sees."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fl_runtime.trust.policy import Resources
from fl_runtime.types.needs import GIB, Needs


@dataclass(frozen=True)
class Place:
    """What one job occupies at a site.

    Attributes:
        number: Number of the place, from 0.
        gpus: Devices that the job sees; None leaves `CUDA_VISIBLE_DEVICES` alone.
        needs: What the job needs.
    """

    number: int
    gpus: tuple[str, ...] | None
    needs: Needs

    @property
    def visible_devices(self) -> str | None:
        """Value of `CUDA_VISIBLE_DEVICES`; None leaves the variable alone."""
        return None if self.gpus is None else ",".join(self.gpus)


@dataclass(frozen=True)
class Capacity:
    """What a site has for jobs.

    Attributes:
        slots: Number of jobs at a time, at least 1.
        gpus: The site's devices, which the jobs divide among them; None leaves `CUDA_VISIBLE_DEVICES` alone.
        memory_bytes: Memory for all jobs together; 0 if it is not known.
    """

    slots: int
    gpus: tuple[str, ...] | None
    memory_bytes: int

    @classmethod
    def of(cls, resources: Resources) -> Capacity:
        """What a policy allows; one job at a time, and the machine's memory, where it does not say."""
        memory_gb = resources.memory_gb
        memory_bytes = _memory_bytes() if memory_gb is None else int(memory_gb * GIB)
        return cls(resources.processes or 1, resources.gpus, memory_bytes)

    def told(self) -> Mapping[str, int]:
        """Return what the server is told, so that it assigns no more than fits. What is not known is left out."""
        told = {"slots": self.slots}
        if self.gpus is not None:
            told["gpus"] = len(self.gpus)
        if self.memory_bytes:
            told["memory_bytes"] = self.memory_bytes
        return told

    def lacks(self, needs: Needs) -> str:
        """Return what of a job's needs this site does not have, whatever runs here; "" if nothing.

        Args:
            needs: What the job needs.
        """
        if needs.gpus and self.gpus is not None and needs.gpus > len(self.gpus):
            return f"the job needs {needs.gpus} GPUs, this site has {len(self.gpus)}"
        if self.memory_bytes and needs.memory_bytes > self.memory_bytes:
            gib = f"{needs.memory_bytes / GIB:g} GiB of memory"
            return f"the job needs {gib}, this site has {self.memory_bytes / GIB:.1f}"
        return ""

    def place(self, needs: Needs, taken: Sequence[Place]) -> Place | None:
        """Return a place for a job beside others.

        Args:
            needs: What the job needs.
            taken: The places of the other jobs.

        Returns:
            The place. A job that names a number of GPUs has them for itself. Others divide the rest evenly, by the
            number of places; if there are fewer devices than places, several share one. None if there is no room now.
        """
        used = sum(other.needs.memory_bytes for other in taken)
        if self.memory_bytes and needs.memory_bytes and used + needs.memory_bytes > self.memory_bytes:
            return None
        numbers = set(range(self.slots)) - {other.number for other in taken}
        if not numbers:
            return None
        number = min(numbers)
        gpus = self._gpus(number, needs, taken)
        return None if gpus is None and self.gpus is not None else Place(number, gpus, needs)

    def _gpus(self, number: int, needs: Needs, taken: Sequence[Place]) -> tuple[str, ...] | None:
        """Devices for a job in a place; None if there are not enough, or if this site does not divide any."""
        if needs.gpus == 0:
            return ()
        if self.gpus is None:
            return None
        own = {gpu for other in taken if other.needs.gpus is not None for gpu in other.gpus or ()}
        seen = own.union(*(other.gpus or () for other in taken))
        share = self._share(number)
        if needs.gpus is not None:
            free = sorted((gpu for gpu in self.gpus if gpu not in seen), key=lambda gpu: gpu not in share)
            return tuple(free[: needs.gpus]) if len(free) >= needs.gpus else None
        left = tuple(gpu for gpu in share if gpu not in own) or tuple(gpu for gpu in self.gpus if gpu not in seen)[:1]
        return left if left or not self.gpus else None

    def _share(self, number: int) -> tuple[str, ...]:
        """Devices of a place if the devices are divided evenly."""
        if not self.gpus:
            return ()
        if len(self.gpus) < self.slots:
            return (self.gpus[number % len(self.gpus)],)
        return self.gpus[number :: self.slots]


def _memory_bytes() -> int:
    """Size of this machine's memory; 0 if it is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
