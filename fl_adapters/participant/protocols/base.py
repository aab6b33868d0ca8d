"""The contract of a protocol with several steps in a round."""

from __future__ import annotations

from typing import Protocol

from fl_runtime.types import Report, Task, Update


class RoundProtocol(Protocol):
    """A site's part in rounds of several steps. The session's thread alone calls it."""

    def start(self) -> None:
        """Begin: the handshake is done."""
        ...

    def close(self) -> None:
        """End: the site leaves the run."""
        ...

    def outgoing(self, update: Update) -> Update:
        """Return what the server gets of this round's update.

        Args:
            update: The update as policy and filters let it leave. Borrowed for the call.
        """
        ...

    def keeps(self, report: Report) -> bool:
        """Take over a report on a global model, if the protocol sends it in a way of its own.

        Args:
            report: The report as policy and filters let it leave.

        Returns:
            Whether it has; else the session sends it.
        """
        ...

    def next_task(self) -> Task:
        """Wait for the next task of the trainer, and answer the steps of the protocol meanwhile."""
        ...
