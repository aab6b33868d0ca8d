"""The project file: a YAML file that says who takes part in a federation.

Example:
    federation: tumour-study
    server: {address: "fl.example.org:8443"}
    sites:
      - {name: north, organisation: north-hospital}
      - {name: south, organisation: south-hospital}
    admins:
      - {name: ada, organisation: north-hospital, role: project-admin}
    days: 90
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_runtime.errors import ConfigError
from fl_runtime.trust.files import read_file
from fl_runtime.trust.identity import Identity, Role, check_name
from fl_runtime.trust.roots.outside import check_bundle, checked_name
from fl_runtime.types import PRODUCTION_PATIENCE_S
from fl_runtime.yaml_files import read_yaml

DEFAULT_DAYS = 90.0
DEFAULT_CRL_DAYS = 365.0
DEFAULT_PORT = 8443


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerEntry(_Part):
    """The server in a project file.

    Attributes:
        name: Its name, which is also that of its kit. Further servers have the names "server-2", "server-3" and so on.
        address: "host:port" at which sites and admins reach it; a list of several if servers stand in for each other.
        listen: "host:port" that it binds; empty for all interfaces and the port of its address.
        organisation: Who runs it; empty for the federation's name.
    """

    name: str = "server"
    address: str | tuple[str, ...] = Field(min_length=1)
    listen: str = ""
    organisation: str = ""

    @property
    def addresses(self) -> tuple[str, ...]:
        """All addresses, that of the first server first."""
        return (self.address,) if isinstance(self.address, str) else self.address

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the servers, in the order of their addresses."""
        return (self.name, *(f"{self.name}-{number}" for number in range(2, len(self.addresses) + 1)))

    def address_of(self, name: str) -> str:
        """Return the address of the server of this name."""
        return self.addresses[self.names.index(name)]


class SiteEntry(_Part):
    """A site in a project file.

    Attributes:
        name: Its name, unique in the federation. "authority", "global", "local" and names with "@" are reserved.
        organisation: The organisation that runs it.
    """

    name: str
    organisation: str


class AdminEntry(_Part):
    """An admin in a project file.

    Attributes:
        name: Name of the person, unique in the federation.
        organisation: The organisation of the person.
        role: What the person may do, see docs/permissions.md.
    """

    name: str
    organisation: str
    role: Role


class OutsideEntry(_Part):
    """An authority outside of the federation, whose certificates some participants have.

    Attributes:
        certificate: Its root's certificate, and after it any intermediate ones: PEM, or a file beside the project file.
        names: Participant -> the name in its certificates: "dns:NAME", "email:ADDRESS", "uri:URI" or "subject:SUBJECT".

    Raises:
        ConfigError: If a name is not one, or stands for two participants.
    """

    certificate: str
    names: dict[str, str]

    @model_validator(mode="after")
    def _checked(self) -> OutsideEntry:
        names = [checked_name(name) for name in self.names.values()]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"the name {name!r} stands for two participants", fix="map each name once")
        if "BEGIN CERTIFICATE" in self.certificate:
            check_bundle(self.certificate.encode(), "outside_authorities")
        return self


