"""A short run of the chaos suite; `make chaos` is the long one."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from chaos import one_run, total
from chaos_plan import faults
from chaos_targets import FAILOVER, QueueTarget, Target, bare, script
from postgres import programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux for the disk that is filled")


def test_faults_come_as_their_seed_says() -> None:
    one, again, other = (faults(seed) for seed in (1, 1, 2))
    drawn = [next(one) for _ in range(50)]
    assert drawn == [next(again) for _ in range(50)]
    assert drawn != [next(other) for _ in range(50)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "most"),
    [
        (bare(kib=3 * 2**10, rounds=12), 12),
        (QueueTarget("queue", ["one", "two", "three"]), 8),
        (replace(FAILOVER, jobs=["one"], sites=2, rounds=12), 4),
        (script("xgboost", 30, "bagging"), 6),  # whose imports are the shortest
    ],
    ids=lambda given: given.name if isinstance(given, (Target, QueueTarget)) else "",
)
def test_a_run_under_faults_ends_with_the_bits_of_an_undisturbed_one(target: Target | QueueTarget, most: int) -> None:
    if target.name == FAILOVER.name and programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    slow = {"silence a connection"}  # is noticed after the site's patience
    counts = one_run(target, faults(7, without=slow), most)
    assert total(counts) > 0
