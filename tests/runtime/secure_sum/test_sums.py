"""Secure sums equal NumPy's integer sums, also when sites drop out in any phase."""

from __future__ import annotations

import numpy as np
import pytest
from secure_sums import CONTEXT, Sums

from fl_runtime.errors import PermissionDeniedError, RoundFailedError
from fl_runtime.secure_sum import Ring, ServerSums, SumRules
from fl_runtime.secure_sum.context import needed_holders
from fl_runtime.types import Array

RINGS = {32: Ring(32, 8), 64: Ring(64, 32), 128: Ring(128, 60)}
PHASES = ["shares", "vectors", "signatures", "reveals"]


def names_of(count: int) -> list[str]:
    return [f"site-{number}" for number in range(count)]


def vectors_of(names: list[str], ring: Ring, shape: tuple[int, ...] = (5, 3)) -> dict[str, dict[str, Array]]:
    random = np.random.default_rng(len(names))
    return {
        name: {key: ring.encode(random.normal(size=shape)) for key in ("weights", "num_examples")} for name in names
    }


def integers(array: Array) -> list[int]:
    """The whole numbers of an array of any ring."""
    if array.shape[-1] == 2 and array.dtype == np.uint64:
        return [int(lower) + (int(upper) << 64) for lower, upper in array.reshape(-1, 2)]
    return [int(each) for each in array.reshape(-1)]


def expected(vectors: list[Array], ring: Ring) -> list[int]:
    return [sum(column) % 2**ring.bits for column in zip(*map(integers, vectors), strict=True)]


@pytest.mark.parametrize(("count", "bits"), [(3, 32), (3, 64), (3, 128), (10, 64), (31, 64), (32, 64), (200, 64)])
def test_the_sum_is_that_of_integers(count: int, bits: int) -> None:
    names, ring = names_of(count), RINGS[bits]
    sums, vectors = Sums(names), vectors_of(names, ring)
    if count == 200:  # seconds
        vectors = {name: {"weights": mine["weights"]} for name, mine in vectors.items()}
    sums.begin()
    sums.mask(vectors, ring)
    sums.agree()
    revealing = names if count < 200 else names[: needed_holders(0.6, 200) + 20]
    sums.reveal(revealing)
    totals = sums.totals(ring)
    masked = {key: total.copy() for key, total in totals.items()}
    sums.server.unmask(totals, ring)
    for key, total in totals.items():
        assert integers(total) == expected([vectors[name][key] for name in names], ring)
        assert not np.array_equal(total, masked[key])


