"""The sessions of this process: one for each startup kit, opened by whichever callback asks first."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from pathlib import Path

from fl_adapters.participant.identity import Site
from fl_adapters.participant.kit import Kit, current_kit
from fl_adapters.participant.options import Options
from fl_adapters.participant.policy_gate import LeaveReason
from fl_adapters.participant.session import Session
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.transport import memory
from fl_runtime.transport.base import Transport


@dataclass(frozen=True)
class _Entry:
    """A session, and the process that opened it. Forked children inherit the entry and must not use the session."""

    session: Session
    pid: int

    @property
    def is_inherited(self) -> bool:
        return self.pid != os.getpid()


_sessions: dict[str, _Entry] = {}
_announced_alone = False


def open_session(options: Options, *, framework: str, fresh: bool = False) -> Session | None:
    """Return this process's session for the kit that `options` name, and join the run on first use.

    Args:
        options: The script's arguments.
        framework: Name of the training framework, such as "keras".
        fresh: Whether a training begins. If the site has left its last run, the script's next training is joined, which
            is a run of its own. If it is in the middle of a run, the site's next attempt at that run replaces the
            session, as when a notebook cell runs twice.

    Returns:
        The session; without `fresh` it may have ended. None without a startup kit, which is announced once on stderr,
        and in a process that was forked from the one that joined.

    Raises:
        ConfigError: There is no kit, although `options.required` asks for one.
        FederationError: The server cannot be reached or refuses this site.
    """
    kit = current_kit(options.kit)
    if kit is None:
        _announce_alone(options, framework)
        return None
    entry = _sessions.get(_key(kit))
    if entry is None:
        return _join(kit, options, framework, None)
    if entry.is_inherited:
        return None
    session = entry.session
    if not fresh or not (session.closed or session.registered):
        return session
    if session.departure.left:
        following = _join(kit, options, framework, session.site)
        session.departure.detach()  # only now, so that the server sees the site all the time
        return following
    session.departure.detach()  # leaving, even for a moment, could end a run that needs every site
    place = session.site
    return _join(kit, options, framework, replace(place, training=place.training - 1) if place.training > 1 else None)


def running_session(options: Options, *, framework: str) -> Session:
    """Return this process's session in the middle of a run.

    Args:
        options: The adapter's arguments, as they were given to `open_session`.
        framework: Name of the adapter's framework.

    Returns:
        The session.

    Raises:
        ConfigError: The startup kit has disappeared since the run began.
    """
    session = open_session(options, framework=framework)
    if session is None:
        raise ConfigError(
            "the startup kit has disappeared in the middle of a run",
            where=framework,
            fix="leave $FL_ADAPTERS_KIT and the kit's folder as they are until training has ended",
        )
    return session


@contextmanager
def leaving_on_error(leave: Callable[[BaseException], object]) -> Iterator[None]:
    """Leave the run as soon as the block raises, so that other sites need not wait for this process to end.

    Args:
        leave: Ends this site's part in the run. It is called with the error; a FederationError of its own is
            ignored, so that the first error is the one that is raised.
    """
    try:
        yield
    except BaseException as error:
        with suppress(FederationError):
            leave(error)
        raise


def close_sessions(reason: str, kit: Kit | None = None, *, failed: bool | None = None) -> None:
    """Leave the runs of this process, since its script has ended. Called automatically when the interpreter exits.

    Args:
        reason: Why the site leaves a run that has not ended, without any value of the user's: it is sent as it is.
        kit: Leave only the run of this kit; None leaves all runs.
        failed: Whether the script has ended with an error. Default: whether the interpreter ends with an exception.
    """
    early = hasattr(sys, "last_value") if failed is None else failed
    for key in list(_sessions) if kit is None else [_key(kit)]:
        entry = _sessions.pop(key, None)
        if entry is None or entry.is_inherited:
            continue
        if not entry.session.closed:
            entry.session.departure.abandon(LeaveReason.own(reason))
        entry.session.departure.end_script(early=early)


def end_finished_script(kit: Kit) -> None:
    """Tell a run whose training is over in this process that its script trains no more.

    Does nothing if the training goes on, or if the process has no session of this kit.

    Args:
        kit: The kit of the site.
    """
    entry = _sessions.get(_key(kit))
    if entry is not None and not entry.is_inherited and entry.session.closed:
        entry.session.departure.end_script(early=False)


def _key(kit: Kit) -> str:
    return f"{kit.server}/{kit.job}/{kit.site}"


def _join(kit: Kit, options: Options, framework: str, before: Site | None) -> Session:
    transport = _transport(kit)
    try:
        session = Session(kit, options, framework, transport, before)
    except FederationError:
        transport.close()
        raise
    _sessions[_key(kit)] = _Entry(session, os.getpid())
    reason = "its script ended before the last round"
    atexit.register(close_sessions, reason)
    # processes of multiprocessing, such as those of Lightning's ddp_spawn, end without what atexit has registered
    Finalize(None, close_sessions, args=(reason,), exitpriority=0)
    return session


def _transport(kit: Kit) -> Transport:
    if kit.server.startswith(memory.SCHEME):
        return memory.connect(kit.server, kit.site)
    if kit.credentials:
        from fl_runtime.client.roots import RenewingTransport

        return RenewingTransport.of_kit(Path(kit.credentials), kit.addresses)
    from fl_runtime.transport.grpc import GrpcTransport  # late: importing grpc takes time

    return GrpcTransport(kit.addresses, kit.token)


def _announce_alone(options: Options, framework: str) -> None:
    global _announced_alone
    if options.required:
        raise ConfigError(
            "this script must run in a federation (required=True), but there is no startup kit",
            fix="start it with `fl-adapters simulate`, set FL_ADAPTERS_KIT, or pass kit=",
        )
    if not _announced_alone:
        _announced_alone = True
        print(f"fl-adapters: no startup kit, so {framework} runs alone, on this machine's data", file=sys.stderr)
