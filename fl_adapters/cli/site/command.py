"""The training command of a job at a site: its words, its kit, and what the server is told of its end."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.participant.departure import ScriptNote
from fl_adapters.participant.identity import POLICY_DATA_FIX, place_of_data
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.policy_gate import KitPolicyGate, LeaveReason
from fl_runtime.errors import ConfigError
from fl_runtime.trust.policy import POLICY_FILE, Policy

GOODBYE_S = 30.0


class CommandError(ConfigError):
    """The command of a job cannot be started at this site.

    Attributes:
        public: Why, without anything of the site's own: what the server is told.
    """

    public: str = "its command cannot be started"

    @property
    def reason(self) -> LeaveReason:
        """The error as a reason for not taking part."""
        return LeaveReason(self.what, self.public, self)


def command_for(gate: KitPolicyGate, app: str) -> list[str]:
    """Return the policy's command for an app.

    Args:
        gate: The site's policy.
        app: App of a job.

    Returns:
        The words of the command, the first of which can be started.

    Raises:
        CommandError: The policy names no command for the app, or one that is not there.
    """
    apps = gate.policy.apps
    if app not in apps:
        refusal = CommandError(
            f"the policy names no command for the app {app!r}",
            where=f"{POLICY_FILE} of {gate.identity}",
            fix="add it to the policy under `apps`, or give `fl-adapters run` the command after --",
        )
        refusal.public = f"its policy names no command for the app {app!r}"
        raise refusal
    try:
        words = shlex.split(apps[app])
    except ValueError as error:
        raise CommandError(
            f"the policy's command for the app {app!r} cannot be split into words: {error}", fix="correct its quotes"
        ) from None
    if not words or shutil.which(words[0]) is None:
        raise CommandError(
            f"{words[0] if words else app} cannot be started: there is no such program",
            where=f"the policy's command for the app {app!r}",
            fix="correct the path in the policy",
        )
    return words


def data_for(gate: KitPolicyGate, app: str) -> str:
    """Return where the site's data for an app lie, as the policy says.

    Args:
        gate: The site's policy.
        app: App of a job.

    Returns:
        A path or an address; "" if the policy says nothing.

    Raises:
        CommandError: The path does not exist.
    """
    if (data := gate.policy.data_for(app)) is None:
        return ""
    try:
        return place_of_data(data, where=f"data, in {POLICY_FILE} of {gate.identity}", fix=POLICY_DATA_FIX)
    except ConfigError as error:
        refusal = CommandError(error.what, where=error.where, fix=error.fix)
        refusal.public = "its data are not where its policy says"
        raise refusal from None


def gpu_environment(policy: Policy) -> dict[str, str]:
    """Return the environment variables that limit a command to the devices of a policy.

    Args:
        policy: The policy of a site.
    """
    gpus = policy.resources.gpus
    return {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def command_kit(
    kit: Kit, job: Assignment, run: Path | None, *, data: str, supervised: bool, shared: bool = False
) -> Kit:
    """Return the kit of a job's command.

    Args:
        kit: The site's startup kit.
        job: The job.
        run: Folder for outputs and models; None leaves them where the script puts them.
        data: Where the site's data for the job lie; "" if nobody has said.
        supervised: Whether the command is started again if it dies.
        shared: Whether the other sites, on the same machine, write to `run` too.

    Returns:
        The kit, to be saved in a folder of its own.
    """
    return Kit(
        job=job.job,
        site=kit.site,
        index=job.index,
        count=job.count,
        server=kit.server,
        servers=kit.servers,
        token="",
        credentials=kit.credentials,
        run="" if run is None else str(run.resolve()),
        simulated=shared,
        supervised=supervised,
        patience_s=kit.patience_s,
        own_patience=kit.own_patience,
        data=data,
    )


def leave(
    gate: KitPolicyGate, kit: Kit, job: str, note: ScriptNote | None, reason: LeaveReason, *, early: bool = True
) -> bool:
    """Leave a job in the name of the process that the site has started for it.

    The server does not listen if another process of the site has joined since.

    Args:
        gate: The site's policy, which decides what of the reason leaves.
        kit: The site's startup kit.
        job: Name of the job.
        note: What the process has left; None if it has not joined.
        reason: Why.
        early: Whether it is before the last round.

    Returns:
        Whether the server has heard it.
    """
    from fl_runtime.client import SiteClient
    from fl_runtime.client.roots import RenewingTransport

    transport = RenewingTransport.of_kit(Path(kit.credentials), kit.addresses)
    with closing(SiteClient(transport, GOODBYE_S, own_patience=True)) as client:
        client.speak_for(note.job if note else job, note.attempt if note else 0)
        return client.leave(gate.record_leaving(reason, early=early), early=early)


def quoted(words: Sequence[str]) -> str:
    """Return a command as a shell would take it."""
    return shlex.join(words)
