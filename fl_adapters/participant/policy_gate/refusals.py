"""A record of what a site refuses: jobs, tasks, and updates that may not leave it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fl_runtime.errors import ConnectionLostError, FederationError, PermissionDeniedError, StoreError

if TYPE_CHECKING:  # these need `cryptography`, which the base install does not bring
    from fl_runtime.trust.audit import AuditLog
    from fl_runtime.trust.identity import Identity


class Refusals:
    """Records what the site refuses. This class records nothing, as a simulation does."""

    def record(self, action: str, error: FederationError, **facts: Any) -> None:
        """Record a refusal of this site. Other errors are left out: lost connections, full disks, and what others said.

        Args:
            action: What was refused.
            error: The refusal. It is recorded once, however often it passes here.
            **facts: Further facts; JSON values.

        Raises:
            StoreError: The audit log cannot be written.
        """

    @contextmanager
    def recording(self, action: str, **facts: Any) -> Iterator[None]:
        """Record what is refused in a `with` block.

        Args:
            action: What is refused if the block fails.
            **facts: Further facts; JSON values.
        """
        try:
            yield
        except FederationError as error:
            self.record(action, error, **facts)
            raise


class LoggedRefusals(Refusals):
    """Writes refusals to the site's audit log.

    Attributes:
        job: Name of the job that the site takes part in; empty before.
        by_policy: The last refusal by the site's policy. Its text is the policy's, free of data.
    """

    def __init__(self, audit: AuditLog, identity: Identity) -> None:
        self.job = ""
        self.by_policy: PermissionDeniedError | None = None
        self._audit, self._identity = audit, identity
        self._recorded: FederationError | None = None

    def record(self, action: str, error: FederationError, **facts: Any) -> None:
        if error is self._recorded or error.from_peer or isinstance(error, (ConnectionLostError, StoreError)):
            return
        self._recorded = error
        if isinstance(error, PermissionDeniedError) and error.where.startswith("rule "):
            self.by_policy = error
        self._audit.refused(self._identity, action, error, job=self.job, **facts)
