"""A provisioned federation: authority, kits, a server over mutual TLS, and clients with any certificate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from federation_bench import Site

from fl_adapters.cli.federation.server import read_job
from fl_runtime.client.control import ControlClient
from fl_runtime.client.kit_transport import KitTransport
from fl_runtime.server.federation.federation import FederationServer
from fl_runtime.transport.base import Credentials
from fl_runtime.transport.grpc import GrpcTransport
from fl_runtime.transport.tls import FileCredentials
from fl_runtime.trust import audit
from fl_runtime.trust.authority import Authority
from fl_runtime.trust.certificates import key_pem, new_key
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import read_kit, write_kit
from fl_runtime.trust.project import AdminEntry, Project, ServerEntry, SiteEntry
from fl_runtime.types import Listener

WAIT_S = 30.0
ADMINS = {
    "ada": ("north-hospital", "project-admin"),
    "olga": ("north-hospital", "organisation-admin"),
    "lena": ("north-hospital", "lead"),
    "lars": ("south-hospital", "lead"),
    "mina": ("south-hospital", "member"),
}


def project(address: str = "127.0.0.1:8443", sites: tuple[str, ...] = ("north", "south"), **fields: Any) -> Project:
    return Project(
        federation="study",
        server=ServerEntry(address=address, listen=address),
        sites=tuple(SiteEntry(name=name, organisation=f"{name}-hospital") for name in sites),
        admins=tuple(
            AdminEntry(name=n, organisation=o, role=r)  # type: ignore[arg-type]
            for n, (o, r) in ADMINS.items()
        ),
        **fields,
    )


class Study:
    """A federation with its kits in folder/kits and its server in this process, on its own port."""

    def __init__(
        self,
        folder: Path,
        sites: tuple[str, ...] = ("north", "south"),
        listener_of: Callable[[str], Listener] | None = None,
        address: str = "127.0.0.1:8443",
    ) -> None:
        self._listener_of = listener_of
        self.folder, self.kits, self.runs = folder, folder / "kits", folder / "runs"
        self.authority = Authority.create(self.kits / "authority", project(address, sites))
        for identity in self.authority.project.participants():
            write_kit(self.kits / identity.name, self.authority, identity)
            alone(self.kits / identity.name, sites)
        self.sites = sites
        self.address = ""
        self._things = ExitStack()

    def __enter__(self) -> Study:
        self.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self._things.close()
        self.server.close()

    def start(self, listen: str = "127.0.0.1:0") -> None:
        """Start the server, or another one in its place."""
        kit = read_kit(self.kits / "server", kind="server")
        self.server = FederationServer(kit, self.runs, read_job, listen=listen, listener_of=self._listener_of)
        self.address = self.server.start()

    # -- callers ----------------------------------------------------------------------------------------------

    def transport(self, name: str) -> GrpcTransport:
        """Return a transport that uses the certificate of a kit."""
        return self._closed(GrpcTransport(self.address, credentials=FileCredentials(self.kits / name)))

    def admin(self, name: str = "ada") -> ControlClient:
        return ControlClient(self.transport(name))

    def site(self, name: str, patience_s: float = WAIT_S) -> Site:
        """Return a site's client, as one of its processes would have it."""
        return Site(name, self.transport(name), patience_s)

    def stranger(self, key: bytes, certificate: bytes, authority: bytes = b"") -> GrpcTransport:
        """Return a client with any key and certificate."""
        found = Credentials(key, certificate, authority or self.authority.pem)
        return self._closed(GrpcTransport(self.address, credentials=lambda: found))

    def _closed(self, transport: GrpcTransport) -> GrpcTransport:
        self._things.callback(transport.close)
        return transport

    # -- certificates -----------------------------------------------------------------------------------------

    def certificate(
        self, identity: Identity, *, begins_in_s: float = -60, ends_in_s: float = 3600
    ) -> tuple[bytes, bytes]:
        """Return a key, and a certificate by the authority for any identity and time."""
        return certificate(self.authority._key, self.authority.pem, identity, begins_in_s, ends_in_s)

    # -- what happens -----------------------------------------------------------------------------------------

    def job(self, name: str = "job", by: str = "lena", **fields: Any) -> str:
        """Submit a job, and return its name."""
        return str(self.admin(by).ask("SubmitJob", job={"app": "train", "name": name, "rounds": 2, **fields})["job"])

    def log(self, name: str = "server") -> list[dict[str, Any]]:
        return audit.entries(self.kits / name)

    def refusals(self, name: str = "server") -> list[dict[str, Any]]:
        return [entry for entry in self.log(name) if entry["outcome"] == "refused"]


def certificate(
    authority_key: Any, authority_pem: bytes, identity: Identity, begins_in_s: float = -60, ends_in_s: float = 3600
) -> tuple[bytes, bytes]:
    """Return a key, and a certificate signed with the given key."""
    key, now = new_key(), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, identity.name)]))
        .issuer_name(x509.load_pem_x509_certificate(authority_pem).subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=begins_in_s))
        .not_valid_after(now + timedelta(seconds=ends_in_s))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), critical=False)
    )
    pem = builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return key_pem(key), pem


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until a condition holds, and return its value. Fails with `what` if it never does."""
    end = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.02)
    return value


def asked(kit: Path, address: str, method: str = "Status", request: bytes = b"{}") -> Any:
    """Make one call with a kit, as a new process would, and return the first answer."""
    transport = KitTransport(kit, address)
    try:
        return json.loads(next(iter(transport.call(method, request))))
    finally:
        transport.close()


def alone(kit: Path, sites: tuple[str, ...]) -> None:
    """Let the policy of the only site of a federation take part in models of its own update alone."""
    policy = kit / "policy.yml"
    if len(sites) == 1 and policy.exists():
        policy.write_text(policy.read_text().replace("min_cohort: 2", "min_cohort: 1"))


def readdressed(study: Study, name: str) -> Path:
    """Return the kit of `name` with the address of the test's server, as if it had been provisioned so."""
    folder = study.folder / "readdressed" / name
    if not folder.exists():
        moved = Project(**{**study.authority.project.model_dump(), "server": {"address": study.address}})
        before, study.authority.project = study.authority.project, moved
        write_kit(folder, study.authority, moved.participant(name))
        alone(folder, study.sites)
        study.authority.project = before
    return folder
