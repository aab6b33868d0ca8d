"""Products of two thin matrices, never formed: all that is done with them goes through QR of their factors."""

from __future__ import annotations

import numpy as np

from fl_runtime.types import Array

_NOTHING = 1e-9
"""Singular values below this share of the largest are nothing: float32 factors do not resolve them."""


def factorized(left: Array, right: Array, rank: int | None = None) -> tuple[Array, Array]:
    """The best approximation of left @ right with at most so many dimensions, as (U S, V^T).

    left: [m, c], right: [c, n], float64. rank: None keeps all of the product, whose rank may be 0. Where `rank` is
    more than the product has, what is left of U S is zero, and of V^T orthonormal: a LoRA module can go on from there
    as it does from its own beginning, where B is zero and A is not. Costs O((m + n) c^2) (QR of both factors, then an
    SVD of the small core; Golub and Van Loan, "Matrix Computations", section 5.2 and 8.6). The sign of each pair of
    singular vectors is the one that makes the largest entry of the right one positive.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    count = int(np.sum(s > _NOTHING * s[0])) if s.size and s[0] > 0 else 0
    s[count:] = 0
    kept = count if rank is None else min(rank, s.size)
    outer, inner = (q_left @ u[:, :kept]) * s[:kept], vt[:kept] @ q_right.T
    if kept:
        largest = np.take_along_axis(inner, np.argmax(np.abs(inner), axis=1)[:, None], axis=1)
        signs = np.where(largest[:, 0] < 0, -1.0, 1.0)
        outer, inner = outer * signs, inner * signs[:, None]
    return outer, inner
