"""What the software of a server or site can do, as each tells the other, and whether two of them work together.

A connection uses the highest protocol number that both sides speak, and the features that both name. docs/operations.md
has the rule for versions, under "Upgrade".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fl_runtime.errors import ProtocolError
from fl_runtime.text import printable
from fl_runtime.types import RunSettings
from fl_runtime.version import FIRST_VERSIONS, PROTOCOL_MAX, PROTOCOL_MIN, VERSION

_MOST_NAMES, _NAME_CHARS = 200, 100


@dataclass(frozen=True)
class Feature:
    """An optional part of the protocol.

    Attributes:
        name: Its name in messages.
        meaning: What a side that names it does.
        without: What happens if the other side does not name it.
    """

    name: str
    meaning: str
    without: str


BEATS, PARTS, TRAININGS = "beats", "parts", "trainings"
COHORT, FILES, STAYS, STEPS = "cohort", "files", "stays", "steps"

FEATURES: tuple[Feature, ...] = (
    Feature(
        BEATS,
        "the server gives signs of life in calls that wait, as often as the site asks",
        "a silent connection is noticed by TCP alone, which may take minutes",
    ),
    Feature(
        PARTS,
        "a registration may come in several messages, and the server asks for entries of lists of names",
        "a model whose description is too long for one message is refused, and lists of names are not compared",
    ),
    Feature(
        TRAININGS,
        "the script of a site may train more than once in a job",
        "a second training of a script is refused",
    ),
    Feature(
        COHORT,
        "the server keeps to `min_cohort` and `max_share` of the sites' policies",
        "a site with such a rule refuses the job, unless the job's `min_sites` satisfies it",
    ),
    Feature(
        FILES,
        "the server takes the small files that a model needs beside its weights",
        "they stay at the sites, and `job download` brings the weights alone",
    ),
    Feature(
        STAYS,
        "the server keeps from other sites what a policy says is its site's alone",
        "a site whose policy says `site_metrics: false` refuses the job; all else the site itself does not send",
    ),
    Feature(
        STEPS,
        "the server takes how far a site's local training is within a round, and shows it to those who follow the run",
        "progress is shown by whole rounds and updates",
    ),
)
"""All optional parts of the protocol that this version supports. A name is never used again for something else."""

FEATURE_NAMES = tuple(feature.name for feature in FEATURES)

_SETTINGS = frozenset(field.name for field in fields(RunSettings))


@dataclass(frozen=True)
class Software:
    """What a server, a site or an admin says of its version of fl-adapters.

    Attributes:
        version: Version of fl-adapters; "" if it does not say.
        lowest: Lowest protocol number that it speaks.
        highest: Highest protocol number that it speaks.
        features: Names of the optional parts of the protocol that it supports.
        settings: Names of the settings of a job that it knows; empty if it does not say.
    """

    version: str = VERSION
    lowest: int = PROTOCOL_MIN
    highest: int = PROTOCOL_MAX
    features: frozenset[str] = frozenset(FEATURE_NAMES)
    settings: frozenset[str] = _SETTINGS

    def to_json(self) -> dict[str, Any]:
        """Return its JSON values, for calls about jobs."""
        return {
            "version": self.version,
            "protocols": [self.lowest, self.highest],
            "features": sorted(self.features),
            "settings": sorted(self.settings),
        }

    @classmethod
    def of_json(cls, fields: object) -> Software | None:
        """Read what another participant sent. Returns None if it sent nothing of the kind, as earlier versions do."""
        if not isinstance(fields, Mapping):
            return None
        protocols, version = fields.get("protocols"), fields.get("version")
        if (
            not isinstance(version, str)
            or not isinstance(protocols, list)
            or len(protocols) != 2
            or not all(type(number) is int and 0 <= number < 2**31 for number in protocols)
        ):
            return None
        lowest, highest = protocols
        features, settings = _names(fields.get("features")), _names(fields.get("settings"))
        return cls(printable(version, _NAME_CHARS), lowest, highest, features, settings)

    @property
    def protocols(self) -> str:
        """The protocol numbers that it speaks, for people to read."""
        return f"{self.lowest}" if self.lowest == self.highest else f"{self.lowest} to {self.highest}"


OWN = Software()
"""What this version says of itself."""


def common_protocol(server: Software, site: Software) -> int | None:
    """Return the highest protocol number that a server and a site both speak, or None if there is none.

    Args:
        server: Software of the server.
        site: Software of the site.
    """
    number = min(server.highest, site.highest)
    return number if number >= max(server.lowest, site.lowest) else None


def choose_protocol(server: Software, site: Software) -> int:
    """Choose the protocol for the connection of a site.

    Args:
        server: Software of the server.
        site: Software of the site.

    Returns:
        The highest protocol number that both speak.

    Raises:
        ProtocolError: There is none. The message names the side to upgrade, and to which version.
    """
    number = common_protocol(server, site)
    if number is not None:
        return number
    raise ProtocolError(
        f"the site speaks protocol {site.protocols}, this server {server.protocols}",
        where=f"the site ({_shown(site)}) and the server ({_shown(server)})",
        fix=f"upgrade {_upgrade(server, site)}",
    )


def misfit(server: Software, site: Software) -> str:
    """Return what is wrong with the versions of a server and a site, and what to do, as one clause; "" for nothing.

    Args:
        server: Software of the server.
        site: Software of the site.
    """
    if common_protocol(server, site) is None:
        return (
            f"speaks protocol {site.protocols}, the server {server.protocols}: no job can run. "
            f"Upgrade {_upgrade(server, site)}"
        )
    ours, theirs = _minor(server.version), _minor(site.version)
    if ours is None or theirs is None or (ours[0] == theirs[0] and abs(ours[1] - theirs[1]) <= 1):
        return ""
    older = "site" if theirs < ours else "server"
    newest = max((ours, server.version), (theirs, site.version))[1]
    return (
        f"is more than one minor version away from the server, which has {server.version}. Nobody tests that. "
        f"Upgrade the {older} to fl-adapters {newest}, one minor version after the other"
    )


def _upgrade(server: Software, site: Software) -> str:
    """Which side to upgrade, and to which version."""
    older, newer = ("site", server) if site.highest < server.lowest else ("server", site)
    least = FIRST_VERSIONS.get(newer.lowest)
    target = f"{least} or later" if least else newer.version or "the other side's version"
    return f"the {older} ({_shown(site if older == 'site' else server)}) to fl-adapters {target}"


def _shown(software: Software) -> str:
    return f"fl-adapters {software.version or 'of unknown version'}"


def _minor(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version, or None if it is none."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?:\D|$)", version)
    return (int(found[1]), int(found[2])) if found else None


def _names(values: object) -> frozenset[str]:
    if not isinstance(values, list):
        return frozenset()
    return frozenset(item for item in values[:_MOST_NAMES] if isinstance(item, str) and len(item) <= _NAME_CHARS)
