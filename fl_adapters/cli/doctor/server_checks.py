"""Checks of `fl-adapters doctor --kit` on the way to the server, step by step, the way that gRPC goes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fl_adapters.cli.doctor.checks import Check
from fl_runtime.errors import ConfigError, ConnectionLostError, FederationError
from fl_runtime.transport.routes import proxies
from fl_runtime.version import SERVER_NAME

if TYPE_CHECKING:
    from fl_runtime.transport.routes.proxies import Proxy
    from fl_runtime.transport.tls import ServerCertificate
    from fl_runtime.trust.kits import StartupKit

_TIMEOUT_S = 5.0
_CLOCK_S = 60.0


def server_checks(kit: StartupKit) -> Iterator[Check]:
    """Checks of the way to the server and of what it says. Stops where the next check could only fail, too.

    Args:
        kit: The kit of a site or an admin.

    Yields:
        The checks, in order.
    """
    unanswered = []
    for address in kit.addresses:
        checks = list(_reached(kit, address))
        if all(check.status != "problem" for check in checks):
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
    try:
        proxy = proxies.proxy_of(address)
    except ConfigError as error:
        yield Check("proxy", "problem", error.what, error.fix)
        return
    checks = _direct(address) if proxy is None else _through(proxy, address)
    for check in checks:
        yield check
        if check.status == "problem":
            return
    yield from _tls(kit, address)


def _direct(address: str) -> Iterator[Check]:
    host, port = proxies.host_of(address), int(address.rpartition(":")[2])
    ignored = [name for name in map(str.upper, proxies.VARIABLES) if os.environ.get(name)]
    if ignored and not proxies.is_loopback(address):
        fix = f"if the server is behind that proxy, set {ignored[0].lower()}, in small letters, as gRPC wants it"
        yield Check("proxy", "note", f"none; ${ignored[0]} is not read", fix)
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


def _through(proxy: Proxy, address: str) -> Iterator[Check]:
    """Check the way through a proxy, which also looks the server's name up."""
    try:
        connection = proxies.reach(proxy, _TIMEOUT_S)
    except proxies.ProxyError as error:
        yield Check("proxy", "problem", str(error), error.fix)
        return
    yield Check("proxy", "ok", f"${proxy.variable} names {proxy.address}, which accepts connections")
    with connection:
        try:
            proxies.ask_for(address, proxy, connection)
        except proxies.ProxyError as error:
            yield Check("proxy's answer", "problem", str(error), error.fix)
            return
    yield Check("proxy's answer", "ok", f"it connects to {address}")


def _tls(kit: StartupKit, address: str) -> Iterator[Check]:
    """Check what answers at the end of the way: its TLS, whose certificate it shows, and for which name."""
    from fl_runtime.transport.routes.route import fault_of, greeting_name, is_name
    from fl_runtime.transport.tls import server_certificate, shown_certificate
    from fl_runtime.trust.certificates import issuer_of
    from fl_runtime.trust.kits import CA

    authority = (kit.folder / CA).read_bytes()
    greeting = greeting_name(address)

    def connect() -> socket.socket:
        return proxies.open_connection(address, _TIMEOUT_S)

    try:
        certificate = server_certificate(authority, connect, greeting)
    except OSError as error:
        what, fix = fault_of(error)
        with suppress(OSError, FederationError):  # no TLS at all, or not one that we speak
            what = f"{what}; it is by {issuer_of(shown_certificate(connect, greeting))}"
        yield Check("TLS", "problem", what, fix)
        return
    yield Check("TLS", "ok", "version 1.3; the server's certificate is from this federation")
    if is_name(address):
        yield _named(certificate, greeting)


def _named(certificate: ServerCertificate, host: str) -> Check:
    if certificate.has_name(host):
        return Check("server's certificate", "ok", f"it has the name {host}")
    others = ", ".join(sorted(certificate.names - {SERVER_NAME})) or "no other name"
    return Check(
        "server's certificate",
        "note",
        f"it does not have the name {host}, but {others}",
        "fine, unless a balancer finds the server by its name (SNI): then list this address in project.yml, and "
        "install what `fl-adapters cert renew server` makes",
    )


def _answers(kit: StartupKit) -> Iterator[Check]:
    """Ask the server what it knows of this participant, and what time it is there."""
    from fl_adapters.cli.federation.connection import connected

    try:
        with connected(kit) as control:
            before = time.time()
            status = control.ask("Status")
            apart = abs(float(status["time"]) - (before + time.time()) / 2)
    except ConnectionLostError as error:
        fix = "the server refuses this certificate: check whether it is expired, revoked, or from another federation"
        proxy = proxies.proxy_of(kit.address)
        if proxy is not None:
            fix += f"; or {proxy} breaks long connections to {kit.address}: have them exempted"
        yield Check("server", "problem", error.what, fix)
        return
    except FederationError as error:
        yield Check("server", "problem", error.what, error.fix)
        return
    yield from _versions(status)
    if kit.identity.kind == "site":
        yield _membership(kit.identity.name, status["sites"])
    if apart > _CLOCK_S:
        yield Check(
            "clock", "problem", f"{apart:.0f} s apart from the server's clock", "set this machine's clock, best by NTP"
        )
        return
    yield Check("clock", "ok", f"{apart:.1f} s apart from the server's clock")


def _versions(status: Mapping[str, Any]) -> Iterator[Check]:
    """Compare the server's version with the one here, and with those that the sites have told."""
    from fl_runtime.wire.software import OWN, Software, common_protocol, misfit

    version, protocols = str(status["version"]), status.get("protocols", [OWN.lowest, OWN.highest])
    server = Software.of_json({"version": version, "protocols": protocols}) or Software(version)
    detail = f"{OWN.version} here, {version} at the server, which speaks protocol {server.protocols}"
    text = misfit(server, OWN)
    apart = common_protocol(server, OWN) is None
    yield Check("versions", ("problem" if apart else "note") if text else "ok", detail, text and f"this one {text}")
    versions = status.get("site_versions", {})
    for site, told in status.get("misfits", {}).items():
        yield Check(f"version at {site}", "note", f"fl-adapters {versions.get(site, 'unknown')}", f"it {told}")


def _membership(site: str, known: list[str]) -> Check:
    if site in known:
        return Check("membership", "ok", f"the server knows {site}, one of {len(known)} sites")
    fix = "have the authority run `fl-adapters provision` with the kit of a project admin as --kit"
    return Check("membership", "problem", f"the server does not know the site {site}; no job waits for it", fix)
