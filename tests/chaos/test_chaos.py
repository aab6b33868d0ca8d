"""The chaos suite in short; `make chaos` is the long form."""

from __future__ import annotations

import sys

import pytest
from chaos import one_run, total
from chaos_plan import faults
from chaos_targets import bare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux for the disk that is filled")


def test_faults_come_as_their_seed_says() -> None:
    one, again, other = (faults(seed, 3) for seed in (1, 1, 2))
    drawn = [next(one) for _ in range(50)]
    assert drawn == [next(again) for _ in range(50)]
    assert drawn != [next(other) for _ in range(50)]


@pytest.mark.slow
def test_a_run_under_faults_ends_with_the_bits_of_an_undisturbed_one() -> None:
    slow = {"silence a connection"}  # is noticed after the site's patience
    counts = one_run(bare(kib=3 * 2**10, rounds=12), faults(7, 3, without=slow), most=12)
    assert total(counts) > 0
