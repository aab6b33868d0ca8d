"""The choice of the protocol of a job's rounds at a site."""

from __future__ import annotations

from dataclasses import replace

from fl_adapters.participant.gate import Gate
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.local_result import UpdateHeader
from fl_adapters.participant.options import SiteSettings
from fl_adapters.participant.outputs import SiteHome
from fl_adapters.participant.protocols.base import RoundProtocol
from fl_adapters.participant.protocols.sum_record import SumRecord
from fl_adapters.participant.protocols.swarm import Seal, SwarmSite
from fl_runtime.client import SiteClient
from fl_runtime.client.job_settings import run_settings
from fl_runtime.errors import ConfigError
from fl_runtime.transport.waiting import SILENCE_S
from fl_runtime.types import Settings


def protocol_of(
    client: SiteClient,
    gate: Gate,
    kit: Kit,
    header: UpdateHeader,
    job: Settings,
    settings: SiteSettings,
    seal: Seal,
    home: SiteHome,
) -> RoundProtocol | None:
    """Return a site's part in the rounds of a job, if they have several steps.

    Args:
        client: The connection to the server.
        gate: The site's gate.
        kit: The site's startup kit.
        header: What all updates of this process have in common.
        job: The job's settings from the server.
        settings: The settings that hold at this site.
        seal: Encrypts a stream to another site; see `Session.seal`.
        home: The site's own folder.

    Returns:
        The protocol; None for rounds in which the server gets every update.

    Raises:
        ConfigError: A package that it needs is not installed, or the script asks for what the protocol cannot do.
    """
    strategy = settings.plan.strategy
    if settings.secure_sum:
        if settings.optimizer_state == "average":
            raise ConfigError(
                "optimizer_state: average sends moments, which are too small for the whole numbers of a secure sum",
                where="optimizer_state",
                fix='pass "keep" or "reset", or leave secure_sum out of the job',
            )
        own_server = kit.simulated and not kit.credentials  # this user's own: there is nothing to keep from it
        record = SumRecord(home.folder, fresh=home.fresh and own_server, durable=not own_server)
        return _secure_sum(client, gate, header, job, record)
    if strategy is None or not strategy.relayed:
        return None
    patience_s = min(kit.patience_s, SILENCE_S)
    return SwarmSite(client, header.site, seal, strategy, patience_s, float(job["deadline_s"]), gate.check_cohort)


def _secure_sum(
    client: SiteClient, gate: Gate, header: UpdateHeader, job: Settings, record: SumRecord
) -> RoundProtocol:
    from fl_adapters.participant.protocols.secure_sum import SecureSumSite
    from fl_runtime.secure_sum import SiteSums
    from fl_runtime.secure_sum.context import context_of, distributed_noise, noise_sharers

    rules, asked = gate.cohort.sum_rules, run_settings(job).sites_per_round
    divided = bool(distributed_noise(job.get("filters", ())))
    if divided:  # a sum over fewer sites would have too little noise
        rules = replace(rules, min_cohort=max(rules.min_cohort, noise_sharers(asked)))
    signatures = gate.cohort.signatures()
    sums = SiteSums(
        header.site,
        context_of(header.job, job.get("filters", ())),
        rules,
        signatures,
        signatures,
        record.read(),
        record.write,
        attempt=header.attempt,
    )
    return SecureSumSite(client, gate, header, sums, len(job["sites"]), equal_only=divided)
