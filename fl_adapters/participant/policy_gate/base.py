"""What every site asks before anything leaves it; without a startup kit, everything is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.participant.policy_gate.reasons import LeaveReason
from fl_adapters.participant.policy_gate.refusals import Refusals
from fl_runtime.filters.ledger import BudgetLimit
from fl_runtime.types import CohortRules, Report, Settings, Summary, Task, Terms, Update
from fl_runtime.wire.names import Facts

if TYPE_CHECKING:  # it needs `cryptography`, which the base install does not bring
    from fl_runtime.secure_sum import SumRules
    from fl_runtime.trust.streams.identity import StreamIdentity
    from fl_runtime.trust.streams.kit_signatures import KitSignatures


class CohortGate:
    """Asked of how many sites' updates models are made. This class allows every number, as a simulation does."""

    @property
    def rules(self) -> CohortRules:
        """What the policy asks of every aggregate, as the server is told."""
        return CohortRules()

    @property
    def sum_rules(self) -> SumRules:
        """What the site asks of every secure sum."""
        from fl_runtime.secure_sum import SumRules

        return SumRules(min_cohort=2)

    def signatures(self) -> KitSignatures | None:
        """Return what signs this site's keys of secure sums and verifies those of others; None without certificates."""
        return None

    def check(self, task: Task) -> None:
        """Check of how many updates the model of a task is made, and how many sites take part in its round."""


class TrackingGate:
    """Passes a site's own metrics to the trackers that its policy names. This class has none, as in a simulation."""

    def begin(self, job: Settings) -> None:
        """Begin to track the site's part in a job.

        Args:
            job: The job's settings.

        Raises:
            ConfigError: The policy names a tracker that cannot work.
        """

    def add(self, round: int, metrics: Mapping[str, float | Summary]) -> None:
        """Track metrics of this site; see `SiteTracking.add`."""

    def close(self, folder: Path, *, early: bool) -> None:
        """End the tracked run; see `SiteTracking.close`."""


class ProgressGate:
    """Asked whether the server may be told how far a site's training is. This class allows it, as a simulation does."""

    @property
    def allowed(self) -> bool:
        """Whether the server may be told this, and for how long the site has trained."""
        return True


class FilesGate:
    """Asked which small files beside a model may go to the server. This class allows all, as a simulation does."""

    def kept_back(self, files: Mapping[str, bytes]) -> dict[str, str]:
        """Return which files stay at the site, and record what becomes of each.

        Args:
            files: Name -> contents.

        Returns:
            Name of each file that stays -> the rule of the policy that keeps it.
        """
        return {}


class PolicyGate:
    """Asked before anything leaves a site. This class allows everything, as a simulation does.

    `KitPolicyGate` enforces the policy of a startup kit.

    Attributes:
        cohort: Asked of how many sites' updates models are made.
        files: Asked which small files beside the model may go to the server.
        progress: Asked whether the server may be told how far this site's training is.
        tracking: Passes this site's own metrics to the trackers on its machine.
        refusals: Records what the site refuses.
    """

    cohort: CohortGate = CohortGate()
    files: FilesGate = FilesGate()
    progress: ProgressGate = ProgressGate()
    tracking: TrackingGate = TrackingGate()
    refusals: Refusals = Refusals()

    def check_join(self, job: Settings, framework: str) -> None:
        """Check whether this site may take part in the job with this framework."""

    def check_handshake(self, names: Sequence[str], terms: Terms) -> None:
        """Check whether tensors of these names may travel, under the terms that the script proposes."""

    def check_names(self, names: Sequence[str], round: int, *, initial: bool) -> None:
        """Check whether tensors of these names may travel now. Called before filters, which may rename tensors.

        Args:
            names: Names of the tensors.
            round: Round of the task that they answer, for the audit log.
            initial: Whether they are this site's own weights for the initial model.
        """

    def visible_facts(self, facts: Facts) -> Facts:
        """Return what the site declares at the handshake, with the entries of lists kept back if the policy says so."""
        return facts

    def visible_software(self, info: Mapping[str, str]) -> Mapping[str, str]:
        """Return the part of `info` on this site's software that the server may see."""
        return info

    def record_task(self, task: Task) -> bool:
        """Record an arriving task. Return whether `filters` or `budget` may have changed since the last one."""
        return False

    def record_update(self, update: Update) -> None:
        """Check and record an update as the filters made it."""

    def record_report(self, report: Report) -> None:
        """Record a report as the filters made it."""

    def visible_reason(self, reason: LeaveReason) -> str:
        """Return the part of a reason that the server and the other sites may see."""
        return reason.text

    def record_leaving(self, reason: LeaveReason, *, early: bool) -> str:
        """Record that the site leaves. Return the reason as the server may see it."""
        return self.visible_reason(reason)

    def stream_identity(self) -> StreamIdentity | None:
        """Return what proves this site's identity to other sites, or None if there are no certificates."""
        return None

    @property
    def filters(self) -> Sequence[Settings]:
        """The policy's filters, which run last on what leaves."""
        return ()

    @property
    def budget(self) -> BudgetLimit | None:
        """Upper limit of the privacy budget that filters may spend at this site, over all jobs."""
        return None
