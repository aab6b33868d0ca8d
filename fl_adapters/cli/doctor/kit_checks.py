"""Checks of `fl-adapters doctor --kit`: the kit's files, its certificate, the way to the server, and the clock."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.cli.doctor.checks import Check
from fl_runtime.errors import ConnectionLostError, FederationError

if TYPE_CHECKING:
    from fl_runtime.trust.certificates import Certificate
    from fl_runtime.trust.kits import StartupKit

_TIMEOUT_S = 5.0
_CLOCK_S = 60.0
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
    yield _authority(kit)
    yield _certificate(kit.certificate)
    yield _revocation_list(kit)
    if kit.identity.kind == "site":
        try:
            read_policy(kit.policy_file)
            yield Check("policy", "ok", str(kit.policy_file))
        except FederationError as error:
            yield Check("policy", "problem", f"{error.what} ({error.where})", error.fix)
    if kit.identity.kind == "server":
        yield _listening(kit.listen)
    else:
        yield from _server(kit)


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


def _server(kit: StartupKit) -> Iterator[Check]:
    unanswered = []
    for address in kit.addresses:
        checks = list(_reached(kit, address))
        if all(check.status == "ok" for check in checks):
            yield from checks
            break
        unanswered += checks
    else:
        yield from unanswered
        return
    for check in unanswered:  # one server serves at a time; the others do not listen meanwhile
        yield replace(check, status="note" if check.status == "problem" else check.status)
    yield from _answers(kit)


def _reached(kit: StartupKit, address: str) -> Iterator[Check]:
    """Check the way to one address of the server, step by step until something fails."""
    from fl_runtime.trust.project import split_address

    host, port = split_address(address)
    try:
        addresses = sorted({str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        yield Check("server's name", "ok", f"{host} is {', '.join(addresses)}")
    except OSError as error:
        yield Check("server's name", "problem", f"{host}: {error.strerror}", "check DNS, or add the name to /etc/hosts")
        return
    try:
        socket.create_connection((host, port), _TIMEOUT_S).close()
        yield Check("server's port", "ok", f"{port} accepts connections")
    except OSError as error:
        fix = f"start the server; allow outgoing TCP to {address} in this network; sites need no open port"
        yield Check("server's port", "problem", f"{port}: {error.strerror or error}", fix)
        return
    problem = _handshake(kit, host, port)
    if problem:
        yield Check(
            "TLS", "problem", problem, "it must be this federation's server, without a proxy that opens TLS in between"
        )
        return
    yield Check("TLS", "ok", "version 1.3; the server's certificate is from this federation")


def _handshake(kit: StartupKit, host: str, port: int) -> str:
    """Make a TLS connection to the server. Returns what went wrong, or ""."""
    from fl_runtime.version import SERVER_NAME

    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(kit.folder / "ca.pem"))
    context.load_cert_chain(kit.folder / "certificate.pem", kit.folder / "key.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), _TIMEOUT_S) as plain:
            context.wrap_socket(plain, server_hostname=SERVER_NAME).close()
    except ssl.SSLCertVerificationError as error:
        return f"the server's certificate: {error.verify_message}"
    except (OSError, ssl.SSLError) as error:
        return str(error)
    return ""


def _answers(kit: StartupKit) -> Iterator[Check]:
    """Ask the server what it knows of this participant, and what time it is there."""
    from fl_adapters.cli.federation.connection import connected
    from fl_runtime.transport.proxies import proxy_variable

    try:
        with connected(kit) as control:
            before = time.time()
            status = control.ask("Status")
            apart = abs(float(status["time"]) - (before + time.time()) / 2)
    except ConnectionLostError as error:
        fix = "the server refuses this certificate: check whether it is expired, revoked, or from another federation"
        proxy = proxy_variable(kit.address)
        if proxy is not None:
            host = kit.address.rpartition(":")[0]
            fix = f"the proxy in ${proxy} may be in the way: add {host} to $no_proxy, or let it pass {kit.address}"
        yield Check("server", "problem", error.what, fix)
        return
    except FederationError as error:
        yield Check("server", "problem", error.what, error.fix)
        return
    if kit.identity.kind == "site":
        yield _membership(kit.identity.name, status["sites"])
    if apart > _CLOCK_S:
        yield Check(
            "clock", "problem", f"{apart:.0f} s apart from the server's clock", "set this machine's clock, best by NTP"
        )
        return
    yield Check("clock", "ok", f"{apart:.1f} s apart from the server's clock")


def _membership(site: str, known: list[str]) -> Check:
    if site in known:
        return Check("membership", "ok", f"the server knows {site}, one of {len(known)} sites")
    fix = "have the authority run `fl-adapters provision` with the kit of a project admin as --kit"
    return Check("membership", "problem", f"the server does not know the site {site}; no job waits for it", fix)
