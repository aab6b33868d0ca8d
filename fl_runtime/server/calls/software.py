"""The versions of the sites' software: what each has told, and whether it understands the settings of a job."""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, fields, replace
from typing import Any

from fl_runtime.errors import ProtocolError
from fl_runtime.text import printable
from fl_runtime.types import SERVER_SETTINGS, RunSettings
from fl_runtime.version import VERSION
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.software import FEATURE_NAMES, OWN, Software, choose_protocol, misfit

_VERSION_CHARS = 100


def told_in(request: pb.JoinRequest) -> Software:
    """Return what a site says of its software when it joins."""
    return Software(
        printable(request.version, _VERSION_CHARS),
        request.protocol_min,
        request.protocol_max,
        frozenset(request.features) & frozenset(FEATURE_NAMES),
        frozenset(request.settings),
    )


def settings_for(settings: RunSettings, name: str, site: Software) -> dict[str, Any]:
    """Return the settings of a job that go to a site: those that its version knows, if it has told.

    A setting that the job leaves at its default changes nothing where it is unknown.

    Args:
        settings: The job's settings.
        name: Name of the site.
        site: Software of the site.

    Returns:
        The settings as JSON values.

    Raises:
        ProtocolError: The job uses a setting that the site must follow and does not know.
    """
    values = asdict(settings)
    if not site.settings:
        return values
    unknown = [field for field in fields(RunSettings) if field.name not in site.settings]
    used = [f.name for f in unknown if f.name not in SERVER_SETTINGS and getattr(settings, f.name) != _default(f)]
    if used:
        raise ProtocolError(
            f"the job uses {', '.join(used)}, which fl-adapters {site.version or 'of an unknown version'} does not "
            "know. The site would train without it",
            where=name,
            fix=f"upgrade {name} to fl-adapters {VERSION}, or leave {', '.join(used)} out of the job",
        )
    return {key: value for key, value in values.items() if key in site.settings}


class SiteVersions:
    """What sites have told of their software with their last call. Threads may share it."""

    def __init__(self) -> None:
        self._told: dict[str, Software] = {}

    def note(self, site: str, told: Software | None) -> Software | None:
        """Note what a site tells.

        Args:
            site: Name of the site.
            told: Its software; None if it says nothing, so that what it said before counts.

        Returns:
            Its software if that has changed, so that it is worth a line; else None.
        """
        if told is None or self._told.get(site) == told:
            return None
        self._told[site] = told
        return told

    def version_of(self, site: str) -> str:
        """Return the version that a site has told last; "" if it has told none."""
        told = self._told.get(site)
        return told.version if told is not None else ""

    def misfits(self) -> dict[str, str]:
        """Return the sites whose versions do not go with this server's, each with what is wrong, as a clause."""
        return {site: text for site, told in self._told.items() if (text := misfit(OWN, told))}

    def checked(self, site: str) -> Software:
        """Return the software of a site that asks for a job.

        Args:
            site: Name of the site.

        Returns:
            What it has told. A site that has told nothing is checked when it joins; it has the server's software here,
            without settings.

        Raises:
            ProtocolError: Its version and the server's have no protocol in common.
        """
        told = self._told.get(site)
        if told is None:
            return replace(OWN, settings=frozenset())
        choose_protocol(OWN, told)
        return told


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
