"""What has been spent of a privacy budget: a ledger on disk, and the epsilon that its entries amount to.

An entry is written before what it pays for leaves, so a site that is killed in between has paid for nothing sent,
and never the other way round. Entries compose whatever they are, by privacy loss distributions: Koskela, Jaelkoe,
Honkela 2020, "Computing tight differential privacy guarantees using FFT"; Doroshenko et al. 2022, "Connect the dots:
tighter discrete approximations of privacy loss distributions", as `dp-accounting` implements them.
"""

from __future__ import annotations

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

LEDGER_FILE = "privacy.sqlite"
_SCHEMA = """CREATE TABLE IF NOT EXISTS spent (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, job TEXT NOT NULL, round INTEGER NOT NULL, filter TEXT NOT NULL,
    mechanism TEXT NOT NULL)"""
_BUSY_S = 30.0
_FINE, _COARSE = 50.0, 2000.0  # epsilons up to which sampling is counted, and distributions are computed


@dataclass(frozen=True)
class Mechanism:
    """One release, as accounting sees it: what it protects has sensitivity 1.

    gaussian: `noise` is the standard deviation; with `sampling` < 1 each unit takes part with that probability,
    secretly (Poisson), adjacency by leaving out. laplace: `noise` is the scale. pure: any mechanism with a pure
    epsilon, which is `noise`.
    """

    kind: Literal["gaussian", "laplace", "pure"]
    noise: float
    sampling: float = 1.0


@dataclass(frozen=True)
class PrivacyBudget:
    """epsilon at delta: the most that may be spent."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. at: seconds since the epoch."""

    at: float
    job: str
    round: int
    filter: str
    mechanism: Mechanism


class Ledger:
    """The ledger of one site (or of a server), in `folder`/privacy.sqlite; in memory without a folder.

    Several processes may use it at once. StoreError where the disk fails: nothing leaves that is not on record.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / LEDGER_FILE
        with self._mapped_errors():
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self._path or ":memory:", timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(_SCHEMA)

    def spend(
        self, job: str, round: int, name: str, mechanisms: Sequence[Mechanism], limits: Sequence[BudgetLimit]
    ) -> None:
        """Write down what is about to leave. PrivacyBudgetError, and nothing is written, if that exceeds a limit."""
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

    def afford(self, job: str, round: int, mechanisms: Sequence[Mechanism], limits: Sequence[BudgetLimit]) -> None:
        """PrivacyBudgetError if these releases would exceed one of the limits."""
        for limit in limits:
            before = [entry.mechanism for entry in self.entries() if limit.all_jobs or entry.job == job]
            found = epsilon([*before, *mechanisms], limit.budget.delta)
            if found > limit.budget.epsilon:
                spent = epsilon(before, limit.budget.delta)
                whole = "all jobs" if limit.all_jobs else f"the job {job}"
                raise PrivacyBudgetError(
                    f"the privacy budget of {limit.owner} is spent: round {round} would bring epsilon to {found:.4g} "
                    f"at delta {limit.budget.delta:g}, over the limit of {limit.budget.epsilon:g} for {whole}; "
                    f"{spent:.4g} is spent",
                    where=f"round {round}" + (f", {self._path}" if self._path else ""),
                    fix="the model of the last round is kept; for more rounds, use more noise, or decide on a "
                    "larger budget (fl-adapters privacy shows the ledger)",
                )

    def entries(self) -> list[Entry]:
        """Everything that was spent, oldest first."""
        with self._mapped_errors():
            rows = self._db.execute("SELECT at, job, round, filter, mechanism FROM spent ORDER BY id").fetchall()
        return [Entry(at, job, round, name, Mechanism(**json.loads(m))) for at, job, round, name, m in rows]

    def spent(self, job: str, delta: float, *, all_jobs: bool = False) -> float:
        """The epsilon so far."""
        return epsilon([e.mechanism for e in self.entries() if all_jobs or e.job == job], delta)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the privacy ledger failed: {error}",
                where=str(self._path),
                fix="free disk space, or check that the file is writable and not damaged; nothing has left the site",
            ) from error


@dataclass(frozen=True)
class BudgetLimit:
    """A budget and what it holds for. owner: whose it is, for messages."""

    budget: PrivacyBudget
    owner: str
    all_jobs: bool = False


def need_accounting() -> None:
    """ConfigError where `dp-accounting` is not installed."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise ConfigError(
            "differential privacy with a budget needs the package dp-accounting, which is not installed here",
            where="filters",
            fix='pip install "fl-adapters[dp]"',
        ) from None


def epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The smallest epsilon for which all of these together are (epsilon, delta)-differentially private, from above
    and to within a hundredth; beyond 2000 an upper bound in closed form. ConfigError without `dp-accounting`."""
    counts = Counter(mechanisms)
    sampled = {m: n for m, n in counts.items() if m.sampling < 1}
    if sampled and (
        _bound(counts.keys() - sampled.keys(), counts, delta) > _FINE or min(m.noise for m in sampled) < 0.3
    ):
        # so much is lost that the amplification by sampling, which may be left out, is not worth its fine grid
        counts = Counter(Mechanism(m.kind, m.noise) for m in counts.elements())
        sampled = {}
    # Gaussian releases compose into one, exactly: sensitivities add in quadrature
    strength = math.sqrt(sum(n / m.noise**2 for m, n in counts.items() if m.kind == "gaussian" and m.sampling == 1))
    others = [(m, n) for m, n in counts.items() if m.kind != "gaussian" or m.sampling < 1]
    bound = _bound(counts.keys() - sampled.keys(), counts, delta)
    if bound > _COARSE:
        return bound
    return _epsilon(round(strength, 12), tuple(sorted(others, key=repr)), delta, bound)


def _bound(mechanisms: Iterable[Mechanism], counts: Mapping[Mechanism, int], delta: float) -> float:
    """An epsilon that certainly holds. Gaussian noise is rho-zCDP with rho = s^2 / 2 (Bun and Steinke 2016,
    "Concentrated differential privacy", proposition 1.3); pure epsilons add up."""
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
        found = privacy_loss_distribution.from_gaussian_mechanism(
            mechanism.noise, value_discretization_interval=grid, sampling_prob=mechanism.sampling
        )
    elif mechanism.kind == "laplace":
        found = privacy_loss_distribution.from_laplace_mechanism(mechanism.noise, value_discretization_interval=grid)
    else:
        parameters = common.DifferentialPrivacyParameters(mechanism.noise, 0.0)
        found = privacy_loss_distribution.from_privacy_parameters(parameters, value_discretization_interval=grid)
    return found if count == 1 else found.self_compose(count)
