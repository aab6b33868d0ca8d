"""Who takes part in a federation: the project file, and the signed list of members that servers read.

The project file is YAML, kept by the authority. Example:
    federation: tumour-study
    server: {address: "fl.example.org:8443"}
    sites:
      - {name: north, organisation: north-hospital}
      - {name: south, organisation: south-hospital}
    admins:
      - {name: ada, organisation: north-hospital, role: project-admin}
    days: 90

`members.json` is a JSON object: `members`, a text that holds a format number, the federation, a number that grows, and
the URIs of all participants; and `signature`, the base64 of that text's ECDSA signature by a root of the authority.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_runtime.errors import ConfigError, FederationError, NewerFormatError
from fl_runtime.trust.certificates import PrivateKey, pem_list, sign, signed_by
from fl_runtime.trust.files import read_file, write_file
from fl_runtime.trust.identity import Identity, Role, check_name
from fl_runtime.trust.roots.outside import check_bundle, checked_name
from fl_runtime.types import PRODUCTION_PATIENCE_S
from fl_runtime.version import check_format
from fl_runtime.yaml_files import read_yaml

DEFAULT_DAYS, DEFAULT_CRL_DAYS = 90.0, 365.0
DEFAULT_PORT = 8443
MEMBERS, _FORMAT = "members.json", 1
"""Name of the signed list of members, in the authority's folder and in the server's kit; and its format number."""
_TAKEN_UP = "members.number"  # beside the list: number and digest of the newest one that was in force
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})")


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
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_ipv6 = False
    with suppress(ValueError):
        is_ipv6 = bare != host and ipaddress.IPv6Address(bare).version == 6
    fault, fix = "", "write host:port, such as fl.example.org:8443"
    if "/" in address:
        fault = "it has a scheme or a path"
    elif address != "".join(address.split()):
        fault = "it has a blank"
    elif not host or not (port.isascii() and port.isdigit()) or int(port) >= 65_536:
        fault = "it has no port from 0 to 65535"
    elif ":" in host and not is_ipv6:
        fault, fix = "an IPv6 address stands in brackets", "write it as [2001:db8::1]:8443"
    elif not host.isascii():
        fault, fix = "international names are written in ASCII", f"write {_in_ascii(host)}:{port}"
    elif ":" not in bare and not _HOST.fullmatch(bare):
        fault = "its host is not a name"
    if fault:
        raise ConfigError(f"{address!r} is not an address: {fault}", fix=fix)
    return bare, int(port)


def _in_ascii(host: str) -> str:
    try:
        return host.encode("idna").decode()
    except UnicodeError:  # not a name in any alphabet
        return "fl.example.org"


@dataclass(frozen=True)
class MemberList:
    """A list of members whose signature was verified.

    Attributes:
        number: Its number; newer lists have higher ones.
        participants: Everybody who may take part.
    """

    number: int
    participants: tuple[Identity, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order of the project file."""
        return tuple(item.name for item in self.participants if item.kind == "site")

    def has(self, identity: Identity) -> bool:
        """Whether there is a participant of this kind and name."""
        return any((item.kind, item.name) == (identity.kind, identity.name) for item in self.participants)

    def signed(self, key: PrivateKey, federation: str) -> bytes:
        """Return the list as a file.

        Args:
            key: Key of a root that everybody trusts.
            federation: Name of the federation.
        """
        fields = {"format": _FORMAT, "federation": federation, "number": self.number}
        text = json.dumps({**fields, "participants": [item.uri for item in self.participants]}, indent=1)
        signature = base64.b64encode(sign(key, text.encode())).decode()
        return json.dumps({"members": text, "signature": signature}, indent=1).encode()


