"""What can be done about a project's participants, as the commands `provision` and `cert` do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fl_runtime.errors import ConfigError
from fl_runtime.trust.authority import Authority, signed_members
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.project import Project, findings
from fl_runtime.trust.provisioning.archive import new_password
from fl_runtime.trust.provisioning.lock import changing
from fl_runtime.trust.provisioning.making import (
    AUTHORITY,
    MadeKit,
    archive_of,
    hand_out_members,
    kit_of,
    make_kit,
    opened_with,
)
from fl_runtime.trust.provisioning.standings import Standing, newest, standings

_WATCHED = ("project.yml", "issued", "revoked.json", "crl.pem", "members.json")


@dataclass(frozen=True)
class Participant:
    """A participant of the project, as the authority's folder shows it.

    Attributes:
        identity: Who it is.
        standing: That of its newest certificate that counts, else of its newest; None if it never had one.
        kit: Where its kit lies; None if it lies in none of the places.
    """

    identity: Identity
    standing: Standing | None
    kit: Path | None


class ProjectDesk:
    """Changes one project, always with the lock of the authority's folder. Threads may share it.

    Args:
        folder: Folder of the kits, as `provision --out` makes it. It may be missing.
        passphrase: Returns the passphrase of the authority's key; b"" without one.
        tell: Sends the list of revoked certificates and that of members, both as text, to the running server. None if
            the server is not told.
    """

    def __init__(
        self, folder: Path, passphrase: Callable[[], bytes], tell: Callable[[str, str], object] | None = None
    ) -> None:
        self.folder, self.authority_folder, self._passphrase = folder, folder / AUTHORITY, passphrase
        self._tell = tell

    @property
    def has_project(self) -> bool:
        """Whether the folder holds a project."""
        return (self.authority_folder / "ca.key").exists()

    def version(self) -> str:
        """Return a text that changes with the project and its certificates."""
        paths = [self.folder, *(self.authority_folder / name for name in _WATCHED)]
        return " ".join(str(path.stat().st_mtime_ns) if path.exists() else "-" for path in paths)

    def read(self) -> tuple[Project, str, list[Participant]]:
        """Return the project, the authority's fingerprint, and the participants: those whose certificate ends first.

        Raises:
            ConfigError: The folder holds no authority, or it cannot be read.
        """
        authority = Authority(self.authority_folder)
        best: dict[str, Standing] = {}
        for each in reversed(standings(authority)):  # the last ones count, the newest first
            name = each.certificate.identity.name
            if name not in best or (each.counts and not best[name].counts):
                best[name] = each
        found = [
            Participant(identity, best.get(identity.name), kit_of(self.folder, identity.name))
            for identity in authority.project.participants()
        ]
        return authority.project, authority.fingerprint, sorted(found, key=_ends)

    def create(self, federation: str, address: str, site: str, organisation: str) -> None:
        """Make a project with its authority.

        Args:
            federation: Name of the federation.
            address: "host:port" at which its server is reached.
            site: Name of its first site.
            organisation: Organisation of that site.

        Raises:
            ConfigError: There is a project already, or a name or the address cannot be used.
        """
        sites = [{"name": site, "organisation": organisation}]
        project = _checked({"federation": federation, "server": {"address": address}, "sites": sites})
        with changing(self.authority_folder, create=True):
            if self.has_project:
                raise ConfigError("there is a project in this folder already", where=str(self.folder))
            opened_with(self.folder, project, self._passphrase, self._passphrase)

    def add(self, name: str, organisation: str, role: str) -> None:
        """Add a participant.

        Args:
            name: Its name.
            organisation: Its organisation.
            role: Role of an admin; "" for a site.

        Raises:
            ConfigError: The name is taken, or a field cannot be used.
        """
        entry = {"name": name, "organisation": organisation, **({"role": role} if role else {})}
        with self._changed() as authority:
            fields = authority.project.model_dump(mode="json")
            fields["admins" if role else "sites"].append(entry)
            opened = opened_with(self.folder, _checked(fields), self._passphrase, self._passphrase)
            hand_out_members(self.folder, opened)

    def hand_out(self, name: str, *, again: bool = False) -> MadeKit:
        """Make a participant's kit, as a zip file with a new password.

        Args:
            name: The participant.
            again: Whether it has had one: that one's certificates are revoked, and its zip file is deleted.

        Returns:
            The kit. Nobody can learn its password later.

        Raises:
            ConfigError: The participant has a kit or a certificate, and it was not said that it gets another.
        """
        with self._changed() as authority:
            identity, counting = authority.project.participant(name), list(authority.counting(name))
            if counting and not again:
                raise ConfigError(f"{name} has had a kit", where=str(self.folder), fix="make another one for it")
            if again:
                if counting:
                    authority.revoke_certificates(counting)
                archive_of(self.folder, name).unlink(missing_ok=True)
            made = make_kit(self.folder, authority, identity, password=new_password())
            hand_out_members(self.folder, authority)
            return made

    def renew(self, name: str) -> None:
        """Make a new certificate for a participant's key.

        Args:
            name: The participant.

        Raises:
            ConfigError: It has no certificate that can be renewed.
        """
        with self._changed() as authority:
            authority.renew(name)

    def revoke(self, name: str) -> int:
        """Revoke all certificates of a participant. Returns how many were not revoked before.

        Args:
            name: The participant.

        Raises:
            ConfigError: It never had one.
        """
        with self._changed() as authority:
            revoked, _ = authority.revoke(name)
            hand_out_members(self.folder, authority)
            return len(revoked)

    @property
    def tells_server(self) -> bool:
        """Whether `tell_server` can be called."""
        return self._tell is not None

    def tell_server(self) -> None:
        """Send the newest lists of revoked certificates and of members to the running server, which puts them in force.

        Raises:
            FederationError: The server is out of reach, or refuses the lists.
        """
        assert self._tell is not None
        with self._changed() as authority:
            crl, members = authority.crl.decode(), signed_members(authority).decode()
        self._tell(crl, members)

    def archive(self, name: str) -> Path:
        """Return the zip file of a participant's kit. Raises ConfigError if there is none."""
        Authority(self.authority_folder).project.participant(name)
        if not (path := archive_of(self.folder, name)).is_file():
            raise ConfigError(f"there is no zip file of the kit of {name}", where=str(self.folder))
        return path

    def certificate(self, name: str) -> bytes:
        """Return a participant's newest certificate as PEM. Raises ConfigError if there is none."""
        found = newest(Authority(self.authority_folder)).get(name)
        if found is None:
            raise ConfigError(f"no certificate of {name} counts", fix="hand out a kit")
        return found.pem

    @contextmanager
    def _changed(self) -> Iterator[Authority]:
        with changing(self.authority_folder):
            yield Authority(self.authority_folder, self._passphrase)


def _checked(fields: Mapping[str, Any]) -> Project:
    try:
        return Project.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(findings(error), fix="correct the field and send it again") from None


def _ends(item: Participant) -> tuple[bool, float]:
    """Order of participants: by the end of what counts, then those without a certificate that counts."""
    counts = item.standing is not None and item.standing.counts
    return not counts, item.standing.certificate.not_after.timestamp() if item.standing else 0.0
