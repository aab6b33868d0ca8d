"""Every error of fl-adapters. Each says what is wrong, where, and what to do about it.

The tree is small on purpose: a class exists where a caller would handle it differently. Errors cross the
network as (code, what, where, fix) and come out at the other end as the same class; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar


class FederationError(Exception):
    """Base of all our errors.

    what: one sentence naming what is wrong.  where: the file, site, round or tensor concerned.
    fix: what the reader can do about it.  `where` and `fix` may be empty.
    """

    code: ClassVar[str] = "error"

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  to do: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:  # frameworks send exceptions between their own processes
        return _rebuild, (self.code, self.what, self.where, self.fix)

    def to_wire(self) -> dict[str, str]:
        """What crosses the network; `from_wire` makes the same error of it."""
        return {"code": self.code, "what": self.what, "where": self.where, "fix": self.fix}

    @staticmethod
    def from_wire(fields: Mapping[str, str]) -> FederationError:
        """The error that `to_wire` described; an unknown code becomes a plain FederationError."""
        get = {k: str(fields.get(k, "")) for k in ("code", "what", "where", "fix")}
        return _rebuild(get["code"], get["what"], get["where"], get["fix"])


class ConfigError(FederationError):
    """A setting, argument, job file or startup kit that cannot work as it stands."""

    code = "config"


class HandshakeError(FederationError):
    """The sites do not agree on something they must agree on; raised before round 1."""

    code = "handshake"


class StateMismatchError(HandshakeError):
    """Two sets of tensors differ in names, shapes or dtypes; the message lists the differences."""

    code = "state-mismatch"


class ProtocolError(FederationError):
    """Bytes that do not follow the protocol, or a version that this side does not speak."""

    code = "protocol"


class UpdateRefusedError(FederationError):
    """An update the server (or the site's own check) does not take: not finite, no examples, fenced off."""

    code = "update-refused"


class ConnectionLostError(FederationError):
    """The server could not be reached for longer than the kit's patience."""

    code = "connection-lost"


class TransferDamagedError(ConnectionLostError):
    """Something arrived with a wrong digest; like a broken connection, a reason to send it again."""

    code = "damaged"


class PermissionDeniedError(FederationError):
    """Who is calling may not do this."""

    code = "permission-denied"


class PrivacyBudgetError(FederationError):
    """What is to be sent would exceed the privacy budget of a site, or of the run."""

    code = "privacy-budget"


class QuorumError(FederationError):
    """Fewer sites are left than the job needs."""

    code = "quorum"


class AbortedError(FederationError):
    """The run was ended by someone or by another error; `what` says by which."""

    code = "aborted"


class StoreError(FederationError):
    """The disk, a blob or the journal failed: full, read-only, torn, or from a newer version."""

    code = "store"


class RoundFailedError(FederationError):
    """The updates of a round do not make a result; the round can be opened again."""

    code = "round-failed"


class SiteFailedError(FederationError):
    """A site's own process ended before its work was done."""

    code = "site-failed"


def _all_classes(root: type[FederationError]) -> Iterator[type[FederationError]]:
    yield root
    for child in root.__subclasses__():
        yield from _all_classes(child)


def _rebuild(code: str, what: str, where: str, fix: str) -> FederationError:
    classes = {cls.code: cls for cls in _all_classes(FederationError)}
    return classes.get(code, FederationError)(what, where=where, fix=fix)
