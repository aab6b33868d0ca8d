"""What a site gives to jobs that run at a time."""

from __future__ import annotations

import pytest

from fl_adapters.cli.site.resources import Capacity, Place
from fl_runtime.trust.policy import Resources
from fl_runtime.types.needs import GIB, Needs

GPUS = ("0", "1", "2", "3")


def given(capacity: Capacity, *jobs: Needs) -> list[str | None]:
    """Devices of jobs that come one after another; "waits" for one without room."""
    taken: list[Place] = []
    seen: list[str | None] = []
    for needs in jobs:
        place = capacity.place(needs, taken)
        seen.append(place.visible_devices if place else "waits")
        taken += [place] if place else []
    return seen


@pytest.mark.parametrize(
    ("slots", "gpus", "jobs", "seen"),
    [
        (1, None, [None], [None]),
        (1, GPUS, [None, None], ["0,1,2,3", "waits"]),
        (2, GPUS, [None, None], ["0,2", "1,3"]),
        (3, ("0", "1"), [None, None, None], ["0", "1", "0"]),
        (3, GPUS, [1, 2, 1], ["0", "1,2", "3"]),  # of its place's share first, which is 0,3 and then 1
        (3, GPUS, [3, 2, 1], ["0,3,1", "waits", "2"]),
        (3, GPUS, [4, None, 0], ["0,3,1,2", "waits", ""]),
        (2, ("0", "1"), [1, None], ["0", "1"]),
        (2, ("0", "1"), [None, 1], ["0", "1"]),
        (2, ("0", "1"), [None, 2], ["0", "waits"]),
        (2, None, [2, 0], [None, ""]),
        (1, (), [None], [""]),
    ],
)
def test_a_job_that_names_a_number_of_gpus_has_them_for_itself(
    slots: int, gpus: tuple[str, ...] | None, jobs: list[int | None], seen: list[str | None]
) -> None:
    assert given(Capacity(slots, gpus, 0), *(Needs(job) for job in jobs)) == seen


def test_jobs_wait_for_memory_and_impossible_ones_are_refused() -> None:
    capacity = Capacity.of(Resources(gpus=("0",), processes=3, memory_gb=8))
    assert capacity.told() == {"slots": 3, "gpus": 1, "memory_bytes": 8 * GIB}
    five, three = Needs(0, 5 * GIB), Needs(0, 3 * GIB)
    assert given(capacity, five, five, three) == ["", "waits", ""]
    assert capacity.lacks(Needs(2)) == "the job needs 2 GPUs, this site has 1"
    assert capacity.lacks(Needs(0, 9 * GIB)) == "the job needs 9 GiB of memory, this site has 8.0"
    assert not capacity.lacks(Needs(1, 8 * GIB))
    assert Capacity.of(Resources()).told().keys() == {"slots", "memory_bytes"}
