"""How the protocol travels in tasks and updates: messages as text, and the marks of answers and masked updates."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fl_runtime.errors import ProtocolError
from fl_runtime.types import Settings

MASKED = "SecureSum"
"""Name under which a masked update says that it is one, in the place of a filter."""

ANSWER = "secure_sum:"
"""Start of the encoding of an answer to a step; the message follows as text."""

MOST_SHARES_BYTES = 2**15
"""Longest message of shares that travels with an update, whose encoding has a limit. A longer one is asked for."""

_SIGNATURE, _SHARES = "sum_signature", "sum_shares"


def as_text(message: bytes) -> str:
    """Return a message as text (base64), for settings of tasks, encodings and the journal."""
    return base64.b64encode(message).decode()


def as_message(text: str, what: str) -> bytes:
    """Return the message in a text.

    Args:
        text: The text as it arrived.
        what: What it is, for the error.

    Returns:
        The message.

    Raises:
        ProtocolError: It is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise ProtocolError(f"{what} cannot be read: it is not base64") from None


@dataclass(frozen=True)
class MaskedMark:
    """How a masked update says what it is, and the messages that travel with it.

    Attributes:
        stage: The stage of its masks.
        signature: What `SiteSums.sign_all` returned; b"" for none.
        shares: What `SiteSums.begin_next` returned, for the next round; b"" for none.
    """

    stage: str
    signature: bytes = b""
    shares: bytes = b""

    def encoding(self, told: Iterable[Settings] = ()) -> str:
        """Return the encoding of an update with this mark, in the form of a list of filters.

        Args:
            told: What the server may know of the filters that ran before.

        Returns:
            A JSON text.
        """
        messages = {_SIGNATURE: self.signature, _SHARES: self.shares}
        texts = {name: as_text(message) for name, message in messages.items() if message}
        return json.dumps([*(dict(item) for item in told), {"name": MASKED, "stage": self.stage, **texts}])

    @classmethod
    def of(cls, filters: Sequence[Settings]) -> MaskedMark | None:
        """Read the mark of an update.

        Args:
            filters: The filters that its encoding lists.

        Returns:
            The mark; None if the update is not masked.

        Raises:
            ProtocolError: A message in it is not base64.
        """
        last = filters[-1] if filters else {}
        if last.get("name") != MASKED:
            return None
        signature, shares = (
            as_message(last.get(name, ""), f"{name} of a masked update") for name in (_SIGNATURE, _SHARES)
        )
        return cls(str(last.get("stage", "")), signature, shares)


def without_messages(filters: Sequence[Settings]) -> list[Settings]:
    """Return the filters that an encoding lists, without the messages that travel with a masked update."""
    return [{name: value for name, value in item.items() if name not in (_SIGNATURE, _SHARES)} for item in filters]
