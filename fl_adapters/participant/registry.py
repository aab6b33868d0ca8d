"""The sessions of this process: one for each startup kit, whichever callback asks first."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fl_adapters.participant.kit import Kit, current_kit
from fl_adapters.participant.options import Options
from fl_adapters.participant.session import Session
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.transport import memory
from fl_runtime.transport.base import Transport

_sessions: dict[str, Session] = {}
_said_alone = False


def open_session(options: Options, *, framework: str, fresh: bool = False) -> Session | None:
    """This process's session for the kit of `options`; joins the federation on first use.

    None without a kit, after one line on stderr that says so (ConfigError with `required`), and in a process
    forked from the one that joined. fresh: a new trainer begins; a session that is past its handshake hands over to
    a new attempt (a notebook cell that is run twice).
    """
    kit = current_kit(options.kit)
    if kit is None:
        _alone(options, framework)
        return None
    session = _sessions.get(_key(kit))
    if session is not None and session.pid != os.getpid():
        return None
    if session is not None and fresh and session.registered and not session.closed:
        session.hand_over()  # leaving, even for a moment, could end a run that needs every site
    if session is None or session.closed:
        session = _sessions[_key(kit)] = _joined(kit, options, framework)
    return session


def running_session(options: Options, *, framework: str) -> Session:
    """Return this process's session in the middle of a run.

    Args:
        options: The adapter's arguments, as they were given to `open_session`.
        framework: Name of the adapter's framework.

    Raises:
        ConfigError: If the startup kit has disappeared since the run began.
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
def leaving_on_error(leave: Callable[[str], object]) -> Iterator[None]:
    """Leave the run as soon as the block raises, so that other sites need not wait for this process to end.

    Args:
        leave: Ends this site's part in the run. It is called with the error as text; a FederationError of its own is
            ignored, so that the first error is the one that is raised.
    """
    try:
        yield
    except BaseException as error:
        with suppress(FederationError):
            leave(f"{type(error).__name__}: {error}")
        raise


def close_sessions(reason: str, kit: Kit | None = None) -> None:
    """Leave the runs of this process that have not ended: that of `kit`, else all of them. Runs by itself when the
    interpreter exits."""
    for key in list(_sessions) if kit is None else [_key(kit)]:
        session = _sessions.pop(key, None)
        if session is not None and session.pid == os.getpid() and not session.closed:
            session.leave(reason)


def _key(kit: Kit) -> str:
    return f"{kit.server}/{kit.job}/{kit.site}"


def _joined(kit: Kit, options: Options, framework: str) -> Session:
    transport = _transport(kit)
    try:
        session = Session(kit, options, framework, transport)
    except FederationError:
        transport.close()
        raise
    atexit.register(close_sessions, "its script ended before the last round")
    return session


def _transport(kit: Kit) -> Transport:
    if kit.server.startswith(memory.SCHEME):
        return memory.connect(kit.server, kit.site)
    from fl_runtime.transport.grpc import GrpcTransport  # here, so that nobody pays for it before connecting

    if kit.credentials:
        from fl_runtime.transport.tls import FileCredentials

        return GrpcTransport(kit.server, credentials=FileCredentials(Path(kit.credentials)))
    return GrpcTransport(kit.server, kit.token)


def _alone(options: Options, framework: str) -> None:
    global _said_alone
    if options.required:
        raise ConfigError(
            "this script must run in a federation (required=True), but there is no startup kit",
            fix="start it with `fl-adapters simulate`, set FL_ADAPTERS_KIT, or pass kit=",
        )
    if not _said_alone:
        _said_alone = True
        print(f"fl-adapters: no startup kit, so {framework} trains alone on this machine's data", file=sys.stderr)
