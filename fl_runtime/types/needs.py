"""What a job needs at each of its sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """What a job needs at each of its sites, from its setting `resources`.

    Attributes:
        gpus: Number of GPUs that the job has for itself. None if not specified: it gets what the site gives to one of
            its places.
        memory_bytes: Size of the memory that it uses; 0 if not specified.
    """

    gpus: int | None = None
    memory_bytes: int = 0

    @classmethod
    def of(cls, resources: object) -> Needs:
        """Read the setting `resources` of a job.

        Args:
            resources: A table with `gpus` (a whole number) and `memory_gb` (GiB), both optional.

        Returns:
            What the job needs.

        Raises:
            ValueError: It is no such table. The message says why.
        """
        if not isinstance(resources, Mapping) or not resources.keys() <= {"gpus", "memory_gb"}:
            raise ValueError("is a table with gpus and memory_gb, such as {gpus: 1, memory_gb: 16}")
        numbers = {name: float(value) for name, value in resources.items() if isinstance(value, int | float)}
        if len(numbers) < len(resources) or not all(0 <= value < math.inf for value in numbers.values()):
            raise ValueError("holds numbers of at least 0")
        gpus = numbers.get("gpus")
        if gpus is not None and not gpus.is_integer():
            raise ValueError("names a whole number of gpus")
        return cls(None if gpus is None else int(gpus), int(numbers.get("memory_gb", 0) * GIB))
