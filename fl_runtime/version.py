"""Version of fl-adapters and of its network protocol. Packaging reads this file without importing it."""

from __future__ import annotations

from fl_runtime.errors import ProtocolError

VERSION = "0.1.0"

PROTOCOL = 1
"""Protocol number of this version, the only one so far; see wire/fl/v1/federation.proto."""

COHORT = "cohort"
"""Feature of a server that keeps to what the sites' policies ask of every aggregate."""

FILES = "files"
"""Feature of a server that takes the small files that a model needs beside its weights."""

STAYS = "stays"
"""Feature of a server that keeps from other sites what a policy says is its site's alone."""

FEATURES: tuple[str, ...] = ("beats", "parts", "trainings", COHORT, FILES, STAYS)
"""Optional parts of the protocol that this version supports. Two sides use those that both name."""

SERVER_NAME = "server.fl-adapters.internal"
"""Name that sites expect in the server's certificate, whatever its address. Only the authority issues it."""


def choose_protocol(lowest: int, highest: int, version: str) -> int:
    """Choose the protocol for the connection to one site.

    Args:
        lowest: Lowest protocol number that the site supports.
        highest: Highest protocol number that the site supports.
        version: The site's version of fl-adapters; "" if unknown.

    Returns:
        The protocol number that both sides use.

    Raises:
        ProtocolError: No number is supported by both sides. The message names the side to upgrade.
    """
    if lowest <= PROTOCOL <= highest:
        return PROTOCOL
    server, site = f"the server (fl-adapters {VERSION})", f"the site (fl-adapters {version or 'of unknown version'})"
    older = site if highest < PROTOCOL else server
    raise ProtocolError(
        f"the site speaks protocol {lowest} to {highest}, this server {PROTOCOL}",
        where=f"{site} and {server}",
        fix=f"upgrade {older}",
    )
