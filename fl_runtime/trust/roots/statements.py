"""Signed statements about which roots a federation trusts, as the authority makes them at each change.

A statement is JSON text: format, federation, number (from 1, each is one higher), roots (PEM, the newest first),
crossed (PEM: the key of each root, signed by the other) and crl (PEM). The authority signs b"fl-adapters roots 1", a
zero byte and the text: at the beginning of a rotation with the old root's key, at its end with the new one's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.trust.certificates import (
    PrivateKey,
    authority_fingerprint,
    is_self_signed,
    load,
    pem_list,
    sign,
    signed,
    signed_by,
)
from fl_runtime.version import check_format

FORMAT = 1
_PURPOSE = b"fl-adapters roots 1\0"
_MAX_CHARS = 4 * 2**20
_MAX_STATEMENTS = 1_000


@dataclass(frozen=True)
class Statement:
    """One statement, and the signature under it.

    Attributes:
        text: The statement as JSON.
        signature: ECDSA with SHA-256, hexadecimal.
        number: Its number; later ones have higher numbers.
        federation: Name of the federation.
        roots: The trusted roots as PEM, the newest first.
        crossed: Certificates of the roots' keys, signed by each other, as PEM.
        crl: The revocation list as PEM.
    """

    text: str
    signature: str
    number: int
    federation: str
    roots: tuple[str, ...]
    crossed: tuple[str, ...]
    crl: str

    @classmethod
    def make(
        cls, key: PrivateKey, federation: str, number: int, roots: Sequence[str], crossed: Sequence[str], crl: str
    ) -> Statement:
        """Make and sign a statement. The arguments are its attributes, and the key of a root that is trusted now."""
        fields = {
            "format": FORMAT,
            "federation": federation,
            "number": number,
            "roots": list(roots),
            "crossed": list(crossed),
            "crl": crl,
        }
        text = json.dumps(fields, indent=1)
        return cls.read({"text": text, "signature": sign(key, _PURPOSE + text.encode()).hex()})

    @classmethod
    def read(cls, fields: Any) -> Statement:
        """Read a statement, without checking its signature.

        Args:
            fields: `text` and `signature`, as `to_json` returns them.

        Returns:
            The statement.

        Raises:
            ConfigError: If it is not one.
        """
        try:
            text, signature = fields["text"], fields["signature"]
            if len(text) > _MAX_CHARS:
                raise ValueError
            stated = json.loads(text)
            check_format(stated["format"], FORMAT, "the statement about roots", where="roots.json")
            number, federation, crl = stated["number"], stated["federation"], stated["crl"]
            roots, crossed = tuple(stated["roots"]), tuple(stated["crossed"])
            texts = (signature, federation, crl, *roots, *crossed)
            if type(number) is not int or not roots or not all(isinstance(each, str) for each in texts):
                raise ValueError
            bytes.fromhex(signature)
            found = [load(root.encode()) for root in roots]
            if not all(map(is_self_signed, found)):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError("this is not a statement about an authority's roots", fix=FROM_AUTHORITY) from None
        return cls(text, signature, number, federation, roots, crossed, crl)

    def to_json(self) -> dict[str, str]:
        """Return the statement as JSON values."""
        return {"text": self.text, "signature": self.signature}

    @property
    def pem(self) -> bytes:
        """The trusted roots as one PEM text."""
        return "".join(self.roots).encode()

    def is_signed_by(self, root: bytes) -> bool:
        """Whether the key of a root signed this statement."""
        return signed_by(root, _PURPOSE + self.text.encode(), bytes.fromhex(self.signature))


FROM_AUTHORITY = "use the roots.json in the authority's folder"


def read_statements(fields: Any) -> tuple[Statement, ...]:
    """Read a list of statements, without checking their signatures. Raises ConfigError if it is not one."""
    if not isinstance(fields, list) or len(fields) > _MAX_STATEMENTS:
        raise ConfigError("this is not a list of statements about roots", fix=FROM_AUTHORITY)
    return tuple(map(Statement.read, fields))


def follow(trusted: bytes, number: int, federation: str, statements: Iterable[Statement]) -> tuple[bytes, int]:
    """Follow statements from the roots that are trusted now. Those with lower numbers are passed over.

    Args:
        trusted: The roots that are trusted now, as PEM.
        number: Number of the statement that made them so; 0 if none did.
        federation: Name of the federation.
        statements: The statements in order.

    Returns:
        The roots that are trusted after the last statement, and its number.

    Raises:
        ConfigError: If a statement is of another federation, or is not signed by a root that is trusted by then.
    """
    for statement in statements:
        if statement.number <= number:
            continue
        if statement.federation != federation:
            raise ConfigError(
                f"these roots are those of {statement.federation!r}, not of {federation}", fix=FROM_AUTHORITY
            )
        present = pem_list(trusted)
        if not any(map(statement.is_signed_by, present)) or not _are_vouched_for(statement, present):
            raise ConfigError(
                f"statement {statement.number} about roots is not signed by a root that is trusted here",
                where=", ".join(authority_fingerprint(each)[:16] for each in present),
                fix="compare the fingerprint of this kit's authority with that of the person who keeps it; if it was "
                "retired, get a new startup kit",
            )
        trusted, number = statement.pem, statement.number
    return trusted, number


def _are_vouched_for(statement: Statement, trusted: list[bytes]) -> bool:
    """Whether every root of a statement is trusted already, or its key is certified by one that is."""
    known = list(map(load, trusted))
    certified = [each for each in statement.crossed if any(signed(load(each.encode()), root) for root in known)]
    keys = {authority_fingerprint(pem) for pem in (*trusted, *(each.encode() for each in certified))}
    return all(authority_fingerprint(root.encode()) in keys for root in statement.roots)


def offered(package: Mapping[str, Any], name: str, number: int) -> dict[str, Any]:
    """Return what a participant needs of a package of the authority.

    Args:
        package: `statements`, and `certificates`: name -> its certificates under the newest root.
        name: Name of the participant.
        number: Number of the newest statement that it knows.

    Returns:
        `statements`: the newer ones, and `certificates`: its own.
    """
    newer = [each for each in package["statements"] if Statement.read(each).number > number]
    return {"statements": newer, "certificates": list(package["certificates"].get(name, ()))}
