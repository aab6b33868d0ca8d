"""The sections "Sites" and "Audit", and all sections of a federation as the admin of a kit sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fl_adapters.dashboard.audit_lines import asked_before, audit_table
from fl_adapters.dashboard.federation.connection import FederationConnection
from fl_adapters.dashboard.federation.desk import Desk
from fl_adapters.dashboard.federation.jobs_section import JobsSection
from fl_adapters.dashboard.federation.parts import standing
from fl_adapters.dashboard.federation.view import Site
from fl_adapters.dashboard.page import live, page
from fl_adapters.dashboard.section import Section
from fl_adapters.environments.report.document import Content, table, tag

_SITES_LISTED = 1000


def federation_sections(kit: Path) -> Sequence[Section]:
    """Connect to a federation, and return the sections about it that the admin of a kit may see.

    Args:
        kit: Folder of the admin's startup kit.

    Returns:
        The sections. Closing the first one closes the connection.

    Raises:
        ConfigError: The folder is not the kit of an admin.
    """
    return sections_of(FederationConnection.of_kit(kit))


def sections_of(connection: FederationConnection) -> Sequence[Section]:
    """Return the sections about a federation that its admin may see.

    Args:
        connection: The connection, which is closed with the first section.
    """
    desk = Desk(connection)
    audit = [AuditSection(desk)] if connection.rights.may("ReadAudit") else []
    return [JobsSection(desk), SitesSection(desk), *audit]


class SitesSection:
    """The page about the sites of a federation. A `Section`.

    Args:
        desk: What the pages about a federation share.
    """

    title = "Sites"
    path = "/sites"

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> Sequence[Route]:
        """Return the route of the page."""
        return [Route(self.path, self._list)]

    def version(self, path: str) -> str:
        """Return what changes with what the server tells."""
        return str(self._desk.connection.seen.number)

    def close(self) -> None:
        """Do nothing: the section of the jobs closes the connection."""

    def _list(self, request: Request) -> Response:
        seen = self._desk.connection.seen
        sites = seen.federation.sites if seen.federation else ()
        connected = sum(site.connected for site in sites)
        rows = [_site_row(site) for site in sites[:_SITES_LISTED]]
        version = f"; the server has fl-adapters {seen.federation.version}" if seen.federation else ""
        return page(
            request,
            "Sites",
            live("standing", standing(seen), spoken=True),
            live("count", tag("p", f"{connected} of {len(sites)} sites are connected{version}.")),
            live("sites", table(["site", "state", "fl-adapters", "room"], rows, numbers_from=9)),
        )


class AuditSection:
    """The page about the server's audit log. A `Section`.

    Args:
        desk: What the pages about a federation share.
    """

    title = "Audit"
    path = "/audit"

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> Sequence[Route]:
        """Return the route of the page."""
        return [Route(self.path, self._list)]

    def version(self, path: str) -> str:
        """Return what changes with the audit log; nothing does on a page of older lines."""
        return "" if "before=" in path else self._desk.audit.version()

    def close(self) -> None:
        """Do nothing: the section of the jobs closes the connection."""

    def _list(self, request: Request) -> Response:
        before, fault = asked_before(request), None
        if before is not None:
            lines = self._desk.audit.before(before)
        else:
            lines, fault = self._desk.audit.newest()
        check = "What the server tells. `fl-adapters audit verify` on its machine checks that no line is missing."
        return page(
            request,
            "Audit log of the server",
            live("standing", tag("p", fault.what, class_="bad") if fault else None, spoken=True),
            tag("p", check, class_="soft"),
            live("lines", audit_table(lines, self.path)),
        )


def _site_row(site: Site) -> list[Content]:
    state = tag("span", site.state, class_="long good" if site.connected else "long")
    version = f"{site.version}: {site.misfit}" if site.misfit else site.version
    return [site.name, state, tag("span", version, class_="long bad") if site.misfit else version, site.room]
