"""Finds the error to show for a failed simulation: often the end of one site's process explains all the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_adapters.environments.logs import last_error
from fl_adapters.environments.processes import describe_status
from fl_runtime.errors import AbortedError, ConfigError, FederationError, QuorumError, SiteFailedError
from fl_runtime.types import RunSettings

AFTER_THE_LAST_ROUND = "after the last round"
_CONSEQUENCES = (QuorumError, AbortedError, SiteFailedError)


@dataclass(frozen=True)
class SiteExit:
    """How a site's process ended.

    Attributes:
        site: Name of the site.
        status: Exit status as `subprocess` reports it; -N stands for death by signal N.
        joined: Whether the site reached the server.
        clean: Whether the status is 0 and the site left after its last round.
        first: Whether this site was the first to drop out.
        when: Progress of the run at that time, such as "in round 3".
        log: Path of the site's log.
        tail: Last lines of the log; empty if the process ended cleanly.
    """

    site: str
    status: int
    joined: bool
    clean: bool
    first: bool
    when: str
    log: Path
    tail: tuple[str, ...]


def run_error(
    error: FederationError | None, exits: Sequence[SiteExit], settings: RunSettings
) -> FederationError | None:
    """The error to show for a run, or None if it succeeded.

    A server error that only follows from a site's end is replaced by that end. A run whose rounds all finished still
    failed if fewer than `min_sites` scripts ended with status 0.

    Args:
        error: The server's error, if any.
        exits: Ends of all site processes.
        settings: Settings of the run.

    Returns:
        The error, with the end of the log of the site that caused it.
    """
    failed = [item for item in exits if item.status != 0]
    if error is None:
        enough = len(exits) - len(failed) >= settings.min_sites
        return None if enough else _explained(failed[-1], exits, settings)
    cause = next((item for item in exits if item.first and not item.clean), None)
    if cause is None or not isinstance(error, _CONSEQUENCES):
        return error
    return _explained(cause, exits, settings)


def _explained(item: SiteExit, exits: Sequence[SiteExit], settings: RunSettings) -> FederationError:
    if not item.joined and item.status == 0:
        return ConfigError(
            f"{item.site}'s script ended without exchanging anything with the server",
            where=_log_and_tail(item),
            fix="add callbacks=[FederatedCallback()] to the Trainer and let it train, "
            "or use fl_adapters.connect() in a loop of your own",
        )
    if item.status == 0:
        fix = "let the script take part until the last round"
    else:
        fix = "correct the error in the log"
    alike = _all_alike(exits, settings)
    if 1 < settings.min_sites == len(settings.sites) and item.when != AFTER_THE_LAST_ROUND and not alike:
        fix += f", or set min_sites below {settings.min_sites} to continue without a site"
    others = "; every other site's ended alike" if alike else ""
    return SiteFailedError(
        f"{item.site}'s process ended {item.when}: {describe_status(item.status)}{others}",
        where=_log_and_tail(item),
        fix=fix,
    )


def _all_alike(exits: Sequence[SiteExit], settings: RunSettings) -> bool:
    """Whether there are several sites and every one failed with the same error, apart from names and numbers."""
    if len(exits) < len(settings.sites) or len(exits) < 2 or any(item.clean for item in exits):
        return False
    errors = {
        (item.status, re.sub(r"0x[0-9a-f]+|\d+", "", last_error(item.tail).replace(item.site, ""))) for item in exits
    }
    return len(errors) == 1


def _log_and_tail(item: SiteExit) -> str:
    if not item.tail:
        return f"{item.log} (empty)"
    return "\n".join([f"{item.log} ends with", *(f"    | {line}" for line in item.tail)])
