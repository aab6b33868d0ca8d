"""Shamir's secret sharing: t of the holders open a secret, fewer learn nothing (Shamir 1979, "How to share a secret").

A secret is the constant term of a random polynomial of degree t - 1 modulo a prime. The share of holder x, which is not
0, is the polynomial's value there.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from math import prod

PRIME = 2**256 + 297
"""The smallest prime above 2^256, so that 32 bytes are one secret."""
SHARE_BYTES = 33


def split(secret: int, threshold: int, holders: Sequence[int], prime: int = PRIME) -> list[int]:
    """Share a secret.

    Args:
        secret: The secret, from 0 to `prime` - 1.
        threshold: Number t of shares that open it.
        holders: Number of each holder, different and not 0 modulo `prime`.
        prime: The prime.

    Returns:
        One share for each holder, in their order.
    """
    if not 0 <= secret < prime or not 1 <= threshold <= len(set(holders)) or any(x % prime == 0 for x in holders):
        raise ValueError("a secret cannot be shared like this")
    coefficients = [secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))]
    shares = []
    for x in holders:
        value = 0
        for coefficient in reversed(coefficients):
            value = value * x + coefficient
        shares.append(value % prime)  # once: x is small, so the value grows slowly
    return shares


def combine(shares: Mapping[int, int], threshold: int, prime: int = PRIME) -> int:
    """Open a secret.

    Args:
        shares: Number of a holder -> its share. More than `threshold` do no harm.
        threshold: Number t of shares that it was shared with.
        prime: The prime.

    Returns:
        The secret; another number if a share was not the holder's.

    Raises:
        ValueError: If there are fewer than `threshold` shares.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares do not open a secret; {threshold} are needed")
    chosen = sorted(shares)[:threshold]
    product, total = prod(chosen), 0
    for x in chosen:  # Lagrange's polynomials at 0; the products are of small numbers, so they are reduced once
        below = x * prod(other - x for other in chosen if other != x)
        total += shares[x] * product * pow(below, -1, prime)
    return total % prime
