"""The privacy ledger: a record on disk of what was released, and the total epsilon of its entries.

An entry is written before the release leaves. A site that is killed in between has recorded a release that did not
happen, never the reverse. Entries of all kinds are composed with privacy loss distributions, as implemented by
`dp-accounting`: Koskela, Jaelkoe, Honkela 2020, "Computing tight differential privacy guarantees using FFT";
Doroshenko et al. 2022, "Connect the dots: tighter discrete approximations of privacy loss distributions".
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fl_runtime.errors import ConfigError, PrivacyBudgetError, StoreError
from fl_runtime.trainings import job_of
from fl_runtime.version import check_format

LEDGER_FILE = "privacy.sqlite"
_SCHEMA = """CREATE TABLE IF NOT EXISTS spent (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, job TEXT NOT NULL, round INTEGER NOT NULL, filter TEXT NOT NULL,
    mechanism TEXT NOT NULL)"""
_FORMAT = 1  # in the file's user_version, where 0 stands for 1
_BUSY_S = 30.0
_FINE, _COARSE = 50.0, 2000.0  # largest epsilons for which sampling is counted, and distributions are computed


Unit = Literal["update", "record"]
"""What an epsilon is about. Epsilons of different units do not add up."""

UNITS: dict[Unit, str] = {"update": "a site's whole update of a round", "record": "a single record of a site's data"}
"""Unit -> what it is, in words that follow "protects"."""


@dataclass(frozen=True)
class Mechanism:
    """One release as seen by the accounting, scaled to sensitivity 1.

    Attributes:
        kind: "gaussian", "laplace", or "pure" for any mechanism with a known pure epsilon.
        noise: Standard deviation of "gaussian", scale of "laplace", epsilon of "pure".
        sampling: For "gaussian": the probability with which a unit takes part, chosen in secret (Poisson sampling,
            adjacency by removal). 1 means no sampling.
        unit: What the guarantee is about: a site's whole "update" of a round, or a single "record" of its data.
        count: How many times it was released, such as the number of steps of DP-SGD.
    """

    kind: Literal["gaussian", "laplace", "pure"]
    noise: float
    sampling: float = 1.0
    unit: Unit = "update"
    count: int = 1


@dataclass(frozen=True)
class PrivacyBudget:
    """A privacy budget: (epsilon, delta)-differential privacy for everything that counts against it.

    Attributes:
        epsilon: Largest total epsilon.
        delta: The delta at which epsilon is computed.
    """

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Entry:
    """One recorded release.

    Attributes:
        at: Time, in seconds since the epoch.
        job: Name of the job. A further training of the same job is named JOB/2, JOB/3 and so on.
        round: The round; for a score, the version of the model.
        filter: Name of the filter; "DPSGD" for training with noise.
        mechanism: The release.
    """

    at: float
    job: str
    round: int
    filter: str
    mechanism: Mechanism


class Ledger:
    """The privacy ledger of one site, or of a server. Several processes may use it at the same time.

    Args:
        folder: Folder of the file privacy.sqlite; None keeps the ledger in memory.

    Raises:
        NewerFormatError: If a later version wrote the file.
        StoreError: If the file cannot be opened. Every method raises it if the disk fails; nothing must leave then.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / LEDGER_FILE
        with self._mapped_errors():
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self._path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            check_format(found or None, _FORMAT, "the privacy ledger", where=str(self._path))
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(_SCHEMA)

    def spend(
        self, job: str, round: int, name: str, mechanisms: Sequence[Mechanism], limits: Sequence[BudgetLimit]
    ) -> None:
        """Record releases that are about to leave.

        Args:
            job: Name of the job.
            round: The round.
            name: Name of the filter.
            mechanisms: The releases.
            limits: Limits that the total must not exceed.

        Raises:
            PrivacyBudgetError: If they would exceed a limit. Nothing is recorded then.
            StoreError: If the disk fails.
        """
        with self._mapped_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self.afford(job, round, mechanisms, limits)
                for mechanism in mechanisms:
                    row = (time.time(), job, round, name, json.dumps(asdict(mechanism)))
                    self._db.execute(
                        "INSERT INTO spent (at, job, round, filter, mechanism) VALUES (?, ?, ?, ?, ?)", row
                    )
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def afford(
        self, job: str, round: int, mechanisms: Sequence[Mechanism], limits: Sequence[BudgetLimit], until: int = 0
    ) -> None:
        """Check releases against limits without recording them.

        Args:
            job: Name of the job.
            round: The round.
            mechanisms: The releases.
            limits: Limits that the total must not exceed.
            until: Last round of those releases, if they are of several rounds.

        Raises:
            PrivacyBudgetError: If they would exceed a limit.
        """
        for limit, unit in itertools.product(limits, sorted({mechanism.unit for mechanism in mechanisms})):
            earlier = self.releases(job, all_jobs=limit.all_jobs, unit=unit)
            total = epsilon([*earlier, *(m for m in mechanisms if m.unit == unit)], limit.budget.delta)
            if total > limit.budget.epsilon:
                spent = epsilon(earlier, limit.budget.delta)
                scope = "all jobs" if limit.all_jobs else f"the job {job_of(job)}"
                rounds = f"rounds {round} to {until}" if until > round else f"round {round}"
                raise PrivacyBudgetError(
                    f"the privacy budget of {limit.owner} is spent: {rounds} would bring epsilon to {total:.4g} "
                    f"at delta {limit.budget.delta:g}, over the limit of {limit.budget.epsilon:g} for {scope}; so far "
                    f"{spent:.4g} is spent (epsilon protects {UNITS[unit]})",
                    where=f"round {round}" + (f", {self._path}" if self._path else ""),
                    fix="the model of the last round is kept; for more rounds, use more noise or a larger budget "
                    "(`fl-adapters privacy` shows the ledger)",
                )

    def entries(self) -> list[Entry]:
        """Return all recorded releases, oldest first."""
        with self._mapped_errors():
            rows = self._db.execute("SELECT at, job, round, filter, mechanism FROM spent ORDER BY id").fetchall()
        return [Entry(at, job, round, name, Mechanism(**json.loads(m))) for at, job, round, name, m in rows]

    def releases(self, job: str, *, all_jobs: bool = False, unit: Unit = "update") -> list[Mechanism]:
        """Return the releases so far.

        Args:
            job: Name of the job whose releases count, those of all its trainings. It may name one of them (JOB/2).
            all_jobs: Whether the releases of all jobs count.
            unit: What they are about.

        Returns:
            The releases, oldest first.
        """
        return [
            entry.mechanism
            for entry in self.entries()
            if entry.mechanism.unit == unit and (all_jobs or job_of(entry.job) == job_of(job))
        ]

    def spent(self, job: str, delta: float, *, all_jobs: bool = False, unit: Unit = "update") -> float:
        """Return the total epsilon of the releases so far.

        Args:
            job: Name of the job whose releases count, as in `releases`.
            delta: The delta at which epsilon is computed.
            all_jobs: Whether the releases of all jobs count.
            unit: What the releases are about.

        Returns:
            The epsilon.
        """
        return epsilon(self.releases(job, all_jobs=all_jobs, unit=unit), delta)

    def close(self) -> None:
        """Close the ledger's file."""
        self._db.close()

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the privacy ledger cannot be read or written: {error}",
                where=str(self._path),
                fix="free disk space, or check that the file is writable and not damaged; nothing has left the site",
            ) from error


