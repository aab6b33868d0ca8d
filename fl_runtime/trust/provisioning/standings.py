"""Standings: which certificates of an authority count, and until when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import Certificate, is_issued_by


@dataclass(frozen=True)
class Standing:
    """What became of a certificate.

    Attributes:
        certificate: The certificate.
        state: Such as "valid", "ends soon" or "revoked 2026-01-31T10:00:00+00:00".
        counts: Whether a server accepts it.
    """

    certificate: Certificate
    state: str
    counts: bool


def standings(authority: Authority) -> list[Standing]:
    """Return the standing of every certificate that was issued: first those that count, by name, oldest first.

    Args:
        authority: The authority.
    """
    revoked, issued = authority.revoked(), list(authority.issued())
    found = []
    for item in issued:
        later = [each for each in issued if each.fingerprint == item.fingerprint and each.serial not in revoked]
        state, counts = "valid", True
        if item.serial in revoked:
            state, counts = f"revoked {revoked[item.serial]}", False
        elif item.not_after < datetime.now(UTC):
            state, counts = "expired", False
        elif not is_issued_by(item.pem, authority.roots):
            state, counts = "of a root that was retired", False
        elif later[-1].serial != item.serial:
            state = "renewed; counts until the renewed one is used"
        elif item.expires_soon:
            state = "ends soon"
        found.append(Standing(item, state, counts))
    return sorted(
        found, key=lambda each: (not each.counts, each.certificate.identity.name, each.certificate.not_before)
    )


def newest(authority: Authority) -> dict[str, Certificate]:
    """Return the newest certificate of each participant that is not revoked, by name.

    Args:
        authority: The authority.
    """
    revoked = authority.revoked()
    return {item.identity.name: item for item in authority.issued() if item.serial not in revoked}
