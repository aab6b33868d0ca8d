"""Version of fl-adapters and of its network protocol. Packaging reads this file without importing it.

Data on disk carry a format number, which grows when the release before could not read them any more. Readers accept the
numbers that they know; a file without one has number 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fl_runtime.errors import NewerFormatError

VERSION = "0.1.0"

PROTOCOL_MIN, PROTOCOL_MAX = 1, 1
"""Lowest and highest protocol number that this version speaks; see wire/fl/v1/federation.proto."""

FIRST_VERSIONS: Mapping[int, str] = {1: "0.1.0"}
"""Protocol number -> first version of fl-adapters that speaks it, for messages."""

SERVER_NAME = "server.fl-adapters.internal"
"""Name that sites expect in the server's certificate, whatever its address. Only the authority issues it."""


def stamp(number: int) -> dict[str, Any]:
    """Return the fields that a JSON document on disk begins with: its format number, and the version that wrote it."""
    return {"format": number, "version": VERSION}


def check_format(found: object, newest: int, what: str, *, where: str, version: object = "") -> None:
    """Refuse data whose format number is higher than what this version reads.

    Args:
        found: The number in the data; None counts as 1.
        newest: Highest number that this version reads.
        what: What the data are, such as "the job".
        where: The file.
        version: The version of fl-adapters that wrote them; "" or None if unknown.

    Raises:
        NewerFormatError: It is higher, or not a number. The message names the version to install.
    """
    number = 1 if found is None else found
    if type(number) is int and 1 <= number <= newest:
        return
    raise later_data(f"{what} has format {number!r}, and this version reads up to {newest}", where, version)


def later_data(what: str, where: str, version: object = "") -> NewerFormatError:
    """Return the error for data that a later version wrote.

    Args:
        what: What this version cannot read of them, as a clause.
        where: The file.
        version: The version of fl-adapters that wrote them; "" or None if unknown.
    """
    wanted = f"{version} or later" if isinstance(version, str) and version else "a later version"
    return NewerFormatError(
        f"a later version of fl-adapters than {VERSION} wrote this: {what}",
        where=where,
        fix=f"install fl-adapters {wanted} here, or restore the backup from before the upgrade; nothing was changed",
    )
