"""The project file: who takes part in a federation. YAML, checked when it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_runtime.errors import ConfigError
from fl_runtime.trust.identity import Identity, Role, check_name

DEFAULT_DAYS = 90.0
DEFAULT_PORT = 8443


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerEntry(_Part):
    """address: host:port under which the sites reach it. listen: host and port that it binds, by default all
    interfaces and the same port."""

    name: str = "server"
    address: str
    listen: str = ""
    organisation: str = ""


class SiteEntry(_Part):
    name: str
    organisation: str


class AdminEntry(_Part):
    name: str
    organisation: str
    role: Role


class Project(_Part):
    """A federation's participants. days: lifetime of their certificates; authority_days: of the authority's own."""

    federation: str
    server: ServerEntry
    sites: tuple[SiteEntry, ...] = Field(min_length=1)
    admins: tuple[AdminEntry, ...] = ()
    days: float = Field(default=DEFAULT_DAYS, gt=0, le=825)
    authority_days: float = Field(default=1826.0, gt=0, le=3653)

    @model_validator(mode="after")
    def _checked(self) -> Project:
        check_name(self.federation, "federation")
        split_address(self.server.address)
        if self.server.listen:
            split_address(self.server.listen)
        names = [identity.name for identity in self.participants()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or "authority" in names:
            raise ConfigError(
                f"the name {(twice or ['authority'])[0]!r} is taken", fix="give everybody a name of its own"
            )
        for site in self.sites:
            if "@" in site.name or site.name in ("global", "local"):
                raise ConfigError(f"a site cannot be called {site.name!r}", fix="choose another name")
        return self

    def participants(self) -> Iterator[Identity]:
        """Everybody who gets a kit; the server first."""
        server = self.server
        yield Identity(self.federation, "server", server.name, server.organisation or self.federation)
        for site in self.sites:
            yield Identity(self.federation, "site", site.name, site.organisation)
        for admin in self.admins:
            yield Identity(self.federation, "admin", admin.name, admin.organisation, admin.role)

    def participant(self, name: str) -> Identity:
        """ConfigError if the project names nobody so."""
        for identity in self.participants():
            if identity.name == name:
                return identity
        raise ConfigError(
            f"{name!r} is not in the project {self.federation}",
            fix="add it to the project file and run `fl-adapters provision` again",
        )


def read_project(path: Path) -> Project:
    """The project in a YAML file. Raises ConfigError that names the file and what is wrong."""
    try:
        fields: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the project cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the project is not YAML: {error}", where=str(path), fix="correct it there") from None
    try:
        return Project.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(findings(error), where=str(path), fix="see docs/production.md for an example") from None
    except ConfigError as error:
        raise ConfigError(error.what, where=str(path), fix=error.fix) from None


_PLAINLY = {
    "missing": "is missing",
    "extra_forbidden": "is not a field here",
    "model_type": "should be fields, each with its value",
    "tuple_type": "should be a list",
    "string_type": "should be text",
    "too_short": "is empty",
}


def findings(error: ValidationError) -> str:
    """What pydantic found, a sentence for each field."""
    lines, within = [], set()
    for item in error.errors(include_url=False):
        field = ".".join(map(str, item["loc"])) or "the file"
        if item["type"] == "too_short" and item["loc"] in within:
            continue  # pydantic counts the good ones only
        within.add(item["loc"][:1])
        lines.append(f"{field}: {_PLAINLY.get(item['type']) or item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def split_address(address: str) -> tuple[str, int]:
    """host:port taken apart. ConfigError where it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 65_536:
        raise ConfigError(f"{address!r} is no address", fix="write host:port, such as fl.example.org:8443")
    return host.strip("[]"), int(port)
