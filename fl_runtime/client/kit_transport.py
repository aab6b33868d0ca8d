"""The connection of a site or an admin with its startup kit: mutual TLS, held to the authority's revocation list."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from fl_runtime.errors import ConfigError, ConnectionLostError, PermissionDeniedError, ProtocolError
from fl_runtime.text import parse_json
from fl_runtime.transport.base import BEGINNINGS, Call
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.trust.files import read_file
from fl_runtime.trust.kits import CA, CRL
from fl_runtime.trust.revocation import RevocationList
from fl_runtime.trust.roots.staging import read_settled

log = logging.getLogger(__name__)

LIST_S = 60.0
"""How often the server is asked for a newer revocation list, in seconds. It is asked along with other calls."""

_ANSWER_S = 10.0
_ON_THEIR_OWN = ("Roots", "HandOutRoots", "Revoke")  # calls that may have to come before a list can be verified


class KitTransport:
    """A transport with the certificate of a kit. A server whose certificate was revoked gets no call.

    The newest revocation list that the server, or a person, has put into the kit is in force; it never goes back to an
    older one.

    Args:
        folder: The kit's folder.
        addresses: Addresses at which the server may be, each as "host:port"; one may be given as text.

    Raises:
        ConfigError: If the kit is not complete, or its revocation list is not valid, older than one before, or gone.
    """

    def __init__(self, folder: Path, addresses: str | Sequence[str]) -> None:
        credentials = FileCredentials(folder)
        self._folder = folder
        self._revoked = read_settled(folder, lambda: RevocationList(folder / CRL, self._roots))
        self._grpc = GrpcTransport(addresses, credentials=credentials, revoked=lambda: self._revoked.serials)
        self._fetching = threading.Lock()
        self._fetched_at: float | None = None
        self._said = ""  # what was warned of last, since it is asked again and again

    def _roots(self) -> bytes:
        """The trusted roots, read each time: they change with a rotation of the authority."""
        return read_file(self._folder / CA, "authority's certificate")

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Call:
        """Start a call, see `Transport.call`.

        Raises:
            ConnectionLostError: If the server cannot be reached, or the transport has been closed.
            PermissionDeniedError: If the server's certificate was revoked, or the revocation list has ended.
        """
        if method not in _ON_THEIR_OWN:
            self._fetch()
        current = self._revoked.current
        if current is not None and current.has_ended and method in BEGINNINGS:
            raise PermissionDeniedError(
                f"the revocation list ended on {current.ends:%Y-%m-%d %H:%M} UTC: nobody can tell which certificates "
                "still count",
                where="rule certificate: a revocation list that counts",
                fix="check this machine's clock; if it is right, ask the authority to run `fl-adapters cert crl`",
            )
        return self._grpc.call(method, requests)

    def close(self) -> None:
        """Close the connection and end its calls."""
        self._grpc.close()

    def _fetch(self) -> None:
        """Ask the server for a newer list, unless it was asked just now. The call itself reports a lost connection."""
        self._refresh()
        current = self._revoked.current
        recent = self._fetched_at is not None and time.monotonic() - self._fetched_at < LIST_S
        if (recent and not (current and current.has_ended)) or not self._fetching.acquire(blocking=False):
            return
        try:
            fields = self._ask(-1 if current is None else current.number)
            self._fetched_at = time.monotonic()
            if fields.get("crl"):
                self._revoked.install(str(fields["crl"]).encode(), "the list that the server sent")
            elif current is not None and int(str(fields.get("number", -1))) < current.number:
                self._warn(
                    "the server's revocation list is older than the one of this kit: ask the server's admin to copy "
                    "the newest crl.pem from the authority's folder into the server's kit"
                )
        except ConfigError as error:  # not signed by a root that this kit knows yet, or forged: it changes nothing
            self._warn(f"the server's revocation list was not taken: {error}")
        except (ConnectionLostError, PermissionDeniedError):
            pass
        except (ProtocolError, ValueError):  # an older server, which does not know the call
            self._fetched_at = time.monotonic()
        finally:
            self._fetching.release()

    def _refresh(self) -> None:
        """Take up a list that somebody has copied into the kit."""
        try:
            self._revoked.refresh()
        except ConfigError as error:
            log.warning("%s", error)

    def _warn(self, text: str) -> None:
        if text != self._said:
            self._said = text
            log.warning("%s", text)

    def _ask(self, number: int) -> dict[str, object]:
        call = self._grpc.call("Revocations", json.dumps({"number": str(number)}).encode())
        timer = threading.Timer(_ANSWER_S, call.cancel)
        timer.start()
        try:
            answers = list(call)
        finally:
            timer.cancel()
        try:
            fields = parse_json(answers[-1])
        except (ValueError, IndexError):
            fields = None
        if not isinstance(fields, dict):
            raise ProtocolError("the server's answer to Revocations is not a JSON object")
        return fields
