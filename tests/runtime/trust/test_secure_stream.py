"""Streams between two sites that the server can neither read nor join."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from study import Study, certificate

from fl_runtime.errors import ConnectionLostError
from fl_runtime.trust.certificates import new_key, read_key, sign
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import CERTIFICATE, KEY
from fl_runtime.trust.streams.identity import StreamIdentity
from fl_runtime.trust.streams.secure_stream import SecureStream

Between = Callable[[bytes], bytes]


class End:
    """One end of a plain stream; its messages pass through `between`, the server."""

    def __init__(self, peer: str, name: str, between: Between = lambda data: data) -> None:
        self.peer, self.name, self._between = peer, name, between
        self._changed, self._arrived = threading.Condition(), deque[bytes]()
        self.other: End | None = None

    def send(self, data: bytes) -> None:
        assert self.other is not None
        with self.other._changed:
            self.other._arrived.append(self._between(data))
            self.other._changed.notify()

    def receive(self) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: self._arrived, 30)
            return self._arrived.popleft()

    def close(self) -> None:
        pass


def ends(
    between: Between = lambda data: data, names: tuple[str, str] = ("1.1|tracker", "1.1|tracker")
) -> tuple[End, End]:
    north, south = End("south", names[0], between), End("north", names[1])
    north.other, south.other = south, north
    return north, south


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    study = Study(tmp_path)
    return study.kits


def test_both_ends_are_who_their_certificates_say(kits: Path) -> None:
    north, south = ends()
    first = SecureStream(north, "north", StreamIdentity(kits / "north"))
    second = SecureStream(south, "south", StreamIdentity(kits / "south"))
    first.meet()
    second.meet()
    first.send(b"sums of gradients")
    assert second.receive() == b"sums of gradients"


def forged(signer: Path) -> Between:
    """Act as a server that replaces north's key by its own, signed with the key and certificate in `signer`."""
    public = b"k" * 32
    statement = b"\0".join([b"fl-adapters stream key 1", b"north", b"south", b"1.1|tracker", public])
    signature = sign(read_key((signer / KEY).read_bytes()), statement)
    pem = (signer / CERTIFICATE).read_text()
    message = json.dumps({"key": public.hex(), "signature": signature.hex(), "certificate": pem}).encode()
    return lambda data: message


def test_with_norths_own_key_it_would_be_taken(kits: Path) -> None:
    """The forgeries below are valid except for their signer."""
    message = forged(kits / "north")(b"")
    assert StreamIdentity(kits / "south").checked(message, "north", "1.1|tracker") == b"k" * 32


FORGERIES = ["its own", "another site's", "a stranger's", "plain", "of another stream", "of itself"]


@pytest.mark.parametrize("case", FORGERIES)
def test_a_key_that_is_not_the_other_sites_own_ends_the_stream(kits: Path, tmp_path: Path, case: str) -> None:
    names = ("1.1|tracker", "1.1|tracker")
    between: Between
    match case:
        case "its own":
            between = forged(kits / "server")
        case "another site's":
            between = forged(kits / "south")
        case "a stranger's":
            stranger = tmp_path / "stranger"
            stranger.mkdir()
            identity = Identity("study", "site", "north", "north-hospital")
            key, pem = certificate(new_key(), (kits / "south" / "ca.pem").read_bytes(), identity)
            (stranger / KEY).write_bytes(key)
            (stranger / CERTIFICATE).write_bytes(pem)
            between = forged(stranger)
        case "plain":
            between = lambda data: b"k" * 32  # noqa: E731
        case "of another stream":
            between, names = (lambda data: data), ("1.1|ports", "1.1|tracker")
        case _:
            own_key = StreamIdentity(kits / "south").signed(b"k" * 32, "north", "1.1|tracker")
            between = lambda data: own_key  # noqa: E731
    north, south = ends(between, names)
    SecureStream(north, "north", StreamIdentity(kits / "north"))
    second = SecureStream(south, "south", StreamIdentity(kits / "south"))
    with pytest.raises(ConnectionLostError, match="is not signed by the site north"):
        second.meet()
