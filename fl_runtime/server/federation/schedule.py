"""Which of the jobs that wait starts next: first come, first served within priorities, if its sites have room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fl_runtime.server.federation.archive import JobRecord


def next_to_start(
    queued: Iterable[JobRecord], busy: Iterable[Sequence[str]], slots: Mapping[str, int]
) -> JobRecord | None:
    """Choose the job to start next.

    Args:
        queued: The jobs that wait.
        busy: For each job that runs, the sites that are at work for it.
        slots: Site -> number of jobs that it runs at a time. Sites that are not listed run one.

    Returns:
        Of the jobs whose sites all have room, the one with the highest priority, and among these the oldest. None if
        there is no such job.
    """
    used = Counter(site for sites in busy for site in sites)
    for record in sorted(queued, key=lambda item: (-item.priority, item.number)):
        if all(used[site] < slots.get(site, 1) for site in record.settings.sites):
            return record
    return None
