"""Forms of the dashboard: buttons that change something, and what a form has sent."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl
from xml.etree.ElementTree import Element

from starlette.requests import Request

from fl_adapters.environments.report.document import tag
from fl_runtime.errors import ConfigError

_FORM_BYTES, _MOST_FIELDS = 2**19, 20


def act(
    label: str, address: str, fields: Mapping[str, str] | None = None, *, warning: str = "", confirm: str = ""
) -> Element:
    """Make a button that changes something: a form of one button, which is sent by POST.

    With a warning, or a text to type, the button opens these, with a second button that does it.

    Args:
        label: What the button says.
        address: Path that the form is sent to.
        fields: Hidden fields of the form.
        warning: What to know before.
        confirm: What must be typed, as for an act that cannot be taken back. It is the form's field `confirm`.

    Returns:
        The element.
    """
    hidden = [tag("input", type="hidden", name=name, value=value) for name, value in (fields or {}).items()]
    if not warning and not confirm:
        return tag("form", hidden, tag("button", label, type="submit"), method="post", action=address, class_="act")
    box = tag("input", name="confirm", required="", autocomplete="off", spellcheck="false")
    typed = tag("label", tag("span", f"Type {confirm} to confirm"), box) if confirm else None
    button = tag("button", f"Yes, {label[:1].lower()}{label[1:]}", type="submit")
    told = tag("p", warning) if warning else None
    form = tag("form", hidden, told, typed, button, method="post", action=address, class_="act")
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
