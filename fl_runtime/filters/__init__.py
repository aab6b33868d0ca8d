"""Filters: what changes an update or the arrays of a task on its way.

There are four points: server out and site in for tasks, site out and server in for updates. This version ships no
filter; a site passes its updates through an empty list, so that the order and the place are settled.
"""

from __future__ import annotations

from collections.abc import Sequence

from fl_runtime.types import Filter, Task, Update


def apply(filters: Sequence[Filter], update: Update, task: Task) -> Update:
    """The update after every filter, in order. Filters may work in place on arrays that the caller gives up."""
    for change in filters:
        update = change(update, task)
    return update
