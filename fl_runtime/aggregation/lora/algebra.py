"""Low-rank algebra: products of two thin matrices are factorised by QR without being computed."""

from __future__ import annotations

import numpy as np

from fl_runtime.types import Array

_RESOLUTION = 1e-9
"""Singular values below this share of the largest count as 0, since float32 factors do not resolve them."""


def factorized(left: Array, right: Array, rank: int | None = None) -> tuple[Array, Array]:
    """Compute the best approximation of left @ right of limited rank, as factors (U S, V^T).

    It takes O((m + n) c^2) operations: QR of both factors, then an SVD of the small core (Golub and Van Loan, "Matrix
    Computations", sections 5.2 and 8.6). The largest entry of each right singular vector is positive, which fixes the
    signs. If `rank` exceeds the rank of the product, the remaining columns of U S are 0 and the remaining rows of V^T
    orthonormal. A LoRA module can be trained from there, as from its initial state, where B is 0 and A is not.

    Args:
        left: [m, c], float64.
        right: [c, n], float64.
        rank: Largest rank; None keeps the rank of the product, which may be 0.

    Returns:
        U S [m, r] and V^T [r, n].
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    count = int(np.sum(s > _RESOLUTION * s[0])) if s.size and s[0] > 0 else 0
    s[count:] = 0
    width = count if rank is None else min(rank, s.size)
    outer, inner = (q_left @ u[:, :width]) * s[:width], vt[:width] @ q_right.T
    if width:
        largest = np.take_along_axis(inner, np.argmax(np.abs(inner), axis=1)[:, None], axis=1)
        signs = np.where(largest[:, 0] < 0, -1.0, 1.0)
        outer, inner = outer * signs, inner * signs[:, None]
    return outer, inner
