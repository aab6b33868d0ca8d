"""What an admin may do in its federation, by the table of permissions that the server enforces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fl_adapters.dashboard.federation.view import Job, JobState
from fl_runtime.trust import permissions
from fl_runtime.trust.identity import Identity


@dataclass(frozen=True)
class Act:
    """Something that an admin does with a job.

    Attributes:
        call: The server's call.
        name: Name of the act, for a button.
        done: What the job is afterwards, for a message.
        states: States of a job in which it can be done.
        warning: What whoever confirms it must know.
    """

    call: str
    name: str
    done: str
    states: Sequence[JobState]
    warning: str


ACTS: Sequence[Act] = (
    Act("AbortJob", "Abort", "aborted", ("queued", "running"), "Its sites stop training. It can be resumed."),
    Act(
        "ResumeJob",
        "Resume",
        "back in the queue",
        ("failed", "aborted"),
        "It goes back into the queue, and goes on where it stopped.",
    ),
    Act(
        "DeleteJob",
        "Delete",
        "deleted",
        ("finished", "failed", "aborted"),
        "Its models and results at the server are deleted for good.",
    ),
)
"""All acts on jobs. Who may do them is in the table of permissions alone."""


@dataclass(frozen=True)
class Rights:
    """What one admin may do.

    Attributes:
        who: The admin, as the certificate of its kit says.
    """

    who: Identity

    def may(self, call: str) -> bool:
        """Return whether the admin may make a call that concerns no particular job, or its own ones.

        Args:
            call: Name of the call, such as "SubmitJob".
        """
        return permissions.may(self.who, call)

    def acts_on(self, job: Job) -> tuple[Act, ...]:
        """Return what the admin may do with a job in its present state.

        Args:
            job: The job. If its server does not tell who submitted it, what the role may do with its own jobs counts,
                and the server decides.
        """
        submitter = job.submitter or self.who
        return tuple(act for act in ACTS if job.state in act.states and permissions.may(self.who, act.call, submitter))
