"""Parts of pages about a federation: where the connection stands, times, confirmations, and what forms have sent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from urllib.parse import parse_qsl
from xml.etree.ElementTree import Element

from starlette.requests import Request

from fl_adapters.dashboard.federation.connection import Seen
from fl_adapters.environments.report.document import tag
from fl_runtime.errors import ConfigError

_FORM_BYTES, _MOST_FIELDS = 2**19, 20


def standing(seen: Seen) -> list[Element]:
    """Return what a page says of a server that does not answer; nothing while it does.

    Args:
        seen: What is known of the federation.
    """
    if seen.fault is None:
        return [] if seen.federation else [tag("p", "Waiting for the server's first answer.")]
    old = f"What is shown is of {clock(seen.since)}. " if seen.since else ""
    made = [tag("p", tag("strong", seen.fault.what, class_="bad"))]
    made += [tag("p", f"What to do: {seen.fault.fix}.")] if seen.fault.fix else []
    return [*made, tag("p", f"{old}The dashboard asks again by itself.", class_="soft")]


def clock(seconds: float) -> str:
    """Return a moment in local time; "" for 0.

    Args:
        seconds: The moment, in seconds since the epoch.
    """
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""
    except (ValueError, OverflowError, OSError):
        return ""


def confirmed(label: str, warning: str, address: str, fields: Mapping[str, str], name: str = "") -> Element:
    """Make a button that opens what to know, with the button that does it.

    Args:
        label: What the buttons say.
        warning: What to know before.
        address: Path that the form is sent to.
        fields: Hidden fields of the form.
        name: What must be typed before the button does anything; "" for what can be taken back.

    Returns:
        The element.
    """
    hidden = [tag("input", type="hidden", name=key, value=value) for key, value in fields.items()]
    box = tag("input", name="confirm", required="", autocomplete="off", spellcheck="false")
    typed = [tag("label", tag("span", f"Type {name} to confirm"), box)] if name else []
    button = tag("button", f"Yes, {label.lower()}", type="submit")
    form = tag("form", hidden, tag("p", warning), typed, button, method="post", action=address, class_="act")
    return tag("details", tag("summary", label), form, class_="act")


async def form_of(request: Request) -> Mapping[str, str]:
    """Read the fields of a form that was sent by POST.

    Args:
        request: The request.

    Returns:
        The fields.

    Raises:
        ConfigError: It is too large, or no form.
    """
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > _FORM_BYTES:
            raise ConfigError(f"the form has more than {_FORM_BYTES >> 10} KiB", fix="submit a shorter job file")
    try:
        return dict(parse_qsl(data.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS))
    except ValueError:
        raise ConfigError("the form cannot be read", fix="go back, and send it again") from None
