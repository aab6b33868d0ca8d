"""How the protocol travels in tasks and updates: messages as text, and the marks of answers and masked updates."""

from __future__ import annotations

import base64
import binascii
import json

from fl_runtime.errors import ProtocolError

MASKED = "SecureSum"
"""Name under which a masked update says that it is one, in the place of a filter."""

ANSWER = "secure_sum:"
"""Start of the encoding of an answer to a step; the message follows as text."""


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


def masked_encoding(stage: str) -> str:
    """Return the encoding of an update that is masked for this stage, in the form of a list of filters."""
    return json.dumps([{"name": MASKED, "stage": stage}])
