"""Identities: who a participant of a federation is, as its certificate says in its URI name.

    fl-adapters://FEDERATION/KIND/NAME?organisation=ORGANISATION[&role=ROLE]

KIND is "server", "site" or "admin"; admins alone have a role. Parts are percent-encoded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from fl_runtime.errors import ConfigError, PermissionDeniedError

Kind: TypeAlias = Literal["server", "site", "admin"]
Role: TypeAlias = Literal["project-admin", "organisation-admin", "lead", "member"]

KINDS: tuple[Kind, ...] = get_args(Kind)
ROLES: tuple[Role, ...] = get_args(Role)

_SCHEME = "fl-adapters"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Identity:
    """One participant of a federation.

    Attributes:
        federation: Name of the federation.
        kind: "server", "site" or "admin".
        name: Name of the participant, unique in the federation.
        organisation: The organisation that it belongs to.
        role: Role of an admin; "" for servers and sites.

    Raises:
        ConfigError: If a name is not usable, or kind and role do not fit.
    """

    federation: str
    kind: Kind
    name: str
    organisation: str
    role: Role | Literal[""] = ""

    def __post_init__(self) -> None:
        for field in ("federation", "name", "organisation"):
            check_name(getattr(self, field), field)
        if self.kind not in KINDS:
            raise ConfigError(f"{self.kind!r} is not a kind of participant", fix=f"use one of {', '.join(KINDS)}")
        if (self.kind == "admin") != bool(self.role) or (self.role and self.role not in ROLES):
            raise ConfigError(
                f"{self.name} is of kind {self.kind} and has the role {self.role!r}",
                fix=f"give an admin one of the roles {', '.join(ROLES)}, and other participants none",
            )

    def __str__(self) -> str:
        return f"{self.role or self.kind} {self.name} of {self.organisation}"

    @property
    def uri(self) -> str:
        """The identity as a URI, such as fl-adapters://study/site/north?organisation=north-hospital."""
        query = {"organisation": self.organisation, **({"role": self.role} if self.role else {})}
        return f"{_SCHEME}://{quote(self.federation)}/{self.kind}/{quote(self.name, safe='')}?{urlencode(query)}"

    @classmethod
    def from_uri(cls, uri: str) -> Identity:
        """Read an identity from its URI.

        Args:
            uri: The URI, usually from a certificate.

        Returns:
            The identity.

        Raises:
            PermissionDeniedError: If the URI is not a valid identity.
        """
        try:
            parts = urlsplit(uri)
            _, kind, name = parts.path.split("/")
            query = parse_qs(parts.query, strict_parsing=True)
            fields = {key: value for key, (value,) in query.items()}
            if parts.scheme != _SCHEME or not fields.keys() <= {"organisation", "role"}:
                raise ValueError
            return cls(
                unquote(parts.netloc),
                kind,  # type: ignore[arg-type]
                unquote(name),
                fields["organisation"],
                fields.get("role", ""),  # type: ignore[arg-type]
            )
        except (ValueError, KeyError, ConfigError):
            raise PermissionDeniedError(
                f"{uri[:200]!r} is not the identity of a participant", fix="use a certificate made by fl-adapters"
            ) from None


def check_name(name: object, field: str) -> None:
    """Check that a name can be used in certificates and as a folder.

    Args:
        name: The name.
        field: What it names, for the error message.

    Raises:
        ConfigError: If it cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{field} cannot be {name!r}",
            fix="use at most 64 letters, digits, '.', '_', '@' and '-', and begin with a letter or digit",
        )
