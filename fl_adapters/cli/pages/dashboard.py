"""Command `fl-adapters dashboard`: web pages on the loopback that follow runs, or a federation."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.cli.federation.passphrase import given
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_dashboard_extra, needs_trust_extra
from fl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from fl_adapters.dashboard.federation.connection import FederationConnection
    from fl_adapters.dashboard.section import Section


def dashboard(
    runs: Path,
    kit: Path | None,
    state: Path | None,
    project: Path | None,
    passphrase: Path | None,
    port: int,
    browse: bool,
    as_json: bool,
) -> int:
    """Serve the dashboard of runs, a federation or a project until it is interrupted. Returns exit status 0."""
    with report_errors(as_json):
        with needs_dashboard_extra():
            from fl_adapters.dashboard.server import Dashboard

        board = Dashboard(_sections(runs, kit, state, project, passphrase), port)

        def started() -> None:
            console = console_for(as_json)
            console.print(f"dashboard   {board.address}", highlight=False, soft_wrap=True)
            console.print("The address has a key to the pages: it is for you alone. Ctrl-C ends the dashboard.")
            if as_json:
                show_json({"address": board.address})
            if browse:
                webbrowser.open(board.address)

        board.serve(started)
    return 0


def _sections(
    runs: Path, kit: Path | None, state: Path | None, project: Path | None, passphrase: Path | None
) -> Sequence[Section]:
    """Make the sections of a project, of a federation, or both; of the folder of runs if neither is named.

    An encrypted key of the authority is opened with the passphrase in a file or in the environment.
    """
    from fl_adapters.dashboard.runs.section import RunsSection

    if state is not None:
        _check_state(kit, state)
    found: list[Section] = []
    tell: Callable[[str, str], object] | None = None
    if kit is not None and (site := _site(kit, state)) is not None:
        found.append(site)
    elif kit is not None:
        from fl_adapters.dashboard.federation.connection import FederationConnection
        from fl_adapters.dashboard.federation.sections import sections_of

        connection = FederationConnection.of_kit(kit)
        found.extend(sections_of(connection))
        if connection.rights.may("Revoke"):
            tell = partial(_put_in_force, connection)
    if project is not None:
        with needs_trust_extra():
            from fl_adapters.dashboard.provisioning.desk import ProjectDesk
            from fl_adapters.dashboard.provisioning.section import ProjectSection

        found.insert(0, ProjectSection(ProjectDesk(project, partial(given, passphrase), tell)))
    return found or [RunsSection(runs)]


def _put_in_force(connection: FederationConnection, crl: str, members: str) -> None:
    """Send the lists of revoked certificates and of members to the server, as `fl-adapters cert revoke` does."""
    connection.ask("Revoke", crl=crl, members=members)


def _check_state(kit: Path | None, state: Path) -> None:
    if kit is None:
        raise ConfigError("--state goes with the kit of a site", where=str(state), fix="pass its folder with --kit")
    if not state.is_dir():
        raise ConfigError(
            "there is no such folder", where=str(state), fix="pass the folder that the site's daemon has as --state"
        )


def _site(kit: Path, state: Path | None) -> Section | None:
    """Make the section of a site's own kit; None for the kit of somebody else."""
    with needs_trust_extra():
        from fl_runtime.trust.kits import read_unsigned
        from fl_runtime.trust.working_kit import working_kit

        if read_unsigned(kit)[0].kind != "site":
            if state is not None:
                raise ConfigError(
                    "--state is for the kit of a site, whose daemon keeps its jobs there",
                    where=str(kit),
                    fix="pass the kit of a site, or leave --state out",
                )
            return None
        from fl_adapters.cli.pages.site_section import SiteSection

        used = working_kit(kit, state)
    return SiteSection(used, state or used)
