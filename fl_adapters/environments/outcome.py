"""What a simulation came to: which site's end, if any, is the error to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_adapters.environments.processes import describe_status
from fl_runtime.errors import AbortedError, ConfigError, FederationError, QuorumError, SiteFailedError
from fl_runtime.types import RunSettings

AFTER_THE_LAST_ROUND = "after the last round"
_CONSEQUENCES = (QuorumError, AbortedError, SiteFailedError)


@dataclass(frozen=True)
class SiteExit:
    """How a site's process ended.

    status: as subprocess has it, negative for a signal. joined: it reached the server. clean: status 0, and it left
    the run by itself. first: no other site had dropped out before. when: such as "in round 3".
    tail: last lines of its log, empty if clean.
    """

    site: str
    status: int
    joined: bool
    clean: bool
    first: bool
    when: str
    log: Path
    tail: tuple[str, ...]


def verdict(error: FederationError | None, exits: Sequence[SiteExit], settings: RunSettings) -> FederationError | None:
    """The error of the run, None if it is a success.

    error: what the server says. Where that is only the consequence of a site's end, that site's own end is shown.
    A run whose rounds all finished has still failed if fewer than `min_sites` scripts ended well after it.
    """
    failed = [item for item in exits if item.status != 0]
    if error is None:
        enough = len(exits) - len(failed) >= settings.min_sites
        return None if enough else _explained(failed[-1], settings)
    cause = next((item for item in exits if item.first and not item.clean), None)
    if cause is None or not isinstance(error, _CONSEQUENCES):
        return error
    return _explained(cause, settings)


def _explained(item: SiteExit, settings: RunSettings) -> FederationError:
    if not item.joined and item.status == 0:
        return ConfigError(
            f"{item.site}'s script ended without exchanging anything with the server",
            where=_log_and_tail(item),
            fix="add callbacks=[FederatedCallback()] to the Trainer and let it train, "
            "or use fl_adapters.connect() in a loop of your own",
        )
    if item.status == 0:
        fix = "let the script take part until the rounds are over"
    else:
        fix = "correct what the log says"
    if 1 < settings.min_sites == len(settings.sites) and item.when != AFTER_THE_LAST_ROUND:
        fix += f", or set min_sites below {settings.min_sites} to go on without a site"
    return SiteFailedError(
        f"{item.site}'s process ended {item.when}: {describe_status(item.status)}", where=_log_and_tail(item), fix=fix
    )


def _log_and_tail(item: SiteExit) -> str:
    if not item.tail:
        return f"{item.log} (empty)"
    return "\n".join([f"{item.log}, which ends with", *(f"    | {line}" for line in item.tail)])
