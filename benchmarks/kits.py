"""Makes startup kits for benchmarks over mutual TLS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fl_runtime.trust.authority import Authority
from fl_runtime.trust.kits import write_kit
from fl_runtime.trust.project import AdminEntry, Project, ServerEntry, SiteEntry


def make_kits(folder: Path, sites: Sequence[str], members: Sequence[str] = ()) -> None:
    """Make an authority in `folder`/authority, and kits in `folder`/server and `folder`/<site>.

    Each of `members` gets the kit of an admin who may only look.
    """
    project = Project(
        federation="benchmark",
        server=ServerEntry(address="127.0.0.1:8443"),
        sites=tuple(SiteEntry(name=name, organisation="benchmark") for name in sites),
        admins=tuple(AdminEntry(name=name, organisation="benchmark", role="member") for name in members),
    )
    authority = Authority.create(folder / "authority", project)
    for identity in project.participants():
        write_kit(folder / identity.name, authority, identity)
