"""All errors of fl-adapters. Each says what is wrong, where, and what to do about it.

A class exists only where a caller would handle it differently. Errors cross the network as the texts (code, what,
where, fix) and become the same class at the other end; nothing is unpickled.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from fl_runtime.text import printable


class FederationError(Exception):
    """Base class of all errors of fl-adapters.

    Texts are made printable, since another participant may have chosen a part of them.

    Args:
        what: What is wrong, in one sentence.
        where: The file, site, round or tensor concerned; may be empty.
        fix: What the reader can do about it; may be empty.

    Attributes:
        code: Identifier of the class on the network.
        what: What is wrong, in one sentence.
        where: The file, site, round or tensor concerned.
        fix: What the reader can do about it.
        from_peer: Whether another participant has raised it; then it is no decision of this process.
    """

    code: ClassVar[str] = "error"
    from_peer = False

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        what, where, fix = (printable(text, lines=True) for text in (what, where, fix))
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
        """Return the error as texts for the network.

        Returns:
            The fields `code`, `what`, `where` and `fix`, which `from_wire` reads.
        """
        return {"code": self.code, "what": self.what, "where": self.where, "fix": self.fix}

    @staticmethod
    def from_wire(fields: Mapping[str, str]) -> FederationError:
        """Return the error that `to_wire` described.

        Args:
            fields: The fields of `to_wire`. Missing ones count as empty.

        Returns:
            An error of the class with this code, or a plain FederationError if the code is unknown.
        """
        texts = {key: str(fields.get(key, "")) for key in ("code", "what", "where", "fix")}
        error = _rebuild(texts["code"], texts["what"], texts["where"], texts["fix"])
        error.from_peer = True
        return error


class ConfigError(FederationError):
    """A setting, an argument, a job file or a startup kit cannot work as it stands."""

    code = "config"


class NewerFormatError(ConfigError):
    """Data on disk were written by a later version of fl-adapters, and this one would misread them."""

    code = "newer-format"


class HandshakeError(FederationError):
    """The sites do not agree on something that must be equal. Raised at the handshake."""

    code = "handshake"


class StateMismatchError(HandshakeError):
    """Two sets of tensors differ in names, shapes or dtypes. The message lists the differences."""

    code = "state-mismatch"


class ProtocolError(FederationError):
    """Received bytes do not follow the protocol, or belong to a version of it that is not supported here."""

    code = "protocol"


class UpdateRefusedError(FederationError):
    """An update is not accepted, by the server or by the site's own check before sending.

    Reasons are values that are not finite, or no examples.
    """

    code = "update-refused"


class ConnectionLostError(FederationError):
    """The server could not be reached for longer than the `patience_s` of the startup kit."""

    code = "connection-lost"


class TransferDamagedError(ConnectionLostError):
    """Data arrived with a wrong digest. Like a broken connection, this is a reason to send it again."""

    code = "damaged"


class PermissionDeniedError(FederationError):
    """The caller is not allowed to do this, by its role, its certificate or the site's policy."""

    code = "permission-denied"


class PrivacyBudgetError(FederationError):
    """Sending this would exceed the privacy budget of the site or of the run."""

    code = "privacy-budget"


class QuorumError(FederationError):
    """Fewer sites are left than the job needs for a round."""

    code = "quorum"


class AbortedError(FederationError):
    """The run was ended by a person or by another error, which `what` names."""

    code = "aborted"


class StoreError(FederationError):
    """Reading or writing state on disk failed: the disk is full or read-only, or a file is damaged.

    Attributes:
        away: Whether a shared store is out of reach, or another server has it. What failed may succeed later.
    """

    code = "store"
    away: bool = False


class RoundFailedError(FederationError):
    """The updates of a round cannot be combined into a model. The server can open the round again."""

    code = "round-failed"


class SiteExcludedError(FederationError):
    """A site may not take part in a run any more, whichever process it starts: its updates made sums fail."""

    code = "site-excluded"


class SiteFailedError(FederationError):
    """The process of a site ended before its work was done."""

    code = "site-failed"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a suggestion to put before the fix of an error about an unknown name.

    Args:
        given: The name that the user typed.
        known: The names that exist.

    Returns:
        "did you mean fedprox? " with the closest name, whatever its case; "" if none is close.
    """
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given.strip().lower(), by_lower, n=1, cutoff=0.7)
    return f"did you mean {by_lower[close[0]]}? " if close else ""


def _all_classes(root: type[FederationError]) -> Iterator[type[FederationError]]:
    yield root
    for child in root.__subclasses__():
        yield from _all_classes(child)


def _rebuild(code: str, what: str, where: str, fix: str) -> FederationError:
    classes = {cls.code: cls for cls in reversed(list(_all_classes(FederationError)))}  # a base wins over its subclass
    return classes.get(code, FederationError)(what, where=where, fix=fix)
