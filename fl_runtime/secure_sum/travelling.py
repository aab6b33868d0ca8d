"""How the protocol travels in tasks and updates: messages as text, and the marks of answers and masked updates."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable

from fl_runtime.errors import ProtocolError
from fl_runtime.types import Settings

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


def masked_encoding(stage: str, told: Iterable[Settings] = ()) -> str:
    """Return the encoding of an update that is masked for this stage, in the form of a list of filters.

    Args:
        stage: The stage.
        told: What the server may know of the filters that ran before.

    Returns:
        A JSON text.
    """
    return json.dumps([*(dict(item) for item in told), {"name": MASKED, "stage": stage}])
