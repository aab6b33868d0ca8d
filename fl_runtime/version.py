"""The version of fl-adapters, whose only source this is (packaging reads it unimported), and of the protocol."""

from __future__ import annotations

from fl_runtime.errors import ProtocolError

VERSION = "0.1.0"

PROTOCOL = 1
"""The protocol that this version speaks, the one and only so far; see wire/fl/v1/federation.proto."""

FEATURES: tuple[str, ...] = ("beats",)
"""Optional parts of the protocol that this side can do; both sides use what both name."""

SERVER_NAME = "server.fl-adapters.internal"
"""The name that sites expect in the server's certificate, whatever its address: only the authority gives it out."""


def choose_protocol(lowest: int, highest: int, version: str) -> int:
    """The protocol to speak with a site of fl-adapters `version` that speaks `lowest` to `highest`.

    Raises ProtocolError, naming the side to upgrade, where there is none in common.
    """
    if lowest <= PROTOCOL <= highest:
        return PROTOCOL
    ours, theirs = f"the server (fl-adapters {VERSION})", f"the site (fl-adapters {version or 'of unknown version'})"
    older = theirs if highest < PROTOCOL else ours
    raise ProtocolError(
        f"the site speaks protocol {lowest} to {highest}, this server {PROTOCOL}",
        where=f"{theirs} and {ours}",
        fix=f"upgrade {older}",
    )
