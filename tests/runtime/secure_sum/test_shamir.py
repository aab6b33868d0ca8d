"""Shamir's shares against plain whole numbers: t shares open a secret, t - 1 say nothing."""

from __future__ import annotations

import secrets
from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_runtime.secure_sum.shamir import PRIME, combine, split


def test_the_modulus_is_prime() -> None:
    """Miller and Rabin, with 40 random bases."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        value = pow(secrets.randbelow(PRIME - 3) + 2, odd, PRIME)
        powers = [pow(value, 2**step, PRIME) for step in range(twos)]
        assert value == 1 or PRIME - 1 in powers


@given(st.integers(0, 2**256 - 1), st.integers(1, 12), st.integers(0, 5), st.randoms())
def test_any_t_shares_open_the_secret(secret: int, threshold: int, more: int, random: object) -> None:
    holders = secrets.SystemRandom().sample(range(1, 1000), threshold + more)
    shares = dict(zip(holders, split(secret, threshold, holders), strict=True))
    chosen = secrets.SystemRandom().sample(holders, threshold)
    assert combine({holder: shares[holder] for holder in chosen}, threshold) == secret


def test_opening_is_interpolation() -> None:
    """The oracle: Lagrange's polynomial at 0 in fractions, for a polynomial with small coefficients."""
    shares = {x: 7 + 3 * x + 2 * x * x for x in (1, 4, 9)}
    value = Fraction(0)
    for x, share in shares.items():
        factor = Fraction(share)
        for other in shares:
            if other != x:
                factor *= Fraction(-other, x - other)
        value += factor
    assert combine(shares, 3) == value == 7


def test_fewer_shares_are_refused() -> None:
    shares = dict(zip([1, 2, 3], split(5, 3, [1, 2, 3]), strict=True))
    for few in combinations(shares, 2):
        with pytest.raises(ValueError, match="2 shares do not open a secret; 3 are needed"):
            combine({holder: shares[holder] for holder in few}, 3)


def test_t_minus_1_shares_of_any_secret_are_equally_distributed() -> None:
    """In the field of 5 elements all polynomials of degree 2 are counted: two shares are uniform for each secret."""
    for secret in range(5):
        pairs = Counter[tuple[int, ...]]()
        for first in range(5):
            for second in range(5):
                pairs[tuple((secret + first * x + second * x * x) % 5 for x in (1, 3))] += 1
        assert set(pairs.values()) == {1} and len(pairs) == 25
    for secret in (0, 3):  # and those that `split` makes: chi-square with 24 degrees of freedom, below 1e-6 beyond 73
        drawn = Counter(tuple(split(secret, 3, [1, 3, 4], prime=5)[:2]) for _ in range(10_000))
        assert sum((drawn[one, other] - 400) ** 2 / 400 for one in range(5) for other in range(5)) < 73


@pytest.mark.parametrize(
    ("secret", "threshold", "holders"), [(PRIME, 2, [1, 2]), (1, 3, [1, 2]), (1, 2, [0, 1]), (1, 2, [1, 1])]
)
def test_what_cannot_be_shared_is_refused(secret: int, threshold: int, holders: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        split(secret, threshold, holders)
