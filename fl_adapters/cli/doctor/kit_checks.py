"""Checks of `fl-adapters doctor --kit`: the kit's files, its certificate, the way to the server, and the clock."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.cli.doctor.checks import Check
from fl_adapters.cli.doctor.server_checks import server_checks
from fl_adapters.participant.identity import POLICY_DATA_FIX, place_of_data
from fl_runtime.errors import FederationError

if TYPE_CHECKING:
    from fl_runtime.trust.certificates import Certificate
    from fl_runtime.trust.kits import StartupKit

_AUTHORITY_DAYS = 180


def kit_checks(folder: Path) -> Iterator[Check]:
    """Checks from the files to the server. Stops where the next check could only fail for the same reason.

    Args:
        folder: Folder of the startup kit.

    Yields:
        The checks, in order.
    """
    try:
        from fl_runtime.trust.kits import read_kit
        from fl_runtime.trust.policy import read_policy

        kit = read_kit(folder)
    except ModuleNotFoundError as error:
        yield Check("startup kit", "problem", f"{error.name} is missing", "pip install 'fl-adapters[trust]'")
        return
    except FederationError as error:
        yield Check("startup kit", "problem", f"{error.what} ({error.where})", error.fix)
        return
    yield Check("startup kit", "ok", f"{kit.identity} in {kit.identity.federation}; files, key and signature are good")
    if kit.folder != folder.resolve():
        yield Check("state", "ok", f"the kit is not written to; what changes is kept in {kit.folder}")
    yield _authority(kit)
    yield _certificate(kit.certificate)
    yield _revocation_list(kit)
    if kit.identity.kind == "site":
        try:
            policy = read_policy(kit.policy_file)
            yield Check("policy", "ok", str(kit.policy_file))
            yield from _data(policy.data, str(kit.policy_file))
        except FederationError as error:
            yield Check("policy", "problem", f"{error.what} ({error.where})", error.fix)
    if kit.identity.kind == "server":
        yield _listening(kit.listen)
    else:
        yield from server_checks(kit)


def _data(data: str | Mapping[str, str] | None, where: str) -> Iterator[Check]:
    for place in (data,) if isinstance(data, str) else (data or {}).values():
        try:
            yield Check("data", "ok", place_of_data(place, where=where, fix=POLICY_DATA_FIX))
        except FederationError as error:
            yield Check("data", "problem", f"{error.what} ({error.where})", error.fix)


def _authority(kit: StartupKit) -> Check:
    from fl_runtime.trust.certificates import ends

    until = ends((kit.folder / "ca.pem").read_bytes())
    detail = f"valid until {until:%Y-%m-%d}, fingerprint {kit.authority}"
    if (until - datetime.now(UTC)).days < _AUTHORITY_DAYS:
        return Check("authority", "note", detail, "provision a new federation before it expires")
    return Check("authority", "ok", detail)


def _certificate(certificate: Certificate) -> Check:
    days, now = certificate.days_left(), datetime.now(UTC)
    until = f"valid until {certificate.not_after:%Y-%m-%d %H:%M} UTC, {days:.1f} days"
    if days < 0:
        fix = (
            "check this machine's clock; if it is right, have the authority renew it and run `fl-adapters cert install`"
        )
        return Check("certificate", "problem", f"expired on {certificate.not_after:%Y-%m-%d %H:%M} UTC", fix)
    if now < certificate.not_before:
        return Check("certificate", "problem", "not valid yet", "set this machine's clock")
    if certificate.expires_soon:
        return Check(
            "certificate", "note", until, "have the authority run `fl-adapters cert renew`, then `cert install`"
        )
    return Check("certificate", "ok", until)


def _revocation_list(kit: StartupKit) -> Check:
    from fl_runtime.trust.kits import CA, CRL
    from fl_runtime.trust.revocation import RevocationList

    server = kit.identity.kind == "server"
    try:
        current = RevocationList(kit.folder / CRL, (kit.folder / CA).read_bytes(), required=server).current
    except FederationError as error:
        return Check("revocation list", "problem", f"{error.what} ({error.where})", error.fix)
    if current is None:
        return Check("revocation list", "ok", "none yet; the server sends it with the first call")
    detail = f"number {current.number}, counts until {current.ends:%Y-%m-%d %H:%M} UTC"
    fix = "have the authority run `fl-adapters cert crl`, with the kit of a project admin"
    if current.has_ended:
        return Check("revocation list", "problem" if server else "note", detail, fix)
    return Check("revocation list", "note" if current.ends_soon else "ok", detail, fix if current.ends_soon else "")


def _listening(listen: str) -> Check:
    from fl_runtime.trust.project import split_address

    host, port = split_address(listen)
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        why = error.strerror or str(error)
        return Check(
            f"port {port}",
            "note",
            f"{host}: {why}",
            "fine if the server itself uses it; else choose another with --listen",
        )
    return Check(f"port {port}", "ok", f"{host}: free")
