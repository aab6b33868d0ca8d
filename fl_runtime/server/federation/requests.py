"""Reads the JSON requests of calls about jobs. They come from participants, so everything in them is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fl_runtime.errors import ProtocolError
from fl_runtime.text import parse_json

BEAT_S = 10.0
"""Seconds between signs of life in a call that waits."""
REQUEST_BYTES = 2**18
"""Largest request of most calls."""


def read_object(request: bytes, limit_bytes: int = REQUEST_BYTES) -> Mapping[str, Any]:
    """Read a request.

    Args:
        request: The message.
        limit_bytes: Largest size of the message.

    Returns:
        Its fields.

    Raises:
        ProtocolError: It is too large, or not a JSON object.
    """
    try:
        if len(request) > limit_bytes:
            raise ValueError
        fields = parse_json(request or b"{}")
        if isinstance(fields, dict):
            return fields
    except (ValueError, RecursionError):
        pass
    raise ProtocolError(f"a request is not a JSON object of at most {limit_bytes} bytes")


def field(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a field of a request. Raises ProtocolError unless it is there and of this type."""
    value = fields.get(name)
    if not isinstance(value, kind):
        raise ProtocolError(f"the request has no {name!r} of type {kind.__name__}")
    return value


def names(fields: Mapping[str, Any], name: str) -> frozenset[str]:
    """Return the texts in a list of a request; none if there is no such list."""
    values = fields.get(name, [])
    return frozenset(item for item in values if isinstance(item, str)) if isinstance(values, list) else frozenset()
