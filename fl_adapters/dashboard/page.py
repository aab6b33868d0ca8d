"""Pages of the dashboard: the frame around every one, and regions that change while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element

from starlette.requests import Request
from starlette.responses import HTMLResponse

from fl_adapters.dashboard.section import Section
from fl_adapters.environments.report.document import Content, as_text, tag
from fl_runtime.errors import FederationError

NAVIGATION = "sections"
"""Name in the application's state under which the sections lie, for the navigation of every page."""


def page(request: Request, title: str, *content: Content | Iterable[Content], status: int = 200) -> HTMLResponse:
    """Make a page in the dashboard's frame: navigation, landmarks, and the script that keeps live regions new.

    Args:
        request: The request that it answers.
        title: Title of the page, and its heading.
        content: What is below the heading. All texts are escaped.
        status: HTTP status.

    Returns:
        The response.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} - fl-adapters"),
        tag("link", rel="stylesheet", href="/static/style.css"),
        tag("link", rel="stylesheet", href="/static/dashboard.css"),
        tag("link", rel="icon", href="data:,"),
        tag("script", src="/static/live.js", type="module"),
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag("header", _navigation(request), class_="top"),
        tag("main", tag("h1", title), *content, id="content", tabindex="-1"),
        tag("p", "", id="connection", role="status", class_="bad"),
    )
    return HTMLResponse(as_text(tag("html", head, body, lang="en")), status)


def live(name: str, *content: Content | Iterable[Content], spoken: bool = False) -> Element:
    """Make a region that the browser replaces when it has changed.

    Args:
        name: Identifier of the region on its page.
        content: What is in it.
        spoken: Whether screen readers say what is new in it. For short texts only.

    Returns:
        The element.
    """
    return tag("div", *content, id=name, data_live="", **({"role": "status"} if spoken else {}))


def link(text: str, address: str) -> Element:
    """Make a link to a page of the dashboard.

    Args:
        text: What it says.
        address: Path of the page, quoted as addresses are.

    Returns:
        The element.
    """
    return tag("a", text, href=address)


def tabs(addresses: Mapping[str, str], request: Request, here: str = "", label: str = "Parts of this page") -> Element:
    """Make the navigation between the parts of a page.

    Args:
        addresses: Path and query of each part, by its name.
        request: The request, which tells the part that is shown.
        here: Name of the part that is shown, in place of what the request tells.
        label: What the navigation is, for screen readers.

    Returns:
        The element.
    """
    now = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    here = here or next((name for name, address in addresses.items() if address == now), next(iter(addresses)))
    links = [
        tag("li", tag("a", name, href=address, **({"aria_current": "page"} if name == here else {})))
        for name, address in addresses.items()
    ]
    return tag("nav", tag("ul", links), class_="tabs", aria_label=label)


def error_page(request: Request, error: FederationError, status: int = 400) -> HTMLResponse:
    """Make the page about an error: what is wrong, where, and what to do.

    Args:
        request: The request that met it.
        error: The error.
        status: HTTP status.

    Returns:
        The response.
    """
    parts: Sequence[Element] = [
        tag("p", tag("strong", error.what, class_="bad"), role="alert"),
        *([tag("p", f"Where: {error.where}")] if error.where else []),
        *([tag("p", f"What to do: {error.fix}")] if error.fix else []),
    ]
    return page(request, "That did not work", parts, status=status)


def crumbs(*parts: Element | str) -> Element:
    """Return the line above a page that says where it is.

    Args:
        *parts: Links to the pages above, and the name of this one.
    """
    first, *others = parts
    return tag("p", first, [piece for part in others for piece in (" / ", part)], class_="crumbs")


def is_below(section: str, path: str) -> bool:
    """Return whether a page belongs to a section.

    Args:
        section: Path of the section's first page.
        path: Path of the page; it may have a query.
    """
    return f"{path.partition('?')[0]}/".startswith(f"{section}/")


def _navigation(request: Request) -> Element:
    sections: Sequence[Section] = getattr(request.app.state, NAVIGATION)
    links = []
    for section in sections:
        here = {"aria_current": "page"} if is_below(section.path, request.url.path) else {}
        links.append(tag("li", tag("a", section.title, href=section.path, **here)))
    return tag("nav", tag("b", "fl-adapters"), tag("ul", links), aria_label="Dashboard")
