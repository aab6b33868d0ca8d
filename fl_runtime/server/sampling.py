"""Which sites take part in a round, where the job wants a fraction of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_runtime.types import RunSettings


def drawn(settings: RunSettings, round: int, present: Sequence[str]) -> list[str]:
    """The sites of a round, in the job's order, of those that are present.

    All sites of the job are shuffled by its seed (0 if it has none) and the round, and the first that are present
    count: the same for the same arguments, and a site that is away does not change the order of the others.
    """
    order = np.random.default_rng([settings.seed or 0, round]).permutation(len(settings.sites))
    able = [settings.sites[index] for index in order if settings.sites[index] in present]
    chosen = set(able[: settings.sites_per_round])
    return [name for name in settings.sites if name in chosen]
