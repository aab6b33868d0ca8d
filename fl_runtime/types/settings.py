"""The settings of a job, and what the sites' scripts propose where a job leaves them open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fl_runtime.types.messages import Content, Settings

MOST_ROUNDS = 1_000_000
"""Largest number of rounds of a job. The server keeps a result of each."""

MOST_SITES = 100_000
"""Largest number of sites of a job."""

LONGEST_S = 1e9
"""Longest time in the settings of a job, in seconds: 31 years. Python cannot wait for longer than 292."""

LARGEST_SEED = 2**63 - 1
"""Largest seed of a job."""

PRODUCTION_PATIENCE_S = 86_400.0
"""Default of `patience_s` in a federation between organisations: a day, for a network that is down over night."""

PRODUCTION_JOIN_S = 600.0
"""Default of `join_s` in a federation between organisations."""


SERVER_SETTINGS = frozenset({"min_sites", "deadline_s", "rejoin_s", "max_share", "durability", "join_s"})
"""Settings of a job that the server alone follows, so that sites of earlier versions need not know them."""


MODEL_SETTINGS = frozenset(
    {"strategy", "rounds", "late", "every", "exchange", "optimizer_state", "initial", "initial_job", "best_metric"}
    | {"best_mode", "exact_restart", "fraction", "max_share", "patience", "min_delta", "cross_site"}
)
"""Settings of a job that are about its models, and have no effect on trainings that only sum vectors."""


@dataclass(frozen=True)
class Terms:
    """Settings that the sites' scripts propose where the job leaves them open. All sites must propose the same.

    Attributes:
        content: What the arrays of updates hold.
        strategy: The strategy that fits these updates, as text.
        best_metric: Metric that decides which round is the best.
        best_mode: Whether lower or higher values of that metric are better.
        patience: Number of rounds without a better metric after which the run ends; None never ends it early.
        min_delta: Least difference of the metric that counts as better, for `patience`.
    """

    content: Content = "weights"
    strategy: str = "fedavg"
    best_metric: str = "loss"
    best_mode: Literal["min", "max"] = "min"
    patience: int | None = None
    min_delta: float = 0.0


OwnPart = Literal["initial", "metrics", "trees", "updates"]
"""What is one site's alone and may be kept from others: the weights that it begins with, its metrics and number of
examples, its trees or gradient histograms, its updates."""


@dataclass(frozen=True)
class CohortRules:
    """What a site's policy asks of a run: who is with it in every aggregate, and what is shown to no other site.

    The server keeps to it.

    Attributes:
        min_cohort: Least number of sites whose updates are in the aggregate, at least 1.
        max_share: Largest share of one site in its weights, above 0 and at most 1; None for no cap.
        own_model_stays: Whether the site's own model must not be sent to other sites.
        stays: What else of this site alone is kept from other sites.
    """

    min_cohort: int = 1
    max_share: float | None = None
    own_model_stays: bool = False
    stays: tuple[OwnPart, ...] = ()


@dataclass(frozen=True)
class RunSettings:
    """The settings of one job as the server and the sites read them. `fl_adapters.Job` describes each in full.

    Attributes:
        name: Name of the job.
        sites: Names of the sites, in the order in which updates are summed.
        min_sites: Number of updates that a round needs (the quorum).
        rounds: Number of rounds; None leaves it to the sites' trainers, which must agree.
        strategy: The strategy as text; None leaves it to the sites' `Terms`.
        deadline_s: Seconds after which a round closes with the updates that are there.
        late: What happens to an update that arrives after its round has closed.
        every: Local budget between two exchanges; None leaves it to the scripts.
        exchange: Which tensors travel; None leaves it to the scripts.
        keep_local: Name patterns of tensors that never leave a site.
        optimizer_state: What happens to optimizer state at an exchange; None leaves it to the scripts.
        filters: Filters of what travels, in order; each a table of settings.
        initial: Path of a safetensors file with the initial model; None takes the first site's weights.
        initial_job: The earlier job of the federation whose result is the initial model: `job`, its name; `model`,
            "last" or "best"; and what the server adds: `sha256` of the file, and `sites`, the names of those whose
            updates made the model, with spaces between. None for another initial model.
        best_metric: Metric that decides which round is the best; None leaves it to the sites' `Terms`.
        best_mode: Whether lower or higher is better; None leaves it to the sites' `Terms`.
        seed: Seed of everything random in the run; None means 0 where a number is needed.
        exact_restart: Whether a restarted site must end with the same bits.
        rejoin_s: Seconds to wait for a site whose connection is gone before `min_sites` decides.
        app: Name of the app that the sites run; the policy of a site maps it to a command.
        submitted_by: Identity (URI) of who submitted the job; "" in a simulation.
        fraction: Share of the sites that take part in a round, above 0 and at most 1.
        site_weights: Site name -> factor of its weight; 1 for sites not named.
        max_share: Largest share of one site in the weights of an aggregate; None for no cap.
        patience: Rounds without a better metric after which the run ends; None leaves it to the sites' `Terms`.
        min_delta: Least difference of the metric that counts as better, for `patience`.
        cross_site: Whether every site evaluates every site's model after the last round.
        durability: Whether acknowledged updates survive the death of processes, or also a power failure.
        trainings: Largest number of trainings in a site's script; None for any number.
        patience_s: Seconds to wait for a quorum that is gone, and for a server; None, as in a simulation, waits for
            `rejoin_s` and for as long as the sites' startup kits say.
        join_s: Seconds to wait for further sites once `min_sites` have registered; None waits until `deadline_s`.
        resources: What the job needs at each site: `gpus`, `memory_gb` (see `Needs`).
        secure_sum: Whether sites mask their updates, so that the server learns their sum alone.
    """

    name: str
    sites: tuple[str, ...]
    min_sites: int
    rounds: int | None = None
    strategy: str | None = None
    deadline_s: float = 86_400.0
    late: Literal["drop", "carry"] = "drop"
    every: str | int | None = None
    exchange: str | tuple[str, ...] | None = None
    keep_local: tuple[str, ...] = ()
    optimizer_state: str | None = None
    filters: tuple[Settings, ...] = ()
    initial: str | None = None
    initial_job: Mapping[str, str] | None = None
    best_metric: str | None = None
    best_mode: Literal["min", "max"] | None = None
    seed: int | None = None
    exact_restart: bool = False
    rejoin_s: float = 60.0
    app: str = ""
    submitted_by: str = ""
    fraction: float = 1.0
    site_weights: Mapping[str, float] = field(default_factory=dict)
    max_share: float | None = None
    patience: int | None = None
    min_delta: float = 0.0
    cross_site: bool = False
    durability: Literal["process", "power"] = "process"
    trainings: int | None = None
    patience_s: float | None = None
    join_s: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    secure_sum: bool = False

    def for_production(self, patience_s: float) -> RunSettings:
        """Return these settings with the defaults of a federation between organisations.

        Args:
            patience_s: How long it waits for a quorum, in seconds.

        Returns:
            The settings; what the job names itself is kept.
        """
        patience_s = patience_s if self.patience_s is None else self.patience_s
        return replace(self, patience_s=patience_s, join_s=PRODUCTION_JOIN_S if self.join_s is None else self.join_s)

    def without_model(self) -> RunSettings:
        """Return these settings with the defaults of all that are about models (`MODEL_SETTINGS`)."""
        defaults: dict[str, Any] = {item.name: item.default for item in fields(self) if item.name in MODEL_SETTINGS}
        return replace(self, **defaults)

    @property
    def names_initial(self) -> bool:
        """Whether the job says where its initial model comes from, so that no site is asked for its weights."""
        return bool(self.initial or self.initial_job)

    @property
    def sites_per_round(self) -> int:
        """Number of sites in a round: `fraction` of all sites, rounded up."""
        return max(1, math.ceil(self.fraction * len(self.sites) - 1e-9))
