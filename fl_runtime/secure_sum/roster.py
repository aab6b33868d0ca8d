"""The participants of one stage with their keys: who is whose neighbour, and what the survivors' agreement covers."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from fl_runtime.errors import ConfigError, ProtocolError
from fl_runtime.secure_sum.context import Context, label
from fl_runtime.secure_sum.graph import Graph, degree
from fl_runtime.secure_sum.messages import KeysMessage
from fl_runtime.secure_sum.primitives import is_signed

_MAX_NAME_CHARS = 200
_MAX_ROUND = 2**53


class Roster:
    """The participants of one stage of one round.

    Args:
        context: The run.
        round: Number of the round.
        stage: Name of the stage.
        keys: Participant -> its keys.

    Attributes:
        names: The participants in order.
        digest: SHA-256 of the stage, the participants and their keys.
        is_complete: Whether every participant is a neighbour of every other one.

    Raises:
        ConfigError: If the round or the stage cannot be named.
        ProtocolError: If two participants have the same key.
    """

    def __init__(self, context: Context, round: int, stage: str, keys: Mapping[str, KeysMessage]) -> None:
        if isinstance(round, bool) or not 0 <= round < _MAX_ROUND or not 0 < len(stage) <= _MAX_NAME_CHARS:
            raise ConfigError(f"a secure sum cannot have the round {round!r} and the stage {stage[:50]!r}")
        self.context, self.round, self.stage = context, round, stage
        self.names = tuple(sorted(keys))
        for part in ("exchange", "signing"):
            if len({getattr(each, part) for each in keys.values()}) < len(keys):
                raise ProtocolError("two sites of a secure sum have the same key", fix="ask who runs the server")
        self._keys = dict(keys)
        listed = [[name, keys[name].exchange.hex(), keys[name].signing.hex()] for name in self.names]
        self.digest = hashlib.sha256(self.label("roster", listed)).digest()
        self._graph = Graph(self.names, self.digest)
        self.is_complete = degree(len(self.names)) == len(self.names) - 1
        self._numbers = {name: number for number, name in enumerate(self.names, 1)}

    def label(self, purpose: str, *parts: object) -> bytes:
        """Return bytes that name one use of a key in this stage."""
        return label(purpose, self.context, self.round, self.stage, *parts)

    def bound(self, purpose: str, *parts: object) -> bytes:
        """Return bytes that name one use of a key in this stage among these participants."""
        return self.label(purpose, self.digest.hex(), *parts)

    def neighbours(self, site: str) -> tuple[str, ...]:
        """Return those with which a participant shares pair masks, in order."""
        return self._graph.neighbours(site)

    def holders(self, site: str) -> tuple[str, ...]:
        """Return those that hold shares of a participant's secrets: its neighbours and itself, in order."""
        return tuple(sorted((*self.neighbours(site), site)))

    def count_left(self, survivors: Collection[str]) -> dict[str, int]:
        """Return how many holders of each survivor survive."""
        return self._graph.count_left(survivors)

    def number(self, site: str) -> int:
        """Return the point at which a participant holds its shares: its place among all, from 1."""
        return self._numbers[site]

    def keys(self, site: str) -> KeysMessage:
        """Return the keys of a participant."""
        return self._keys[site]

    def agreement(self, cohort: Collection[str], survivors: Collection[str]) -> bytes:
        """Return the digest that sites sign before they reveal shares.

        Args:
            cohort: Those whose shares were delivered.
            survivors: Those of them whose vectors are in.

        Returns:
            SHA-256 of the stage, the participants with their keys, the survivors and the dropped sites.
        """
        dropped = sorted(set(cohort) - set(survivors))
        return hashlib.sha256(self.bound("agreement", sorted(survivors), dropped)).digest()

    def has_agreed(self, site: str, agreement: bytes, signature: bytes) -> bool:
        """Whether a participant has signed an agreement."""
        return is_signed(self._keys[site].signing, statement(agreement), signature)


def statement(agreement: bytes) -> bytes:
    """Return what a site signs with its Ed25519 key to agree to survivors."""
    return b"fl-adapters secure sum agreement 1\0" + agreement


def keys_statement(context: Context, keys: KeysMessage) -> bytes:
    """Return what a site signs with its certificate: its keys, and in which run they are its keys."""
    return label("keys", context, keys.site, keys.attempt, keys.exchange.hex(), keys.signing.hex())