@pytest.mark.parametrize("count", [3, 4, 7, 10, 31, 32, 40])
def test_three_of_ten_sites_may_drop_out_in_each_phase(count: int) -> None:
    """Four rounds with the same keys, in each of which other sites drop out in another phase."""
    names, ring = names_of(count), RINGS[64]
    sums, random = Sums(names), np.random.default_rng(count)
    values = {name: random.normal(size=3) for name in names}
    for number, phase in enumerate(PHASES, 1):
        lost = {each: list[str]() for each in PHASES}
        lost[phase] = list(random.choice(names, count * 3 // 10, replace=False))
        sums.begin(number, lost=lost["shares"])
        sums.mask({name: {"w": ring.encode(value)} for name, value in values.items()}, ring, lost=lost["vectors"])
        survivors = sums.agree(lost=lost["signatures"])
        gone = {*lost["signatures"], *lost["reveals"]}
        sums.reveal([name for name in survivors if name not in gone])
        totals = sums.totals(ring)
        sums.server.unmask(totals, ring)
        assert set(survivors) == set(names) - {*lost["shares"], *lost["vectors"]}
        unit = 2.0**-ring.fraction_bits
        expected = np.sum([np.round(values[name] / unit) for name in survivors], axis=0) * unit
        assert np.array_equal(ring.decode(totals["w"]), expected), f"{phase}, {count} sites"


@pytest.mark.parametrize("count", [3, 10, 31])
def test_signatures_that_come_with_the_vectors_spare_the_agreement(count: int) -> None:
    names, ring = names_of(count), RINGS[64]
    sums, vectors = Sums(names), vectors_of(names, ring)
    sums.begin()
    sums.mask(vectors, ring)
    survivors = sums.sign_all()
    assert all(map(sums.server.may_reveal, survivors))
    sums.reveal(survivors)
    totals = sums.totals(ring)
    sums.server.unmask(totals, ring)
    assert integers(totals["weights"]) == expected([vectors[name]["weights"] for name in names], ring)


def test_signatures_of_all_do_not_count_for_fewer() -> None:
    names, ring = names_of(5), RINGS[64]
    sums, vectors = Sums(names), vectors_of(names, ring)
    sums.begin()
    sums.mask(vectors, ring, lost=names[:1])
    survivors = sums.sign_all()
    assert survivors == tuple(names[1:]) and not any(map(sums.server.may_reveal, survivors))
    sums.reveal(sums.agree())
    totals = sums.totals(ring)
    sums.server.unmask(totals, ring)
    assert integers(totals["weights"]) == expected([vectors[name]["weights"] for name in survivors], ring)


def test_shares_for_the_next_round_leave_with_the_vectors_of_this_one() -> None:
    """One site drops out before its shares of round 1: rounds 2 and 3 are among the others."""
    names, ring = names_of(6), RINGS[64]
    sums, vectors = Sums(names), vectors_of(names, ring)
    server = sums.begin(lost=names[5:])
    for number in (1, 2, 3):
        sums.mask(vectors, ring)
        ahead = {name: sums.sites[name].begin_next(number, sums.stage, f"stage-{number + 1}") for name in sums.masked}
        sums.reveal(sums.sign_all())
        totals = sums.totals(ring)
        server.unmask(totals, ring)
        assert integers(totals["weights"]) == expected([vectors[name]["weights"] for name in names[:5]], ring)
        publics = {name: sums.publics[name] for name in names[:5]}
        sums.round, sums.stage = number + 1, f"stage-{number + 1}"
        assert ahead == {name: sums.sites[name].begin(sums.round, sums.stage, publics) for name in publics}
        sums.server = server = ServerSums(CONTEXT, sums.round, sums.stage, publics)
        for name, message in ahead.items():
            server.add_shares(name, message)


def test_thresholds_allow_three_of_ten_for_every_number_of_sites() -> None:
    assert all(count - count * 3 // 10 >= needed_holders(0.6, count) for count in range(3, 32))


def test_a_vector_that_some_lack_spoils_no_other() -> None:
    names, ring = names_of(5), RINGS[64]
    sums, vectors = Sums(names), vectors_of(names, ring)
    del vectors["site-2"]["num_examples"]
    vectors["site-4"]["own"] = ring.zeros((2,))
    sums.begin()
    sums.mask(vectors, ring)
    sums.reveal(sums.agree())
    totals = sums.totals(ring)
    sums.server.unmask(totals, ring)
    assert integers(totals["weights"]) == expected([vectors[name]["weights"] for name in names], ring)


def test_too_few_reveals_fail_the_round_and_say_for_whom() -> None:
    names, ring = names_of(4), RINGS[64]
    sums, vectors = Sums(names), vectors_of(names, ring)
    sums.begin()
    sums.mask(vectors, ring, lost=["site-3"])
    sums.agree()
    sums.reveal(names[:2])
    assert not sums.server.enough and sums.server.missing() == dict.fromkeys(names, 1)
    with pytest.raises(RoundFailedError, match=r"still needed for: site-0 \(1\)"):
        sums.server.unmask(sums.totals(ring), ring)


def test_more_dropouts_than_the_threshold_allows_stop_before_masking() -> None:
    sums, ring = Sums(names_of(10)), RINGS[64]
    sums.begin(lost=names_of(4))
    with pytest.raises(PermissionDeniedError, match="threshold=0.6 of this site: 7 of its 10 holders"):
        sums.mask(vectors_of(sums.names, ring), ring)


def test_what_the_server_stores_is_uniform() -> None:
    """Chi-square of the bytes of 1e6 masked values, all of them the same before."""
    ring, names = RINGS[64], names_of(3)
    constant = {name: {"w": ring.encode(np.full(1_000_000, 0.5))} for name in names}
    sums = Sums(names)
    sums.begin()
    sums.mask(constant, ring)
    for masked in sums.masked.values():
        for place in range(8):
            counts = np.bincount(masked["w"].view(np.uint8).reshape(-1, 8)[:, place], minlength=256)
            statistic = float(((counts - 1e6 / 256) ** 2 / (1e6 / 256)).sum())
            assert 150 < statistic < 390  # chi-square with 255 degrees of freedom: both tails are below 1e-6


def test_several_rounds_and_stages_use_fresh_masks() -> None:
    names, ring = names_of(3), RINGS[64]
    sums, vectors = Sums(names, SumRules(min_cohort=3)), vectors_of(names, ring)
    seen = []
    for round, stage in [(1, "update"), (1, "metrics"), (2, "update")]:
        sums.begin(round, stage)
        sums.mask(vectors, ring)
        sums.reveal(sums.agree())
        totals = sums.totals(ring)
        sums.server.unmask(totals, ring)
        assert integers(totals["weights"]) == expected([vectors[name]["weights"] for name in names], ring)
        seen.append(sums.masked["site-0"]["weights"].tobytes())
    assert len(set(seen)) == 3
