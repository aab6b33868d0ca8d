"""Newton's method on summed losses, gradients and Hessians; L-BFGS where a Hessian would be too large."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg, optimize

from ..federation import Array, Federation
from ..leading import Ask, lead

MOST_PARAMETERS = 2000  # a Hessian of more is not summed
_SETTLED = 1e-12  # share of the objective that the last step of Newton's method may still gain
_SHORTEST = 1e-9
_SWEEPS = 2000

Totals = Mapping[str, Array]
Search = Generator[Array, Totals, Array]


@dataclass(frozen=True)
class Penalty:
    """What is added to the loss of all rows.

    Attributes:
        squares: Factor of half the square of each parameter.
        sizes: Factor of the absolute value of each parameter.
    """

    squares: Array
    sizes: Array

    def value(self, point: Array) -> float:
        """Return the penalty of a point."""
        return float(0.5 * self.squares @ point**2 + self.sizes @ np.abs(point))


@dataclass(frozen=True)
class Limits:
    """When a solver stops.

    Attributes:
        iterations: Most iterations.
        rows: Sum of the weights of all rows, the scale of the loss.
    """

    iterations: int
    rows: float


@dataclass
class Progress:
    """How many iterations a solver has made, and whether it has converged."""

    iterations: int = 0
    converged: bool = True


def minimize(
    federation: Federation,
    start: Array,
    answer: Callable[[Array, bool], Totals],
    penalty: Penalty,
    limits: Limits,
    *,
    null: Array | None = None,
) -> tuple[Array, Progress]:
    """Minimise the loss of all rows plus a penalty.

    Args:
        federation: The federation.
        start: Parameters to start from, one-dimensional.
        answer: Gives this site's `loss` [1], `gradient` and, if its second argument is true, `hessian` at a point.
        penalty: The penalty.
        limits: When to stop.
        null: Added to the Hessian: products of directions in which the loss does not change, so that it has an inverse.

    Returns:
        The minimum, with the same bits at all sites, and the progress.
    """
    progress = Progress()
    small = len(start) <= MOST_PARAMETERS

    def drive(ask: Ask) -> Array:
        if small:
            search = newton(start, penalty, limits, progress, null)
            found = together([search], lambda points: [ask(points[0])])[0]
        else:
            found = _quasi_newton(ask, start, penalty, limits, progress)
        return np.concatenate([found, [progress.iterations, progress.converged]])

    padded = np.concatenate([start, [0.0, 0.0]])
    # Points have two further numbers, so that the last one tells all sites the progress.
    found = lead(
        federation,
        padded,
        lambda point: answer(point[: len(start)], small),
        lambda ask: drive(lambda point: ask(np.concatenate([point, [0.0, 0.0]]))),
    )
    return found[:-2], Progress(int(found[-2]), bool(found[-1]))


def together(searches: Sequence[Search], ask: Callable[[list[Array]], Sequence[Totals]]) -> list[Array]:
    """Run searches that each yield points and are sent totals; all are asked about in one call.

    Args:
        searches: Searches, such as those of `newton`.
        ask: Gets the current point of each search, and returns the totals for each. A search that has ended is asked
            about at its solution.

    Returns:
        The solutions.
    """
    points = [next(search) for search in searches]
    running = set(range(len(searches)))
    while running:
        totals = ask(points)
        for number in sorted(running):
            try:
                points[number] = searches[number].send(totals[number])
            except StopIteration as stop:
                points[number] = stop.value
                running.discard(number)
    return points


def newton(start: Array, penalty: Penalty, limits: Limits, progress: Progress, null: Array | None = None) -> Search:
    """Yield the points at which Newton's method needs loss, gradient and Hessian; return the minimum.

    Args:
        start: Where it starts.
        penalty: The penalty.
        limits: When to stop.
        progress: Gets the number of iterations.
        null: Added to the Hessian, see `minimize`.
    """
    point = start
    totals = yield point
    value = float(totals["loss"][0]) + penalty.value(point)
    for progress.iterations in range(1, limits.iterations + 1):
        gradient = totals["gradient"] + penalty.squares * point
        hessian = totals["hessian"] + np.diag(penalty.squares)
        if penalty.sizes.any():
            step = _proximal_step(point, gradient, hessian, penalty.sizes)
        else:
            step = _plain_step(gradient, hessian if null is None else hessian + null)
        gain = gradient @ step + penalty.sizes @ (np.abs(point + step) - np.abs(point))
        if -gain <= _SETTLED * max(abs(value), 1e-3 * limits.rows):
            progress.converged = True
            return point + step
        size = 1.0
        while True:
            totals = yield point + size * step
            trial = float(totals["loss"][0]) + penalty.value(point + size * step)
            if trial <= value + 1e-4 * size * gain + 1e-13 * abs(value):
                break
            size /= 2
            if size < _SHORTEST:
                return point
        point, value = point + size * step, trial
    progress.converged = False
    return point


def _plain_step(gradient: Array, hessian: Array) -> Array:
    try:
        return np.asarray(-linalg.cho_solve(linalg.cho_factor(hessian), gradient))
    except linalg.LinAlgError:
        scale = np.sqrt(np.maximum(np.diag(hessian), np.finfo(float).tiny))
        return np.asarray(-linalg.lstsq(hessian / np.outer(scale, scale), gradient / scale)[0] / scale)


def _proximal_step(point: Array, gradient: Array, hessian: Array, sizes: Array) -> Array:
    """Minimise the quadratic model plus the absolute values, one parameter after the other."""
    step = np.zeros_like(point)
    pull = gradient.copy()  # gradient of the quadratic model at the step
    curve = np.diag(hessian)
    for _ in range(_SWEEPS):
        largest = 0.0
        for number in np.flatnonzero(curve > 0):
            old = point[number] + step[number]
            wanted = old - pull[number] / curve[number]
            new = np.sign(wanted) * max(abs(wanted) - sizes[number] / curve[number], 0.0)
            if new != old:
                step[number] += new - old
                pull += hessian[number] * (new - old)
                largest = max(largest, curve[number] * (new - old) ** 2)
        if largest <= 1e-20 * max(1.0, float(-gradient @ step)):
            break
    return step


def _quasi_newton(ask: Ask, start: Array, penalty: Penalty, limits: Limits, progress: Progress) -> Array:
    """L-BFGS; absolute values are split into two parts that are not negative."""
    split = bool(penalty.sizes.any())

    def join(halves: Array) -> Array:
        return halves[: len(start)] - halves[len(start) :] if split else halves

    def objective(halves: Array) -> tuple[float, Array]:
        point = join(halves)
        totals = ask(point)
        value = float(totals["loss"][0]) + float(0.5 * penalty.squares @ point**2)
        gradient = totals["gradient"] + penalty.squares * point
        if split:
            value += float(penalty.sizes @ (halves[: len(start)] + halves[len(start) :]))
            gradient = np.concatenate([gradient + penalty.sizes, penalty.sizes - gradient])
        return value / limits.rows, gradient / limits.rows

    begin = np.concatenate([np.maximum(start, 0), np.maximum(-start, 0)]) if split else start
    bounds: Any = [(0, None)] * len(begin) if split else None
    options = {"maxiter": max(limits.iterations, 1000), "maxfun": 10_000, "maxls": 50, "gtol": 1e-9, "ftol": 1e-15}
    found = optimize.minimize(objective, begin, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    progress.iterations, progress.converged = int(found.nit), bool(found.success)
    return join(np.asarray(found.x))
