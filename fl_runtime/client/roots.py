"""A participant's part in a rotation of the authority: it asks the server for new roots and takes them up."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fl_runtime.errors import FederationError, ProtocolError, StoreError
from fl_runtime.text import parse_json
from fl_runtime.transport.base import Call, Transport
from fl_runtime.transport.threads import start_thread

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


def take_up_new_roots(folder: Path, transport: Transport) -> bool:
    """Ask the server for new roots, and take them up. The kit's next call uses the new certificate.

    Args:
        folder: The participant's kit.
        transport: A connection with the kit's credentials.

    Returns:
        Whether there were any.

    Raises:
        ConnectionLostError: The server is out of reach.
        FederationError: The server refused the call, or what it sent is not signed by a root that the kit trusts.
    """
    from fl_runtime.trust.kits import known_roots, take_up_roots

    taken = False
    while True:
        offer = _last(transport.call("Roots", _question(known_roots(folder).number, wait=False)))
        if not offer.get("statements") and not offer.get("certificates"):
            return taken
        if take_up_roots(folder, offer) is None:
            return taken
        taken = True  # ask again: with the new certificate, the server learns that it was taken up


class RenewingTransport:
    """A connection with a kit's credentials that takes up new roots of the authority while it is open.

    Args:
        folder: The participant's kit.
        transport: The connection, which this one closes.
    """

    def __init__(self, folder: Path, transport: Transport) -> None:
        self._transport = transport
        self._watch = RootsWatch(folder, transport)

    @classmethod
    def of_kit(cls, folder: Path, addresses: str | Sequence[str]) -> RenewingTransport:
        """Connect to the server with the credentials of a kit.

        Args:
            folder: The participant's kit.
            addresses: Addresses at which the server may be, each as "host:port"; one may be given as text.

        Returns:
            The connection, which is made at the first call.
        """
        from fl_runtime.client.kit_transport import KitTransport

        return cls(folder, KitTransport(folder, addresses))

    def call(self, method: str, requests: bytes | Iterable[bytes]) -> Call:
        """Start a call, see `Transport.call`."""
        return self._transport.call(method, requests)

    def close(self) -> None:
        """Close the connection and end its calls."""
        self._watch.close()
        self._transport.close()


class RootsWatch:
    """Takes up new roots in a kit while a process runs, in a thread of its own, until it is closed.

    A server that does not know of rotations, or is out of reach, changes nothing: the watch asks again later.

    Args:
        folder: The participant's kit.
        transport: A connection with the kit's credentials. Whoever made it closes it, after `close`.
    """

    def __init__(self, folder: Path, transport: Transport) -> None:
        self._folder, self._transport = folder, transport
        self._closed = threading.Event()
        self._call: Call | None = None
        self._said = ""
        self._thread = start_thread(self._watch, "fl-roots")

    def close(self) -> None:
        """End the call that waits for new roots."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def _watch(self) -> None:
        from fl_runtime.trust.kits import known_roots, take_up_roots

        pause_s = _FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                self._call = self._transport.call("Roots", _question(known_roots(self._folder).number, wait=True))
                if self._closed.is_set():
                    self._call.cancel()
                offer = _last(self._call)
                if take_up_roots(self._folder, offer) is not None:
                    log.info("a new root of the authority was taken up in %s", self._folder)
                    pause_s = 0.0
            except StoreError as error:
                self._warn(f"a new root of the authority cannot be taken up: {error}")
            except FederationError as error:
                log.debug("no news of roots: %s", error)
            self._closed.wait(pause_s)
            pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)

    def _warn(self, text: str) -> None:
        if text != self._said:  # once, since it is tried again and again
            self._said = text
            log.warning("%s", text)


def _question(number: int, *, wait: bool) -> bytes:
    return json.dumps({"number": number, "wait": wait}).encode()


def _last(call: Call) -> dict[str, Any]:
    """Return the last message of an answer, which is not a sign of life."""
    answer: Any = {}
    for message in call:
        try:
            answer = parse_json(message)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ProtocolError("the server's answer to Roots is not a JSON object")
    return {} if "waiting" in answer else answer