def read_members(data: bytes, federation: str, where: str, roots: bytes | None) -> MemberList:
    """Read a list of members.

    Args:
        data: The file.
        federation: Name of the federation whose list it should be.
        where: The file or its sender, for the error message.
        roots: The roots as PEM, one of which should have signed it; None if the signature was verified before.

    Returns:
        The list.

    Raises:
        ConfigError: If it is not a list that one of them signed, or is that of another federation.
    """
    try:
        fields = json.loads(data)
        text, signature = fields["members"], base64.b64decode(fields["signature"])
        valid = roots is None or any(signed_by(root, text.encode(), signature) for root in pem_list(roots))
        members = json.loads(text)
        check_format(members.get("format"), _FORMAT, "the list of members", where=where)
        found = MemberList(int(members["number"]), tuple(map(Identity.from_uri, members["participants"])))
        valid = valid and members["federation"] == federation
    except NewerFormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FederationError):
        valid = False
    if not valid:
        raise ConfigError(
            "this is not a list of members signed by this federation's authority",
            where=where,
            fix=f"use the {MEMBERS} in the authority's folder",
        )
    return found


class Members:
    """The members of a federation, as the server's kit lists them. Threads may share it.

    A file that is replaced while the server runs takes effect with the next `refresh`. Older lists are refused. A list
    that was in force stays so when its root is retired.
    """

    def __init__(self, kit: Path, federation: str, roots: Callable[[], bytes], first_sites: Sequence[str]) -> None:
        """Read the list of a kit.

        Args:
            kit: Folder of the server's kit.
            federation: Name of the federation.
            roots: Returns the trusted roots as PEM.
            first_sites: Names of the sites if the kit is of an earlier version and has no list.

        Raises:
            ConfigError: If the list is not valid, or older than one before.
        """
        self._path, self._federation, self._roots, self._first_sites = kit / MEMBERS, federation, roots, first_sites
        self._lock = threading.Lock()
        self._seen = b""
        self.current: MemberList | None = None
        self.refresh()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the federation's sites."""
        return tuple(self._first_sites) if self.current is None else self.current.sites

    def fault(self, identity: Identity) -> str:
        """Return why a participant may not take part; "" if it may, or if there is no list."""
        missing = self.current is not None and not self.current.has(identity)
        return "it is not a member of the federation" if missing else ""

    def install(self, data: bytes) -> None:
        """Put a newer list in force and write it to the kit. The one in force may be installed again.

        Args:
            data: The list.

        Raises:
            ConfigError: If the authority did not sign it, or it is older than the one in force.
            StoreError: If the file cannot be written.
        """
        with self._lock:
            newer = self._checked(data, "the list that was sent")
            write_file(self._path, data)
            self._take(newer, data)

    def refresh(self) -> bool:
        """Read the file again if it has changed.

        Returns:
            Whether another list is in force now.

        Raises:
            ConfigError: If it is not valid, or older than the one in force, which stays; once for each change.
        """
        with self._lock:
            if not self._path.exists() and self.current is None and not self._taken_up():
                return False
            data = read_file(self._path, "list of members")
            if data == self._seen:
                return False
            self._seen = data
            self._take(self._checked(data, str(self._path)), data)
            return True

    def _checked(self, data: bytes, where: str) -> MemberList:
        newest, digest = self._taken_up() or (-1, "")
        known = digest == hashlib.sha256(data).hexdigest()
        found = read_members(data, self._federation, where, None if known else self._roots())
        if found.number < newest:
            raise ConfigError(
                f"this list of members (number {found.number}) is older than the one in force (number {newest})",
                where=where,
                fix=f"copy the newest {MEMBERS} from the authority's folder to that place",
            )
        return found

    def _take(self, found: MemberList, data: bytes) -> None:
        self._seen, self.current = data, found
        digest = hashlib.sha256(data).hexdigest()
        if (found.number, digest) != self._taken_up():
            write_file(self._path.with_name(_TAKEN_UP), json.dumps({"number": found.number, "sha256": digest}).encode())

    def _taken_up(self) -> tuple[int, str] | None:
        path = self._path.with_name(_TAKEN_UP)
        if not path.exists():
            return None
        try:
            fields = json.loads(path.read_bytes())
            return int(fields["number"]), str(fields["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                "the number of the newest list of members cannot be read",
                where=str(path),
                fix=f"copy the newest {MEMBERS} from the authority's folder here, and delete this file",
            ) from None