@dataclass(frozen=True)
class BudgetLimit:
    """A privacy budget and the releases that count against it.

    Attributes:
        budget: The budget.
        owner: Whose budget it is, for messages.
        all_jobs: Whether the releases of all jobs count, not only those of the current one.
    """

    budget: PrivacyBudget
    owner: str
    all_jobs: bool = False


def need_accounting() -> None:
    """Check that the package `dp-accounting` is installed.

    Raises:
        ConfigError: If it is not; the message names the extra `[dp]`.
    """
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise ConfigError(
            "differential privacy with a budget needs the package dp-accounting, which is not installed",
            where="filters",
            fix='pip install "fl-adapters[dp]"',
        ) from None


def epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Compute the total epsilon of releases.

    Args:
        mechanisms: The releases, in any order, all of one unit.
        delta: The delta at which epsilon is computed.

    Returns:
        An upper bound of the smallest epsilon for which all releases together are (epsilon, delta)-differentially
        private, at most a hundredth above it. Exact for Gaussian noise alone. For others beyond 2000, an upper bound in
        closed form.

    Raises:
        ConfigError: If the package `dp-accounting` is not installed, and the releases are not Gaussian noise alone.
    """
    counts: Counter[Mechanism] = Counter()
    for mechanism in mechanisms:
        counts[Mechanism(mechanism.kind, mechanism.noise, mechanism.sampling)] += mechanism.count
    if all(m.kind == "gaussian" and m.sampling == 1 for m in counts):
        # Gaussian releases compose exactly into one, whose squared sensitivity is the sum of theirs
        return gaussian_epsilon(math.sqrt(sum(n / m.noise**2 for m, n in counts.items())), delta)
    sampled = {m: n for m, n in counts.items() if m.sampling < 1}
    if sampled and (
        _bound(counts.keys() - sampled.keys(), counts, delta) > _FINE or min(m.noise for m in sampled) < 0.3
    ):
        # with so large an epsilon, amplification by sampling is not worth its fine grid; leaving it out is safe
        return epsilon([Mechanism(m.kind, m.noise, count=n) for m, n in counts.items()], delta)
    strength = math.sqrt(sum(n / m.noise**2 for m, n in counts.items() if m.kind == "gaussian" and m.sampling == 1))
    others = [(m, n) for m, n in counts.items() if m.kind != "gaussian" or m.sampling < 1]
    bound = _bound(counts.keys() - sampled.keys(), counts, delta)
    if bound > _COARSE:
        return bound
    return _epsilon(round(strength, 12), tuple(sorted(others, key=repr)), delta, bound)


def gaussian_epsilon(strength: float, delta: float) -> float:
    """Compute the epsilon of one Gaussian release, exactly and without any package.

    Source: Balle and Wang 2018, "Improving the Gaussian mechanism for differential privacy", theorem 8.

    Args:
        strength: Sensitivity divided by the standard deviation of the noise.
        delta: The delta at which epsilon is computed.

    Returns:
        The smallest epsilon. 0 for a strength of 0.
    """

    def too_small(epsilon: float) -> bool:
        first = _log_normal(strength / 2 - epsilon / strength)
        second = epsilon + _log_normal(-strength / 2 - epsilon / strength)
        return second < first and first + math.log1p(-math.exp(second - first)) > math.log(delta)

    low, high = 0.0, strength**2 / 2 + strength * math.sqrt(2 * math.log(1 / delta))  # see `_bound`
    while high - low > 1e-9 * high + 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high


def _log_normal(x: float) -> float:
    """Return the logarithm of the standard normal distribution function at x."""
    if x > -20:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6  # Abramowitz and Stegun 1964, 26.2.12
    return -(x**2) / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log(series)


def _bound(mechanisms: Iterable[Mechanism], counts: Mapping[Mechanism, int], delta: float) -> float:
    """Return an upper bound of epsilon in closed form.

    Gaussian noise is rho-zCDP with rho = s^2 / 2 (Bun and Steinke 2016, "Concentrated differential privacy",
    proposition 1.3); pure epsilons add up.
    """
    square = pure = 0.0
    for m in mechanisms:
        if m.kind == "gaussian":
            square += counts[m] / m.noise**2
        else:
            pure += counts[m] * (1 / m.noise if m.kind == "laplace" else m.noise)
    return square / 2 + math.sqrt(2 * square * math.log(1 / delta)) + pure


@lru_cache(maxsize=256)
def _epsilon(strength: float, others: tuple[tuple[Mechanism, int], ...], delta: float, bound: float) -> float:
    if not strength and not others:
        return 0.0
    need_accounting()
    grid = max(1e-5, 2e-5 * bound)  # of the privacy loss
    if any(m.sampling < 1 for m, _ in others):
        grid = 1e-4
    parts = [_distribution(m, n, grid) for m, n in others]
    if strength:
        parts.append(_distribution(Mechanism("gaussian", 1 / strength), 1, grid))
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


def _distribution(mechanism: Mechanism, count: int, grid: float) -> Any:
    from dp_accounting.pld import common, privacy_loss_distribution

    if mechanism.kind == "gaussian":
        loss = privacy_loss_distribution.from_gaussian_mechanism(
            mechanism.noise, value_discretization_interval=grid, sampling_prob=mechanism.sampling
        )
    elif mechanism.kind == "laplace":
        loss = privacy_loss_distribution.from_laplace_mechanism(mechanism.noise, value_discretization_interval=grid)
    else:
        parameters = common.DifferentialPrivacyParameters(mechanism.noise, 0.0)
        loss = privacy_loss_distribution.from_privacy_parameters(parameters, value_discretization_interval=grid)
    return loss if count == 1 else loss.self_compose(count)