class Project(_Part):
    """The contents of a project file.

    Attributes:
        federation: Name of the federation.
        server: The server.
        sites: The sites, at least one.
        admins: The admins.
        patience_s: Seconds for which sites go on without the server, and jobs without a quorum; greater than 0.
        days: Lifetime of participants' certificates in days, greater than 0 and at most 825.
        authority_days: Lifetime of the authority's certificate in days, greater than 0 and at most 3653.
        crl_days: How long a revocation list counts after it was signed, in days, greater than 0 and at most 3653. The
            federation stops taking jobs when the last one has ended.
        outside_authorities: Authorities whose certificates count for the sites and admins that they are mapped to.

    Raises:
        ConfigError: If a name or address is not usable, or a name is used twice.
    """

    federation: str
    server: ServerEntry
    sites: tuple[SiteEntry, ...] = Field(min_length=1)
    admins: tuple[AdminEntry, ...] = ()
    patience_s: float = Field(default=PRODUCTION_PATIENCE_S, gt=0, le=1e9, allow_inf_nan=False)
    days: float = Field(default=DEFAULT_DAYS, gt=0, le=825)
    authority_days: float = Field(default=1826.0, gt=0, le=3653)
    crl_days: float = Field(default=DEFAULT_CRL_DAYS, gt=0, le=3653)
    outside_authorities: tuple[OutsideEntry, ...] = ()

    @model_validator(mode="after")
    def _checked(self) -> Project:
        check_name(self.federation, "federation")
        for address in self.server.addresses:
            split_address(address)
        if len(set(self.server.addresses)) < len(self.server.addresses):
            raise ConfigError("an address is listed twice", where="server.address", fix="list each server once")
        if self.server.listen:
            split_address(self.server.listen)
        names = [identity.name for identity in self.participants()]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates or "authority" in names:
            raise ConfigError(
                f"the name {(duplicates or ['authority'])[0]!r} is taken",
                fix="give every participant a name of its own",
            )
        for site in self.sites:
            if "@" in site.name or site.name in ("global", "local"):
                raise ConfigError(f"a site cannot be called {site.name!r}", fix="choose another name")
        for name in self.outside_holders():
            if name not in names:
                raise ConfigError(
                    f"outside_authorities: {name!r} is no participant", fix="add it to sites or admins, or take it out"
                )
            if name in self.server.names:
                raise ConfigError(
                    "outside_authorities: the server's certificate is always by the federation's own authority",
                    fix=f"take {name} out; otherwise whoever runs that authority could pose as the server",
                )
        return self

    def outside_holders(self) -> frozenset[str]:
        """Names of the participants that may have a certificate of an outside authority."""
        return frozenset(name for entry in self.outside_authorities for name in entry.names)

    def participants(self) -> Iterator[Identity]:
        """Yield the identity of every participant: the servers, the sites, the admins."""
        for name in self.server.names:
            yield Identity(self.federation, "server", name, self.server.organisation or self.federation)
        for site in self.sites:
            yield Identity(self.federation, "site", site.name, site.organisation)
        for admin in self.admins:
            yield Identity(self.federation, "admin", admin.name, admin.organisation, admin.role)

    def participant(self, name: str) -> Identity:
        """Return the identity of a participant.

        Args:
            name: Name of the participant.

        Returns:
            Its identity.

        Raises:
            ConfigError: If the project has no participant of this name.
        """
        for identity in self.participants():
            if identity.name == name:
                return identity
        raise ConfigError(
            f"{name!r} is not in the project {self.federation}",
            fix="add it to the project file and run `fl-adapters provision` again",
        )


def read_project(path: Path) -> Project:
    """Read a project file.

    Args:
        path: The YAML file.

    Returns:
        The project.

    Raises:
        ConfigError: If the file cannot be read or is not a valid project; the message names the fields.
    """
    try:
        project = Project.model_validate(read_yaml(path, "the project"))
        entries = [_with_certificate(entry, path.parent) for entry in project.outside_authorities]
        return project.model_copy(update={"outside_authorities": tuple(entries)})
    except ValidationError as error:
        raise ConfigError(findings(error), where=str(path), fix="see docs/production.md for an example") from None
    except ConfigError as error:
        raise ConfigError(error.what, where=error.where or str(path), fix=error.fix) from None


def _with_certificate(entry: OutsideEntry, folder: Path) -> OutsideEntry:
    """Read the certificates of an outside authority, if the project file names their file."""
    if "BEGIN CERTIFICATE" in entry.certificate:
        return entry
    path = folder / entry.certificate
    pem = read_file(path, "certificate of an outside authority")
    check_bundle(pem, str(path))
    return entry.model_copy(update={"certificate": pem.decode(errors="replace")})


_PLAIN_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a field here",
    "model_type": "should be fields, each with its value",
    "tuple_type": "should be a list",
    "string_type": "should be text",
    "too_short": "is empty",
}


def findings(error: ValidationError) -> str:
    """Describe the errors that pydantic found in a file.

    Args:
        error: The error of pydantic.

    Returns:
        One clause per field, such as "server.address: is missing", separated by semicolons.
    """
    lines, within = [], set()
    for item in error.errors(include_url=False):
        field = ".".join(map(str, item["loc"])) or "the file"
        if item["type"] == "too_short" and item["loc"] in within:
            continue  # pydantic counts only the valid items, whose errors are listed already
        within.add(item["loc"][:1])
        lines.append(f"{field}: {_PLAIN_WORDS.get(item['type']) or item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def split_address(address: str) -> tuple[str, int]:
    """Split an address into host and port.

    Args:
        address: "host:port"; an IPv6 address stands in brackets.

    Returns:
        Host without brackets, and port.

    Raises:
        ConfigError: If it is not such an address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 65_536:
        raise ConfigError(f"{address!r} is not an address", fix="write host:port, such as fl.example.org:8443")
    return host.strip("[]"), int(port)
